"""What make_assignment.py writes: blanks where they should be, one bug where it should be, tests that fail for that alone."""

import ast
import difflib

import pytest

import make_assignment
from make_assignment import ROOT, blank, public_functions
from test_mutants import MUTANTS

SOURCE = (ROOT / "grpo.py").read_text(encoding="utf-8")


def outlines(source):
    """name -> (signature, docstring, body without it) of the functions of a module."""
    return {
        node.name: (ast.unparse(node.args), ast.get_docstring(node), ast.unparse(node.body[1:]))
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(
    "names",
    [public_functions(SOURCE), ["kl_estimate"], ["outcome_advantages"]],
    ids=["all", "one", "half"],
)
def test_signature_and_docstring_stay_and_the_body_goes(names):
    before, after = outlines(SOURCE), outlines(blank(SOURCE, names))
    for name in public_functions(SOURCE):
        assert after[name][:2] == before[name][:2] and before[name][1]
        assert after[name][2] == (
            f"raise NotImplementedError('{name} is yours to write')"
            if name in names
            else before[name][2]
        )
    # Helpers of blank functions alone would give the solution away; others are still needed.
    helpers = {name for name in before if name[0] == "_"}
    assert helpers & set(after) == (set() if len(names) > 1 else helpers) and len(helpers) == 2
    assert SOURCE.count("# ---") == blank(SOURCE, names).count("# ---")


@pytest.mark.slow
def test_exactly_the_tests_of_a_blank_function_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_assignment, "FILES", ["test_objective.py"])
    make_assignment.main(
        [str(tmp_path / "course"), "--functions", "kl_estimate,process_advantages"]
    )
    assert "tests fail: exactly those that call a blank function" in capsys.readouterr().out
    assert (
        not {path.name for path in (tmp_path / "course" / "tests").iterdir()} & make_assignment.STAY
    )


@pytest.mark.parametrize(
    "failed, message",
    [
        (["a"], "1 tests pass, and call something blank: b"),
        (["a", "b", "c"], "1 tests fail, and call nothing blank: c"),
    ],
)
def test_tests_that_fail_for_another_reason_are_named(failed, message, monkeypatch):
    calls = {"a": ["grpo_loss"], "b": ["kl_estimate"], "c": []}
    monkeypatch.setattr(
        make_assignment,
        "watch",
        lambda project, names, files: (calls, [] if project == ROOT else failed),
    )
    with pytest.raises(SystemExit, match=message):
        make_assignment.check("course", ["kl_estimate"])


@pytest.mark.parametrize("number", [1, 28, 34, len(MUTANTS)])
def test_a_bug_is_planted_and_nothing_tells(number, tmp_path):
    make_assignment.main([str(tmp_path / "bug"), "--bug", str(number)])
    _, module, right, wrong, _ = MUTANTS[number - 1]
    assert not (tmp_path / "bug" / "tests").exists()
    for name in make_assignment.SCRIPTS:
        before, after = (
            (folder / name).read_text(encoding="utf-8") for folder in (ROOT, tmp_path / "bug")
        )
        assert (
            (before.replace(right, wrong) == after != before)
            if name == f"{module}.py"
            else before == after
        )
        assert (
            sum(line[0] in "+-" for line in difflib.ndiff(before.splitlines(), after.splitlines()))
            <= 4
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--bug 0", "take 1 to"),
        ("--bug 99", "take 1 to"),
        ("--functions kl,grpo_loss", "grpo.py has no function kl;"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        make_assignment.main([str(tmp_path / "new"), *arguments.split()])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        make_assignment.main([str(tmp_path)])
