"""miniature.py: commands that train.py and eval.py accept, resumable runs, honest comparisons."""

import random
import re
from xml.etree import ElementTree

import miniature
import numpy as np
import one_step
import pytest
import smollm2
import torch

import eval as evaluation
import train
from reward import accuracy_rewards

EVERY_JOB = [
    miniature.make_job(row, command, 3)
    for part in [*miniature.PARTS.values(), *smollm2.PARTS.values()]
    for row, command in part.commands.items()
]


@pytest.mark.parametrize("job", EVERY_JOB, ids=lambda job: job.out.stem)
def test_every_command_is_understood_and_writes_where_it_is_looked_for(job):
    program, *words = job.words
    if program == "train.py":
        config = train.parse_config(words)
        assert config.seed == int(job.out.name[-1])  # 3, or 0 of the control
        assert miniature.ROOT / config.out == job.out
        assert config.eval_every in (0, 20, 32)  # those that the tables ask for
    elif program == "eval.py":
        options = evaluation.parse_options(evaluation.Options, words, "")
        assert miniature.ROOT / options.out == job.out
    else:
        assert (miniature.ROOT / program).is_file()


def test_runs_that_share_a_folder_are_the_same():
    assert len({job.out for job in EVERY_JOB}) == len({*EVERY_JOB})


def test_p_by_hand():
    """Of eight choices of signs, two are as far from 0 as 1 + 2 + 3, four as 1 - 2 + 3."""
    assert miniature.paired_p([2, 3, 4], [1, 1, 1]) == 2 / 8
    assert miniature.paired_p([2, 1, 4], [1, 3, 1]) == 6 / 8
    assert miniature.paired_p([1, 2], [1, 2]) == 1
    assert miniature.paired_p(np.arange(10) + 0.1, np.arange(10)) == 2 / 1024


def test_a_table_says_where_the_seeds_do_not_tell():
    base = [0.1 * seed for seed in range(10)]
    rows = {
        "base": base,
        "above": [value + 0.1 for value in base],
        "noise": [value + 0.1 * (-1) ** seed for seed, value in enumerate(base)],
    }
    text = miniature.table("T", rows, {"above": "base", "noise": "base"})
    above, noise = text.strip().splitlines()[-2:]
    assert above.startswith("| above | 0.550 | 0.303 | 0.100 | 0.200 ")
    assert above.endswith("| +0.100 against base, p = 0.002 |")
    assert noise.endswith("| -0.000 against base, p = 1: not told apart |".replace("-0", "+0"))


def test_shuffled_rewards_stay_within_their_group(monkeypatch):
    """A group of 8 that is all right, and one with a single right answer."""
    texts = ["\\boxed{1}"] * 9 + ["\\boxed{2}"] * 7
    golds = ["1"] * 16
    places = set()
    for seed in range(50):
        random.seed(seed)
        rewards = miniature.shuffled([""] * 16, texts, golds)
        assert rewards[:8] == [1.0] * 8
        assert sum(rewards[8:]) == 1.0
        places.add(rewards.index(1.0, 8))
    assert places == {*range(8, 16)}
    assert accuracy_rewards([""] * 16, texts, golds)[8] == 1.0


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two seeds of one tiny part, in a folder of its own; returns the list of what is performed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / ".github").mkdir()
    for name in ("train.py", "eval.py", "grpo.py", "reward.py"):
        (tmp_path / name).symlink_to(miniature.ROOT / name)
    command = (
        "train.py --seed S --threads 1 --steps 1 --sft-steps 1 --eval-limit 2 --eval-samples 1"
    )
    part = miniature.Part("Tiny", {"tiny": command}, lambda seeds: f"\n{len(seeds)} seeds\n")
    monkeypatch.setattr(miniature, "PARTS", {"tiny": part, **miniature.PARTS})
    monkeypatch.setattr(miniature, "ROOT", tmp_path)
    monkeypatch.setattr(miniature, "RESULTS", tmp_path / "tests" / "RESULTS.md")
    performed = []
    perform = miniature.perform
    monkeypatch.setattr(miniature, "perform", lambda job: (performed.append(job), perform(job)))
    monkeypatch.setattr("sys.argv", ["miniature.py", "tiny", "--seeds", "2"])
    return performed


def test_runs_what_is_missing_goes_on_and_leaves_other_sections_alone(tiny, tmp_path, capsys):
    results = tmp_path / "tests" / "RESULTS.md"
    results.write_text("# Results\n\n## Memory\n\nas it was\n\n### more\n\n## Unknown\n\nkept\n")
    miniature.main()
    assert [job.words[2] for job in tiny] in (["0", "1"], ["1", "0"])
    text = results.read_text()
    titles = ["# Results", "## Tiny", "## Memory", "### more", "## Unknown"]
    assert re.findall("^#.*", text, re.M) == titles
    assert "\n2 seeds\n" in text and "\nas it was\n\n### more\n" in text
    assert "python train.py --seed S --threads 1" in text and "\nSeeds S from 0 to 1, on " in text

    tiny.clear()
    miniature.main()
    assert not tiny and "0 of 2 were missing" in capsys.readouterr().out
    assert results.read_text() == text

    run = tmp_path / "runs" / "miniature" / "tiny-1"  # stopped before its end
    (run / "summary.json").unlink()
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    miniature.main()
    assert [job.out for job in tiny] == [run]
    assert (run / "model.safetensors").read_bytes() == weights


def test_a_run_that_fails_is_named(tiny, tmp_path):
    (tmp_path / "runs" / "miniature" / "tiny-1").mkdir(parents=True)
    (tmp_path / "runs" / "miniature" / "tiny-1" / "run.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"tiny-1 ended with status 1: see .*tiny-1\.log"):
        miniature.main()
    assert not (tmp_path / "tests" / "RESULTS.md").exists()


def test_the_picture_of_a_step_shows_every_token_as_the_update_moved_it(tmp_path):
    """A model of random weights, and rewards as if one completion were right."""
    model, tokenizer = train.make_tiny_model(0, torch.device("cpu"))
    evaluation.save_model(model, tokenizer, tmp_path / "model")
    problem, tokens, rewards, batch, changes = one_step.take_step(tmp_path / "model", 3)
    assert len(tokens) == len(rewards) == len(changes) == 8
    changes = torch.where(torch.arange(8)[:, None] == 5, 1.0, -1.0).expand(batch.mask.shape)
    rewards = [float(row == 5) for row in range(8)]
    picture = one_step.draw(problem, tokens, rewards, batch, changes)
    names = [(node.tag.split("}")[1], node) for node in ElementTree.fromstring(picture)]
    fills = [node.get("fill") for name, node in names if name == "rect"]
    first = int(batch.mask[5].sum())
    assert len(fills) == batch.mask.sum()
    assert [one_step.colour(x) for x in (1, 0, -1)] == [
        "#2f9e44",
        "#f0f0f0",
        "#e03131",
    ]  # green, red
    assert set(fills[:first]) == {one_step.colour(1.0)}  # the one with a reward is drawn first
    assert set(fills[first:]) == {one_step.colour(-1.0)}
    words = [node.text for name, node in names if name == "text"]
    assert f"1. Question: {problem.question}   (the answer is {problem.answer})" in words
    assert "group: mean 0.125, std 0.354" in words
