"""The options, the loop and the files of a run. The slow end of the suite: here models are trained."""

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import train
from adapters import load_reward, micro_batches, score_rows, score_texts, token_logprobs
from eval import InputError, Problem, load_model, load_problems
from helpers import make_chat_model
from train import BUILTIN, Config, learning_rate, parse_config

SHORT = [
    "--sft-steps",
    "3",
    "--questions",
    "3",
    "--eval-limit",
    "4",
    "--eval-samples",
    "2",
    "--show-every",
    "0",
]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith("t_") and k not in ("tok_s", "mem_gb")}
        for row in rows
    ]


# --- Options ----------------------------------------------------------------------------------------


def test_defaults_for_real_models_are_the_papers():
    config = parse_config(["--model", "somewhere"])
    assert config == Config(model="somewhere")
    assert (config.lr, config.kl_beta, config.mu) == (1e-6, 0.04, 1)
    assert (config.questions, config.group_size, config.max_new_tokens, config.problems) == (
        32,
        8,
        512,
        "gsm8k",
    )


def test_built_in_defaults_give_way_to_flags():
    config = parse_config([])
    assert all(getattr(config, name) == value for name, value in BUILTIN.items())
    assert parse_config(["--lr", "0.5", "--mask-truncated"]) == dataclasses.replace(
        config, lr=0.5, mask_truncated=True
    )
    # They are those of the tiny model, whatever the problems: a model that is given has the defaults of real ones.
    assert parse_config(["--model", "m", "--problems", "arithmetic"]) == Config(
        model="m", problems="arithmetic"
    )
    # Harder problems have longer solutions, 6 tokens a line.
    for flags, limit in (
        ("arithmetic-6-99", 40),
        ("arithmetic-9-40", 54),
        ("arithmetic-9-40 --max-new-tokens 30", 30),
        ("arithmetic-9-40 --model m", 512),
    ):
        assert parse_config(["--problems", *flags.split()]).max_new_tokens == limit


def test_help_names_every_option_with_both_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "learning rate (paper: 1e-6) [1e-06; built-in: 0.0003]" in text


# --- Parts ------------------------------------------------------------------------------------------


def test_score_rows_lets_no_needless_padding_through(chat_folder, story_file):
    """What a model gets to see is as wide as the longest of the rows, and each prompt is among it once."""
    policy, batch = one_batch(Config(group_size=4, max_new_tokens=12), chat_folder, story_file)
    batch.mask[:, 9:] = False
    pad = lambda x: torch.nn.functional.pad(x, (3, 0))  # as if there were a longer prompt
    batch, shapes = (
        batch._replace(prompt_ids=pad(batch.prompt_ids), prompt_mask=pad(batch.prompt_mask)),
        [],
    )
    policy.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    logp, _, mask = score_rows(policy, [1, 2, 7], *batch[:4], 1.0)
    longest = max(batch.prompt_mask[0].sum(), batch.prompt_mask[1].sum()).item()
    assert shapes == [(2, longest), (3, 9)] and logp.shape == mask.shape == (3, 9)


