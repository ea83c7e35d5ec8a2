"""What make_assignment.py writes: blanks or one bug, and tests that fail for these alone."""

import ast

import make_assignment
import pytest
from make_assignment import ROOT, STAY, blank, functions, public_functions
from test_mutants import MUTANTS

SOURCE = (ROOT / "grpo.py").read_text(encoding="utf-8")
PUBLIC = public_functions(SOURCE)
HELPERS = ["logp_and_entropy", "forward", "at_least_float32", "preallocate"]


@pytest.mark.parametrize("names, gone", [(PUBLIC, 4), (["token_logprobs"], 1), (PUBLIC[:1], 0)])
def test_signature_and_docstring_stay_and_the_body_goes(names, gone):
    """A helper that only a blank function uses goes as well, and nothing else does."""
    before = functions(SOURCE)
    after = functions(blank(SOURCE, names))
    assert {*before} == {*PUBLIC, *HELPERS}
    assert [name for name in before if name not in after] == HELPERS[:gone]
    for name, node in after.items():
        if name in names:
            line = f'raise NotImplementedError("{name} is yours to write")'
            before[name].body[1:] = ast.parse(line).body
        assert ast.dump(node) == ast.dump(before[name]) and ast.get_docstring(node)


def test_no_other_function_gives_the_advantages_away():
    for piece in (".std(", "+ STD_EPSILON"):
        assert SOURCE.count(piece) == 1 and piece not in blank(SOURCE, ["outcome_advantages"])


@pytest.mark.slow
def test_exactly_the_tests_of_a_blank_function_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_assignment, "FILES", ["tests/test_objective.py"])
    course = tmp_path / "course"
    make_assignment.main([str(course), "--functions", "kl_estimate,process_advantages"])
    assert "fail there: just those that call a blank function" in capsys.readouterr().out
    assert not {path.name for path in (course / "tests").iterdir()} & set(STAY)


@pytest.mark.parametrize("number", [1, 28, 34, len(MUTANTS)])
def test_a_bug_is_planted_and_nothing_tells(number, tmp_path):
    make_assignment.main([str(tmp_path / "bug"), "--bug", str(number)])
    script = MUTANTS[number - 1][1].partition(".")[0] + ".py"
    assert not (tmp_path / "bug" / "tests").exists()
    for name in make_assignment.SCRIPTS:
        before = (ROOT / name).read_text(encoding="utf-8").splitlines()
        after = (tmp_path / "bug" / name).read_text(encoding="utf-8").splitlines()
        assert len({*before} ^ {*after}) in ((1, 2, 3, 4) if name == script else (0,))


@pytest.mark.parametrize("words, message", [("--bug 0", "1 to"), ("--functions kl", "no function")])
def test_bad_arguments_are_one_line_and_leave_nothing(words, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        make_assignment.main([str(tmp_path / "new"), *words.split()])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        make_assignment.main([str(tmp_path)])
