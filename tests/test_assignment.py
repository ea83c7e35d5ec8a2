"""What make_assignment.py writes: blanks or one bug, and tests that are skipped for these alone."""

import ast

import make_assignment
import pytest
from course import PARTS, ROOT, SCRIPTS, STAY, VARIANTS, copy_project, vary
from helpers import parity_reward, short_run
from make_assignment import functions, write_blanks
from test_mutants import FLAGS, MUTANTS, mistake

NAMES = [part.partition(".")[2] for part in PARTS]
HELPERS = {
    "grpo.py": ["logp_and_entropy", "forward", "at_least_float32", "preallocate"],
    "reward.py": ["_last_marked_line", "_up_to_closing_brace"],
    "train.py": [],
}


def scripts(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in HELPERS}


@pytest.mark.parametrize("names, gone", [(NAMES, 5), (["token_logprobs"], 1), (["kl_estimate"], 0)])
def test_signature_and_docstring_stay_and_the_body_goes(names, gone, tmp_path):
    """A helper that only a blank function uses goes as well, and nothing else does."""
    copy_project(tmp_path / "fork", 0, STAY)
    write_blanks(tmp_path / "fork", names)
    removed = []
    for script, source in scripts(tmp_path / "fork").items():
        before = functions((ROOT / script).read_text(encoding="utf-8"))
        after = functions(source)
        removed += [name for name in before if name not in after]
        assert [name for name in before if name in HELPERS[script]] == HELPERS[script]
        for name, node in after.items():
            if name in names:
                line = f'raise NotImplementedError("{name} is yours to write")'
                before[name].body[1:] = ast.parse(line).body
            assert ast.dump(node) == ast.dump(before[name])
            assert ast.get_docstring(node) or name not in names
    assert len(removed) == gone and set(removed) <= {*HELPERS["grpo.py"], *HELPERS["reward.py"]}


def test_a_short_assignment_has_no_hints_on_other_functions(tmp_path):
    make_assignment.write_handout(tmp_path, ["grpo.kl_estimate", "grpo.token_logprobs"], 0)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`sample_groups` and `token_logprobs` use the cache" in text
    assert "`extract_answer`" not in text and "`sample_batch`" not in text
    assert "tests/adapters.py" in text and "15 points for these" in text


def test_none_writes_the_solution(tmp_path):
    make_assignment.main([str(tmp_path / "solution"), "--functions", "none", "--variant", "2"])
    for name in SCRIPTS:
        text = vary((ROOT / name).read_text(encoding="utf-8"), 2)
        assert (tmp_path / "solution" / name).read_text(encoding="utf-8") == text


def test_no_other_function_gives_the_advantages_away(tmp_path):
    copy_project(tmp_path / "fork", 0, STAY)
    write_blanks(tmp_path / "fork", ["outcome_advantages"])
    before = (ROOT / "grpo.py").read_text(encoding="utf-8")
    for piece in (".std(", "+ STD_EPSILON"):
        assert before.count(piece) == 1 and piece not in scripts(tmp_path / "fork")["grpo.py"]


@pytest.mark.slow
def test_exactly_the_tests_of_a_blank_function_are_skipped(tmp_path, capsys):
    course = tmp_path / "course"
    make_assignment.main([str(course), "--functions", "kl_estimate,extract_answer"])
    assert "skipped there: those that call a blank function" in capsys.readouterr().out
    assert not {path.name for path in (course / "tests").iterdir()} & set(STAY)
    handout = (course / "README.md").read_text(encoding="utf-8")
    assert (
        "| 1 | `kl_estimate` | grpo.py |" in handout and "12 points for these functions" in handout
    )


@pytest.mark.parametrize("variant", range(1, len(VARIANTS)))
def test_a_variant_changes_every_name_everywhere(variant, tmp_path):
    """All scripts still compile; tests of a variant: test_grade.py."""
    copy_project(tmp_path / "fork", variant, STAY)
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "fork").rglob("*.py")]
    for text in texts:
        ast.parse(text)
        for name in ("STD_EPSILON", "MAX_LOG_RATIO", "clip_low", "clip-low", "clip_high"):
            assert name not in text.replace("STD_EPSILON_", "")
    assert any(VARIANTS[variant]["clip_low"] in text for text in texts)


@pytest.mark.parametrize(
    "names, fault",
    [
        ({"kl_estimate": "kl_guess"}, "kl_estimate is a function to write"),
        ({"Y" * 9: "clip_under"}, "YYY occurs nowhere"),
        ({"clip_low": "advantages"}, "advantages occurs already"),
        (
            {"STD_EPSILON": "X" * 9, "STD_EPSILON = 1e-4": "STD_EPSILON = 2e-4"},
            "has to stand before",
        ),
    ],
)
def test_a_variant_that_would_not_work_is_refused(names, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(make_assignment, "VARIANTS", [{}, names])
    with pytest.raises(SystemExit, match=fault):
        make_assignment.main([str(tmp_path / "new"), "--variant", "1"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("number", [1, 24, 30, max(FLAGS)])
def test_a_bug_is_planted_and_the_flags_are_printed(number, variant, tmp_path, capsys):
    make_assignment.main([str(tmp_path / "bug"), "--bug", str(number), "--variant", str(variant)])
    what, function, *_ = MUTANTS[number - 1]
    script = function.partition(".")[0] + ".py"
    printed = capsys.readouterr().out
    assert f"python train.py {vary(FLAGS[number], variant)}".strip() in printed
    assert f"{function}: {what}" in printed
    assert not (tmp_path / "bug" / "tests").exists()
    for name in SCRIPTS:
        before = vary((ROOT / name).read_text(encoding="utf-8"), variant).splitlines()
        after = (tmp_path / "bug" / name).read_text(encoding="utf-8").splitlines()
        assert len({*before} ^ {*after}) in ((1, 2, 3, 4) if name == script else (0,))


def odd_reward(prompts, completions, answer):
    """Earn 1.0 or 0.0 about equally often, untaught, in a way that depends on the gold, too."""
    pairs = zip(completions, answer, strict=True)
    return [float((len(text) + int(gold)) % 2) for text, gold in pairs]


def printed(rows):
    """Return the columns of the log, as far as they are printed."""
    clock = ("tok_s", "seconds", "eval", "gap", "gap_999", "gap_max")
    return [
        {
            name: f"{value:.4g}"
            for name, value in row.items()
            if name[:2] != "t_" and name not in clock
        }
        for row in rows
    ]


@pytest.mark.slow
def test_bugs_that_are_offered_show_in_a_run(tmp_path):
    """A run of seconds with the flags prints other numbers than without the bug."""
    hidden = []
    for number, flags in FLAGS.items():
        words = f"--sft-steps 2 --steps 4 --lr 1e-3 {flags}"
        what, function, _, *pieces = MUTANTS[number - 1]
        reward = odd_reward if "gold" in what else parity_reward
        right, _ = short_run(tmp_path / f"right-{number}", words, reward=reward)
        with mistake(function, *pieces):
            wrong, _ = short_run(tmp_path / f"wrong-{number}", words, reward=reward)
        if printed(right) == printed(wrong):
            hidden.append(what)
    assert not hidden


@pytest.mark.parametrize(
    "words, message", [("--bug 5", "shows in no run"), ("--functions kl", "no function kl")]
)
def test_bad_arguments_are_one_line_and_leave_nothing(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        make_assignment.main([str(tmp_path / "new"), *words.split()])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        make_assignment.main([str(tmp_path)])