def test_learning_rate_rises_and_falls_linearly():
    rates = [learning_rate(step, 12, 1.0, 4, 0.5) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == 0.5
    assert rates[4] - rates[5] == pytest.approx(0.5 / 7) and rates == sorted(rates[:5]) + sorted(
        rates[5:], reverse=True
    )
    assert [learning_rate(s, 3, 1.0, 0, 1.0) for s in range(3)] == [1.0, 1.0, 1.0]


def test_one_small_step_moves_nearly_all_weights(chat_folder, story_file):
    """In float32, a step of 1e-6 reaches the weights; in bf16 it would be rounded away."""
    moved, config = {}, Config(group_size=4, max_new_tokens=60, kl_beta=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = one_batch(config, chat_folder, story_file)
        model = model.to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        cuts = micro_batches(range(12), batch.prompt_mask, batch.mask, 10**6)
        update(model, batch, cuts, config, lr=1e-6, optimizer=optimizer)
        pairs = [
            (a, b)
            for a, b, p in zip(before, model.parameters(), model.parameters())
            if a.dim() == 2 and a.shape[1] < 300
        ]
        moved[dtype] = sum((a != b).sum().item() for a, b in pairs[1:]) / sum(
            a.numel() for a, _ in pairs[1:]
        )
    assert moved[torch.float32] > 0.9 and moved[torch.bfloat16] < 0.5


def one_batch(config, chat_folder, story_file):
    policy, tokenizer = load_model(str(chat_folder), torch.device("cpu"))
    torch.manual_seed(0)
    batch = train.sample_and_score(
        SimpleNamespace(sampler=policy, tokenizer=tokenizer),
        load_problems(str(story_file), "", "")[:3],
        config,
    )
    # A random model earns nothing, so give it some.
    return policy, batch._replace(advantages=by_token(batch, [1.0, -1.0, 0.5, -0.5] * 3))


def by_token(batch, advantages):
    """(N,) -> (N, T)"""
    return torch.tensor(advantages)[:, None].expand(batch.mask.shape)


def update(policy, batch, cuts, config, lr=0.1, optimizer=None):
    """train.update by plain gradient steps, without a reference."""
    run = SimpleNamespace(
        policy=policy,
        optimizer=optimizer or torch.optim.SGD(policy.parameters(), lr=1.0),
        phase="update",
        rows=[("", text) for text in batch.texts],
    )
    return train.update(run, batch, cuts, [None] * len(cuts), config, lr, contextlib.nullcontext)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_the_update_does_not_depend_on_micro_batches(
    chat_folder, story_file, aggregate, mask_truncated
):
    results = []
    for micro_tokens in (1, 400, 100_000):
        config = Config(
            group_size=4,
            max_new_tokens=12,
            micro_tokens=micro_tokens,
            aggregate=aggregate,
            mask_truncated=mask_truncated,
            kl_beta=0.0,
        )
        policy, batch = one_batch(config, chat_folder, story_file)
        batch = batch._replace(truncated=torch.tensor([False, True] * 6))
        cuts = micro_batches(range(12), batch.prompt_mask, batch.mask, micro_tokens)
        metrics = update(policy, batch, cuts, config)
        results.append((metrics, [p.detach().clone() for p in policy.parameters()], len(cuts)))
    assert [r[2] for r in results][0] == 12 and results[2][2] == 1
    for metrics, weights, _ in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5)
        for a, b in zip(weights, results[0][1]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_leaving_out_what_has_no_gradient_changes_nothing(chat_folder, story_file, aggregate):
    """Without a KL term, rows of advantage 0 may stay away from the update: the same loss, gradient and clip_share."""
    config = Config(group_size=4, max_new_tokens=12, kl_beta=0.0, aggregate=aggregate, mu=2)
    results = []
    for rows in (range(12), [4, 5, 6, 7, 8, 11]):
        policy, batch = one_batch(config, chat_folder, story_file)
        batch = batch._replace(
            advantages=by_token(batch, [0.0] * 4 + [1.0, -1.0, 0.5, -0.5] + [1.0, 0.0, 0.0, -1.0])
        )
        cuts = micro_batches(rows, batch.prompt_mask, batch.mask, 200)
        metrics = update(policy, batch, cuts, config)
        results.append(
            (
                {key: metrics[key] for key in ("loss", "clip_share", "grad_norm")},
                torch.cat([p.detach().flatten() for p in policy.parameters()]),
            )
        )
        policy, _ = one_batch(config, chat_folder, story_file)
        _, entropy = token_logprobs(
            policy, *batch[:4], 1.0
        )  # the mean is over the rows of the update
        assert metrics["entropy"] == pytest.approx(
            (entropy[rows].sum() / batch.mask[rows].sum()).item(), abs=1e-5
        )
    assert (
        results[0][0] == pytest.approx(results[1][0], abs=1e-6)
        and results[0][0]["grad_norm"] > 0.01
    )
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kl_beta, expected", [("0", 1), ("0.04", 16)])
def test_completions_without_a_gradient_are_left_out_only_if_there_is_no_kl_term(
    kl_beta, expected, tmp_path, monkeypatch
):
    """All rewards equal. One completion stays, so that Adam makes the step that it makes with gradient 0."""
    monkeypatch.setattr(
        train,
        "load_reward",
        lambda name: lambda prompts, completions, answer: [1.0] * len(completions),
    )
    seen, original = [], train.update
    monkeypatch.setattr(
        train,
        "update",
        lambda run, batch, cuts, *rest: (
            seen.append(sorted(sum(cuts, []))),
            original(run, batch, cuts, *rest),
        )[1],
    )
    train.main(
        f"--kl-beta {kl_beta} --steps 2 --sft-steps 0 --questions 4 --group-size 4 --eval-limit 4 --eval-samples 2 "
        f"--show-every 0 --device cpu --out {tmp_path / 'run'}".split()
    )
    assert seen == [list(range(expected))] * 2
    rows = rows_of(tmp_path / "run")[1:]
    assert [row["left_out"] for row in rows] == [1 - expected / 16] * 2 and [
        row["zero_var"] for row in rows
    ] == [1.0] * 2
    assert kl_beta != "0" or all(row["grad_norm"] == 0 for row in rows)


def test_a_batch_without_any_gradient_still_makes_adams_step(chat_folder, story_file):
    """Momentum goes on: with one completion left, the weights move as they do with all twelve."""
    config, weights = Config(group_size=4, max_new_tokens=8, kl_beta=0.0), []
    for rows in (range(12), [0]):
        policy, batch = one_batch(config, chat_folder, story_file)
        optimizer = torch.optim.AdamW(
            policy.parameters(), eps=1.0
        )  # so large that rounding is not blown up
        for chosen, advantages in (
            (range(12), batch.advantages),
            (rows, by_token(batch, [0.0] * 12)),
        ):
            weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
            cuts = micro_batches(chosen, batch.prompt_mask, batch.mask, 10**6)
            update(policy, batch._replace(advantages=advantages), cuts, config, optimizer=optimizer)
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(weights[1], weights[4]) and torch.equal(weights[2], weights[5])
    assert (weights[1] - weights[2]).abs().max() > 1e-4


def test_rows_that_are_truncated_leave_the_denominator(chat_folder, story_file):
    """Two of three rows are left out: the gradient is that of the third alone, not a third of it."""
    config = Config(group_size=4, max_new_tokens=8, kl_beta=0.0)
    policy, batch = one_batch(config, chat_folder, story_file)
    batch, norms = (
        batch._replace(
            advantages=by_token(batch, [1.0] * 12), truncated=torch.tensor([True] * 11 + [False])
        ),
        [],
    )
    for rows, masked in ((range(12), True), ([11], False)):
        part = (
            batch if masked else batch._replace(mask=batch.mask & (torch.arange(12) == 11)[:, None])
        )
        cuts = micro_batches(rows, batch.prompt_mask, batch.mask, 10**6)
        norms.append(
            update(policy, part, cuts, dataclasses.replace(config, mask_truncated=masked), lr=0.0)[
                "grad_norm"
            ]
        )
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.01


def test_each_update_begins_without_a_gradient(chat_folder, story_file):
    config = Config(group_size=4, max_new_tokens=8, kl_beta=0.0)
    policy, batch = one_batch(config, chat_folder, story_file)
    cuts = micro_batches(range(12), batch.prompt_mask, batch.mask, 300)
    first, second = (update(policy, batch, cuts, config, lr=0.0)["grad_norm"] for _ in range(2))
    assert first == pytest.approx(second, rel=1e-5) and first > 0.01


def test_each_completion_is_scored_with_its_own_gold(chat_folder, story_file, monkeypatch):
    """Question-major: the G completions of the first question, then those of the second."""
    asked = []
    monkeypatch.setattr(
        train,
        "load_reward",
        lambda name: (
            lambda prompts, completions, answer: (
                asked.append(list(zip(prompts, answer))),
                [0.0] * len(completions),
            )[1]
        ),
    )
    one_batch(Config(group_size=4, max_new_tokens=4), chat_folder, story_file)
    problems = load_problems(str(story_file), "", "")[:3]
    assert asked == [[(problem.question, problem.answer) for problem in problems for _ in range(4)]]


def test_old_logprobs_stay_those_before_the_first_update(chat_folder, story_file, monkeypatch):
    """mu = 3 passes: pi_old is recorded in the first and never again; every pass uses every row once."""
    config = Config(group_size=4, max_new_tokens=8, micro_tokens=300, mu=3, kl_beta=0.0)
    policy, batch = one_batch(config, chat_folder, story_file)
    cuts = micro_batches(range(12), batch.prompt_mask, batch.mask, 300)
    calls, original = [], train.grpo_loss

    def spy(logp, logp_old, *rest):
        calls.append((logp.detach().clone(), logp_old.clone(), logp_old.requires_grad))
        return original(logp, logp_old, *rest)

    monkeypatch.setattr(train, "grpo_loss", spy)
    update(policy, batch, cuts, config, lr=1.0)
    assert len(cuts) > 1 and len(calls) == 3 * len(cuts)
    first, second, third = (calls[i * len(cuts) : (i + 1) * len(cuts)] for i in range(3))
    for (a, old_a, grad_a), (b, old_b, _), (c, old_c, _) in zip(first, second, third):
        assert torch.equal(a, old_a) and not grad_a
        assert torch.equal(old_a, old_b) and torch.equal(old_a, old_c)
        assert not torch.equal(b, a) and not torch.equal(c, b)  # the policy itself has moved
    assert sum(len(a) for a, _, _ in first) == 12


# --- Runs -------------------------------------------------------------------------------------------


def parity_rewards(prompts, completions, answer):
    """A model that has seen three batches gets no answer right. This reward varies all the same."""
    return [float(len(text) % 2) for text in completions]


SHORT_RUN = [
    *SHORT,
    "--steps",
    "3",
    "--iterations",
    "2",
    "--eval-every",
    "2",
    "--mu",
    "2",
    "--lr-warmup",
    "0",
]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_reward", lambda name: parity_rewards)
        train.main([*SHORT_RUN, "--out", str(out)])
    return out


def test_a_run_leaves_complete_files(short_run):
    run, summary = (
        json.loads((short_run / name).read_text()) for name in ("run.json", "summary.json")
    )
    assert run["config"] == summary["config"] == dataclasses.asdict(Config(**run["config"]))
    assert run["config"]["seed"] == summary["seed"] == 0 and {
        "torch",
        "transformers",
        "python",
    } <= set(run["versions"])
    assert run["command"] == ["train.py", *SHORT_RUN, "--out", str(short_run)]
    for moment in ("before", "after"):
        assert set(summary[moment]) == {"in", "out"}
        for scores in summary[moment].values():
            assert {"sampled", "greedy", "maj@2", "pass@2", "n", "greedy_interval"} <= set(
                scores
            ) and scores["n"] == 4
    rows = rows_of(short_run)
    assert [row["step"] for row in rows] == list(range(7)) and [
        row["iteration"] for row in rows[1:]
    ] == [0, 0, 0, 1, 1, 1]
    assert all(set(train.COLUMNS) - {"right", "agree"} <= set(row) for row in rows[1:])
    assert ["eval" in row for row in rows] == [True, False, True, False, True, False, True]
    assert rows[0]["eval"] == summary["before"] and rows[-1]["eval"] == summary["after"]


def test_the_reference_is_the_policy_at_the_start_of_each_iteration(tmp_path, monkeypatch):
    """On CPU the KL is exactly 0 there, and not in between."""
    monkeypatch.setattr(train, "load_reward", lambda name: parity_rewards)
    train.main(
        [
            *SHORT,
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "3",
            "--iterations",
            "2",
            "--lr-warmup",
            "0",
        ]
    )
    rows = rows_of(tmp_path / "run")[1:]
    assert [row["kl"] == 0.0 for row in rows] == [True, False, False, True, False, False]
    assert all(row["kl"] >= 0 and row["gap"] < 1e-4 and row["grad_norm"] > 0 for row in rows)


def test_a_run_is_a_model_folder(short_run, tmp_path, capsys):
    for folder in (short_run, short_run / "sft"):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        assert {p.dtype for p in model.parameters()} == {
            torch.float32
        } and "<assistant>" in tokenizer.chat_template
    evaluation.main(
        [
            "--model",
            str(short_run),
            "--problems",
            "arithmetic",
            "--limit",
            "4",
            "--samples",
            "2",
            "--max-new-tokens",
            "40",
            "--out",
            str(tmp_path / "eval.json"),
        ]
    )
    scores = json.loads((tmp_path / "eval.json").read_text())["scores"]
    evaluation.main(
        [
            "--model",
            str(short_run),
            "--problems",
            "arithmetic",
            "--split",
            "out",
            "--limit",
            "2",
            "--samples",
            "0",
            "--out",
            str(tmp_path / "out.json"),
        ]
    )  # with every other default
    after = json.loads((short_run / "summary.json").read_text())["after"]["in"]
    assert json.loads(json.dumps(after)) == scores  # training and eval.py agree on the same model
    train.main(
        [
            *SHORT[2:],
            "--model",
            str(short_run),
            "--problems",
            "arithmetic",
            "--steps",
            "1",
            "--max-new-tokens",
            "40",
            "--out",
            str(tmp_path / "on"),
        ]
    )
    assert json.loads((tmp_path / "on" / "run.json").read_text())["config"]["sft_steps"] == 0
    assert (
        json.loads((tmp_path / "on" / "summary.json").read_text())["before"]["in"] == after
    )  # goes on from there


def test_same_seed_same_numbers(short_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_reward", lambda name: parity_rewards)
    for name, seed in (("same", 0), ("other", 1)):
        train.main([*SHORT_RUN, "--out", str(tmp_path / name), "--seed", str(seed)])
    assert without_clock(rows_of(tmp_path / "same")) == without_clock(rows_of(short_run))
    assert without_clock(rows_of(tmp_path / "other")) != without_clock(rows_of(short_run))


OWN_REWARD = r"""
import math
import re

with open(__file__ + ".runs", "a") as runs:
    runs.write("x")

WANTED = "5"

def fives(prompts, completions, answer, **kwargs):
    assert len(prompts) == len(completions) == len(answer) and kwargs == {}
    assert len(set(prompts)) > 1 and prompts == [prompt for prompt in prompts[::4] for _ in range(4)]   # question-major
    assert [str(sum(map(int, re.findall(r"[+-]?[0-9]+", prompt)))) for prompt in prompts] == answer
    return [math.sqrt(text.count(WANTED)) for text in completions]

def fussy(prompts, completions, answer):
    return [1 / (WANTED not in text) for text in completions]

def short(prompts, completions, answer):
    return [1.0]

def crowded(prompts, completions, answer):
    return [1.0, 2.0][:len(completions)]

def endless(prompts, completions, answer):
    return [float("inf") if WANTED in text else 0.0 for text in completions]
"""


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    """--reward FILE.py:FUNCTION is called with questions, completions and golds, and decides the advantages."""
    (tmp_path / "own.py").write_text(OWN_REWARD)
    batches, original = [], train.update
    monkeypatch.setattr(
        train,
        "update",
        lambda run, batch, *rest: batches.append(batch) or original(run, batch, *rest),
    )
    train.main(
        [
            *SHORT,
            "--sft-steps",
            "0",
            "--steps",
            "2",
            "--out",
            str(tmp_path / "run"),
            "--reward",
            f"{tmp_path / 'own.py'}:fives",
        ]
    )
    assert (tmp_path / "own.py.runs").read_text() == "x"  # the file is run once, not at every step
    for batch, row in zip(batches, rows_of(tmp_path / "run")[1:], strict=True):
        expected = torch.tensor([text.count("5") ** 0.5 for text in batch.texts])
        assert torch.equal(batch.rewards.flatten(), expected) and expected.max() > 0
        assert row["reward"] == pytest.approx(expected.mean().item())


def test_the_seconds_of_the_reward_are_not_those_of_sampling(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(completions, **kwargs):\n"
        "    time.sleep(0.7)\n    return [1.0] * len(completions)\n"
    )
    train.main(
        [
            *SHORT,
            "--steps",
            "1",
            "--out",
            str(tmp_path / "run"),
            "--reward",
            f"{tmp_path / 'slow.py'}:slow",
        ]
    )
    row = rows_of(tmp_path / "run")[1]
    assert row["t_reward"] >= 0.7 > row["t_sample"] > 0 and row["t_ref"] > 0 and row["t_update"] > 0


def test_sample_tokens_holds_for_training_and_evaluation(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        evaluation,
        "sample_groups",
        lambda model, ids, *rest, original=evaluation.sample_groups: (
            sizes.append(len(ids)),
            original(model, ids, *rest),
        )[1],
    )
    train.main(
        [
            *SHORT,
            "--steps",
            "1",
            "--sft-steps",
            "0",
            "--sample-tokens",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert (
        sizes == [1] * len(sizes) and len(sizes) == 3 + 2 * 2 * 2 * 4
    )  # questions; before/after, in/out, kinds, problems


@pytest.mark.parametrize("name, reason", [("fussy", "ZeroDivisionError"), ("endless", "inf")])
def test_a_reward_that_fails_names_the_completion_and_loses_nothing(name, reason, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    with pytest.raises(InputError, match=reason) as error:
        train.main(
            [
                *SHORT,
                "--steps",
                "9",
                "--out",
                str(tmp_path / "run"),
                "--reward",
                f"{tmp_path / 'own.py'}:{name}",
            ]
        )
    assert "\n" not in str(error.value) and "question '" in str(error.value)
    completion = str(error.value).partition(", completion ")[2]
    assert "5" in completion  # the one that caused it, not just the first of the batch
    assert (
        f"stopped; to go on: python train.py --resume {tmp_path / 'run'}" in capsys.readouterr().err
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]


@pytest.mark.parametrize("name", ["short", "crowded"])
def test_a_reward_that_fails_for_no_single_completion_is_named_too(name, tmp_path):
    (tmp_path / "own.py").write_text(OWN_REWARD)
    with pytest.raises(
        InputError,
        match="not one finite number for each completion.*; question 'q', completion 'a' of 3",
    ):
        score_texts(
            load_reward(f"{tmp_path / 'own.py'}:{name}"), [Problem("q", "1")] * 3, ["a", "b", "c"]
        )


def test_rewards_are_asked_for_with_the_gold_of_each_row():
    problems = [Problem(f"{n}?", str(n)) for n in range(3)]
    rows = [problem for problem in problems for _ in range(2)]
    texts = [f"\\boxed{{{n}}}" for n in (0, 1, 1, 1, 2, 0)]
    assert score_texts(load_reward(""), rows, texts) == [1, 0, 1, 1, 1, 0]


def test_the_end_of_a_run_sums_it_up(tmp_path, monkeypatch, capsys):
    """Rewards of 0.25, 0.5, 1 and 0.25 in the four steps; the commands printed are ones that work."""
    steps = iter([0.25, 0.5, 1.0, 0.25])
    monkeypatch.setattr(
        train,
        "load_reward",
        lambda name: lambda prompts, completions, answer: [next(steps)] * len(completions),
    )
    train.main(
        [
            *SHORT,
            "--sft-steps",
            "0",
            "--steps",
            "4",
            "--device",
            "cpu",
            "--request",
            "Go on.",
            "--reward",
            "own.py:rewards",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    *table, reward, told, evaluate, ask, further = capsys.readouterr().out.splitlines()[-13:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for line, (split, name) in zip(
        table, itertools.product(("in", "out"), ("sampled", "greedy", "maj@2", "pass@2"))
    ):
        before, after = (
            "{:.3f} ({:.3f} - {:.3f})".format(
                summary[when][split][name], *summary[when][split][f"{name}_interval"]
            )
            for when in ("before", "after")
        )
        assert line == f"{split:<3} {name:<8} {before} -> {after}"
    assert (
        reward == "reward ▁▃█▁  lowest 0.250, highest 1.000"
        and f"s. The model is in {tmp_path / 'run'}; to evaluate it" in told
    )
    config = parse_config(shlex.split(further)[2:])
    assert (config.model, config.problems, config.max_new_tokens, config.lr) == (
        str(tmp_path / "run"),
        "arithmetic",
        40,
        3e-4,
    )
    assert (config.request, config.reward) == ("Go on.", "own.py:rewards")
    evaluation.main(ask.split()[2:])
    assert (
        evaluate.split() == ["python", "eval.py", "--model", str(tmp_path / "run")]
        and ask.split()[-1] == "7+5-4"
    )


class Writer:
    """Stands in for TensorBoard's SummaryWriter."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.rows, self.flushed = folder, purge_step, [], 0
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def flush(self):
        self.flushed = len(self.rows)


def test_tensorboard_gets_every_number_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    train.main(
        [
            *SHORT,
            "--sft-steps",
            "0",
            "--steps",
            "2",
            "--tensorboard",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    writer, rows = Writer.last, rows_of(tmp_path / "run")
    assert (writer.folder, writer.purge_step) == (tmp_path / "run", 0) and writer.flushed == len(
        writer.rows
    )
    for row in rows:
        for name, value in row.items():
            assert not isinstance(value, float) or (name, value, row["step"]) in writer.rows
        for split in row.get("eval", {}):
            assert (f"{split}/sampled", row["eval"][split]["sampled"], row["step"]) in writer.rows
    assert all(isinstance(value, float) for _, value, _ in writer.rows)


def test_without_the_package_tensorboard_is_one_line(tmp_path, monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # to import it fails
    monkeypatch.setattr(sys, "argv", ["train.py", "--tensorboard", "--out", str(tmp_path / "run")])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        evaluation.run_cli(train.main)
    assert re.fullmatch(
        "error: .*tensorboard.*; pip install tensorboard", stop.value.code
    ) and not list(tmp_path.iterdir())


def test_runs_take_the_next_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*SHORT, "--steps", "0", "--sft-steps", "1"])
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "arithmetic-0",
        "arithmetic-0-2",
    ]


def test_the_bf16_path(tmp_path, monkeypatch):
    """What a GPU does, on the CPU: float32 master weights, a bf16 copy that samples, bf16 autocast, a bf16 reference."""
    seen, copied, deepcopy = set(), [], train.copy.deepcopy

    def copying(model):  # first the policy, for the sampler; then the sampler, for the reference
        copied.append(next(model.parameters()).dtype)
        return deepcopy(model)

    monkeypatch.setattr(train, "copy", SimpleNamespace(deepcopy=copying))
    monkeypatch.setattr(train, "pick_device", lambda name: (torch.device("cpu"), True))
    monkeypatch.setattr(train, "load_reward", lambda name: parity_rewards)
    monkeypatch.setattr(
        train,
        "sample_problems",
        lambda model, *rest, original=train.sample_problems: (
            seen.add(next(model.parameters()).dtype),
            original(model, *rest),
        )[1],
    )
    monkeypatch.setattr(
        train,
        "grpo_loss",
        lambda *tensors, original=train.grpo_loss: (
            seen.add((tensors[0].dtype, tensors[1].dtype, tensors[2].dtype)),
            original(*tensors),
        )[1],
    )
    train.main(
        [
            *SHORT,
            "--sft-steps",
            "0",
            "--steps",
            "4",
            "--iterations",
            "2",
            "--lr-warmup",
            "0",
            "--eval-every",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    assert copied == [torch.float32, torch.bfloat16]
    assert seen == {torch.bfloat16, (torch.float32,) * 3}
    rows = rows_of(tmp_path / "run")[1:]
    assert all(0 < row["gap"] < 0.1 for row in rows)  # the copy is renewed at every step
    kl = [row["kl"] for row in rows]  # the reference at the start of each iteration
    assert (
        all(0 <= kl[step] < 1e-3 for step in (0, 4)) and kl[3] > 10 * kl[0] and kl[7] > 10 * kl[4]
    )
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()["lm_head.weight"]
    assert weights.dtype == torch.float32 and not torch.equal(weights, weights.bfloat16().float())


@pytest.mark.parametrize(
    "flags",
    [
        ["--kl-beta", "0"],
        ["--aggregate", "token", "--clip-high", "0.28"],
        ["--activation-checkpointing"],
        ["--aggregate", "constant", "--scale-rewards", "none"],
        ["--mask-truncated", "--max-new-tokens", "9"],
    ],
)
def test_variants_run_through(flags, tmp_path, monkeypatch):
    copies, deepcopy = [], train.copy.deepcopy
    monkeypatch.setattr(
        train,
        "copy",
        SimpleNamespace(deepcopy=lambda model: copies.append(model) or deepcopy(model)),
    )
    monkeypatch.setattr(train, "load_reward", lambda name: parity_rewards)
    if "--mask-truncated" in flags:  # let nothing ever end
        monkeypatch.setattr(evaluation, "eos_token_ids", lambda *_: set())
    train.main([*SHORT, "--steps", "2", "--out", str(tmp_path / "run"), *flags])
    rows = rows_of(tmp_path / "run")[1:]
    assert all(
        value == value and abs(value) != float("inf")
        for row in rows
        for value in row.values()
        if isinstance(value, float)
    )
    if "--mask-truncated" in flags:  # so there is nothing to learn from
        assert all(
            row["truncated"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0 for row in rows
        )
    assert len(copies) == ("--kl-beta" not in flags)  # --kl-beta 0 loads no reference


def test_the_gap_is_logged_with_its_spread(tmp_path, monkeypatch):
    """Its mean, what one token in 1,000 exceeds, and its maximum, where the trainer is off by known amounts."""
    differences, generator = [], torch.Generator().manual_seed(0)

    def score_badly(*arguments, original=train.score_rows):
        logp, entropy, mask = original(*arguments)
        noise = 0.01 * torch.randn(logp.shape, generator=generator)
        differences.append(noise[mask].abs())
        return logp + noise, entropy, mask

    monkeypatch.setattr(train, "score_rows", score_badly)
    monkeypatch.setattr(train, "load_reward", lambda name: parity_rewards)
    train.main(
        [
            *SHORT,
            "--sft-steps",
            "0",
            "--steps",
            "1",
            "--questions",
            "9",
            "--kl-beta",
            "0",
            "--micro-tokens",
            "1000",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    row, found = rows_of(tmp_path / "run")[1], torch.cat(differences).sort().values
    assert len(differences) > 2 and len(found) > 2000
    assert row["gap"] == pytest.approx(found.mean().item(), rel=1e-3) and row[
        "gap_max"
    ] == pytest.approx(found[-1].item(), rel=1e-3)
    above = (found > row["gap_999"] + 1e-6).sum().item()
    assert 0.0005 < above / len(found) <= 0.001 and row["gap_999"] < row["gap_max"]


@pytest.mark.parametrize("size, parameters", [(1, 211_264), (2, 1_078_144), (6, 18_966_144)])
def test_the_built_in_model_grows(size, parameters):
    """Wider and deeper, its weights smaller, so that what it says at the start stays as uncertain."""
    model, tokenizer = train.make_tiny_model(Config(size=size), torch.device("cpu"))
    assert model.num_parameters() == parameters
    logits = model(torch.tensor([tokenizer("7+5-4\n").input_ids])).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert 4.3 < entropy < 4.71  # at most log 111
    assert evaluation.cache_gap(model) < 1e-4


def test_truncated_completions_draw_a_warning(capsys):
    for truncated, warned in ((0.4, False), (0.6, True)):
        train.print_metrics(
            dict.fromkeys(train.COLUMNS, 0) | {"truncated": truncated}, heading=False
        )
        assert (
            "60% of the completions hit the limit: raise --max-new-tokens?"
            in capsys.readouterr().out
        ) == warned


def test_a_real_looking_model_on_stories(chat_folder, story_file, tmp_path, capsys):
    arguments = [
        "--model",
        str(chat_folder),
        "--problems",
        str(story_file),
        "--steps",
        "2",
        "--questions",
        "2",
        "--group-size",
        "4",
        "--max-new-tokens",
        "16",
        "--eval-samples",
        "2",
        "--show-every",
        "1",
    ]
    train.main([*arguments, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "gold:" in printed and "advantage" in printed
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3 and all(row["gap"] < 1e-4 and row["zero_var"] == 1 for row in rows[1:])
    assert rows[0]["eval"]["in"]["n"] == 2  # a tenth of twelve problems, rounded up
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    # Supervised warm-up on the solutions of the file takes the same way.
    train.main([*arguments, "--sft-steps", "2", "--out", str(tmp_path / "warm")])
    assert (tmp_path / "warm" / "sft" / "model.safetensors").exists()


def test_a_hostile_generation_config_does_not_stop_a_run(tmp_path, story_file):
    folder = make_chat_model(tmp_path / "model")
    hostile = json.loads((folder / "generation_config.json").read_text())
    hostile.update(
        top_k=1,
        top_p=0.1,
        temperature=0.01,
        repetition_penalty=9.0,
        max_new_tokens=1,
        do_sample=False,
    )
    (folder / "generation_config.json").write_text(json.dumps(hostile))
    train.main(
        [
            "--model",
            str(folder),
            "--problems",
            str(story_file),
            "--steps",
            "1",
            "--questions",
            "2",
            "--group-size",
            "4",
            "--max-new-tokens",
            "16",
            "--eval-samples",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert len(saved["eos_token_id"]) == 2 and not {
        "top_k",
        "top_p",
        "temperature",
        "repetition_penalty",
    } & set(saved)
    (row,) = rows_of(tmp_path / "run")[1:]
    assert row["gap"] < 1e-4 and row["length"] > 2 and row["entropy"] > 1


@pytest.fixture(scope="module")
def learning_run(tmp_path_factory):
    """The default run, shortened: 32 of 60 steps, smaller evaluations."""
    out = tmp_path_factory.mktemp("learning") / "run"
    train.main(
        [
            "--out",
            str(out),
            "--steps",
            "32",
            "--eval-every",
            "0",
            "--eval-limit",
            "60",
            "--show-every",
            "0",
        ]
    )
    return out


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(learning_run, tmp_path):
    """With batches as large as those of the default run: small ones do not show in which order threads add gradients."""
    weights = []
    for name in "ab":
        train.main(
            [
                "--model",
                str(learning_run / "sft"),
                "--problems",
                "arithmetic",
                "--questions",
                "16",
                "--max-new-tokens",
                "40",
                "--steps",
                "2",
                "--lr",
                "1e-4",
                "--supervision",
                "process",
                "--eval-every",
                "0",
                "--eval-limit",
                "1",
                "--eval-samples",
                "1",
                "--show-every",
                "0",
                "--out",
                str(tmp_path / name),
            ]
        )
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def gain(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return summary["after"]["in"]["sampled"] - summary["before"]["in"]["sampled"]


def test_grpo_learns(learning_run):
    rewards = [row["reward"] for row in rows_of(learning_run)[1:]]
    assert sum(rewards[:5]) / 5 < 0.4 and sum(rewards[-5:]) / 5 > 0.7
    assert gain(learning_run) > 0.4


def test_what_was_trained_answers_a_question(learning_run, capsys):
    evaluation.main(["--model", str(learning_run), "--ask", "7+5-4"])
    assert capsys.readouterr().out == "7+5=12\n12-4=8\n\\boxed{8}\n"


def test_shuffled_rewards_teach_nothing(learning_run, tmp_path):
    """The control: the same start and settings, rewards shuffled within each group, by the README's few lines.

    Its expected gain is 0, but a single run wanders by some 4 points, so two seeds are averaged.
    """
    gains, readme = [], (Path(train.__file__).parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```\n(import random\n.*?)```", readme, re.S)
    (tmp_path / "control.py").write_text(code)
    for seed in (0, 1):
        settings = {
            **BUILTIN,
            "model": learning_run / "sft",
            "out": tmp_path / str(seed),
            "seed": seed,
            "steps": 20,
            "eval_every": 0,
            "eval_limit": 60,
            "show_every": 0,
            "sft_steps": 0,
        }
        train.main(
            [
                "--reward",
                f"{tmp_path / 'control.py'}:shuffled",
                *(
                    str(x)
                    for name, value in settings.items()
                    for x in ("--" + name.replace("_", "-"), value)
                ),
            ]
        )
        gains.append(gain(tmp_path / str(seed)))
    assert sum(gains) / 2 < 0.05, gains
