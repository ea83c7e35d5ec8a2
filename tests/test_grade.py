"""grade.py: what a solution earns, that one mistake costs once, and that tricks earn nothing."""

import ast
import json
import shutil

import grade
import pytest
from course import BLANK, PARTS, ROOT, SCRIPTS, VARIANTS, copy_project
from grade import grade_part
from make_assignment import functions, write_blanks
from rules import ALLOWED, IMPORTS, broken_rule, copied_tests, imported_modules
from test_mutants import MUTANTS, plant

KL = "grpo.kl_estimate"


@pytest.fixture(autouse=True)
def one_right_run(monkeypatch):
    """Each run takes a process with its imports, seconds."""
    monkeypatch.setattr(grade, "RIGHT_RUNS", 1)


@pytest.fixture
def solution(tmp_path):
    """Return a folder with a right solution: our own scripts."""
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    return tmp_path


def rewrite(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_points_add_up_to_100_and_each_part_has_tests():
    assert sum(part.points for part in PARTS.values()) == 100
    for name, part in PARTS.items():
        module, _, function = name.partition(".")
        assert function in functions((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        assert (ROOT / "tests" / f"test_{part.tests.split()[0]}.py").exists()


def test_a_right_solution_a_blank_and_a_mistake(solution, tmp_path):
    """The blank costs its own points only: grpo_loss, which calls it, is graded with ours."""
    right = grade.grade(solution, parts=["reward.accuracy_reward"])
    assert [points for points, _ in right.values()] == [2]
    write_blanks(solution, ["kl_estimate"])
    assert grade_part(KL, solution, 0)[0] == 0
    assert grade_part("grpo.grpo_loss", solution, 0)[0] == 10
    line = 'raise NotImplementedError("kl_estimate is yours to write")'
    rewrite(solution / "grpo.py", line, "return logp - logp_ref")
    points, text = grade_part(KL, solution, 0)
    assert 0 < points < 2.5 and "test_kl_estimate_and_its_gradient_by_hand" in text


TRICKS = {
    "while True:\n    pass": "took more than 8 CPU seconds",
    "import time": "imports time",
    "raise SystemExit(0)": "cannot be imported: SystemExit",
    "import posix\nposix._exit(0)": "imports posix",
    "torch.testing.assert_close = print": "changes the module torch",
    "exec('import os')": "calls exec",
    "().__class__": "uses __class__",
    "print('115 passed')\ndef kl_estimate(logp, logp_ref):\n    return logp": "tests fail",
    "def (": "cannot be read",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_hostile_submissions_earn_next_to_nothing(trick, solution, monkeypatch):
    if "while" in trick:
        monkeypatch.setattr(grade, "CPU_LIMIT", 8)
    with (solution / "grpo.py").open("a", encoding="utf-8") as script:
        script.write(f"\n{trick}\n")
    (solution / "tests").mkdir()  # edited tests play no part
    (solution / "tests" / "test_objective.py").write_text("def test_loss():\n    pass\n")
    points, text = grade_part(KL, solution, 0)
    assert points <= PARTS[KL].points / 4 and TRICKS[trick] in text


def test_a_process_that_sleeps_is_ended(solution, monkeypatch):
    """train.py imports time, so the rules cannot see it."""
    monkeypatch.setattr(grade, "LIMIT", 10)
    with (solution / "train.py").open("a", encoding="utf-8") as script:
        script.write("\ntime.sleep(1000)\n")
    points, text = grade_part("train.update", solution, 0)
    assert points == 0 and "took more than 10 seconds: is this machine busy?" in text


def test_a_function_that_ends_the_process_earns_nothing(solution):
    """train.py imports os, so the rules cannot see it."""
    rewrite(
        solution / "train.py",
        "    total_weight = batch",
        "    os._exit(0)\n    total_weight = batch",
    )
    assert grade_part("train.update", solution, 0) == (0, "its process ended before the tests did")


def test_our_own_solution_cannot_be_called(solution):
    """It is blank in the copy where the part is graded."""
    with (solution / "train.py").open("a", encoding="utf-8") as script:
        script.write("\ndef update(*args):\n    return load_reward('train.py:update')(*args)\n")
    assert grade_part("train.update", solution, 0)[0] <= 1


def test_our_own_scripts_keep_the_rules():
    for script, names in IMPORTS.items():
        modules = imported_modules(ast.parse((ROOT / script).read_text(encoding="utf-8")))
        assert modules - ALLOWED == set(names.split())
        assert broken_rule(ROOT / script) == ""
    assert broken_rule(ROOT / "tests" / "test_objective.py") == ""


def test_a_constant_reward_earns_half_at_most(solution):
    """There are tests that ask for 1.0, beside those that ask for 0.0."""
    line = f'raise NotImplementedError("accuracy_reward {BLANK}")'
    for constant in ("0.0", "1.0"):
        write_blanks(solution, ["accuracy_reward"])
        rewrite(solution / "reward.py", line, f"return {constant}")
        assert 0 <= grade_part("reward.accuracy_reward", solution, 0)[0] <= 1
        shutil.copy(ROOT / "reward.py", solution)


def test_a_blank_that_its_caller_hides_earns_nothing(solution):
    write_blanks(solution, ["extract_answer"])
    assert grade_part("reward.extract_answer", solution, 0)[0] == 0


def test_a_variant_fails_last_years_solution_and_passes_its_own(solution, tmp_path):
    part = "grpo.outcome_advantages"
    assert "fail" in grade_part(part, solution, 1)[1]
    copy_project(tmp_path / "new", 1)
    assert grade_part(part, tmp_path / "new", 1)[0] == 8
    assert grade.variant_of(solution) == 0 and grade.variant_of(tmp_path / "new") == 1
    write_blanks(tmp_path / "new", [part.partition(".")[2] for part in PARTS])
    assert grade.variant_of(tmp_path / "new") == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", range(1, len(VARIANTS)))
def test_a_variant_costs_last_years_solution_a_third(variant, solution, tmp_path):
    copy_project(tmp_path / "new", variant)
    assert sum(points for points, _ in grade.grade(tmp_path / "new", variant).values()) == 100
    assert sum(points for points, _ in grade.grade(solution, variant).values()) < 67


def test_reports(solution, tmp_path, capsys):
    results = {KL: (5.0, "37 tests"), "grpo.grpo_loss": (4.5, "2 of 38 tests fail: a, b")}
    grade.write_gradescope(tmp_path / "results.json", results)
    grade.write_junit(tmp_path / "junit.xml", results)
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert [test["score"] for test in tests] == [5.0, 4.5] and tests[1]["max_score"] == 10
    xml = (tmp_path / "junit.xml").read_text()
    assert xml.count("<testcase") == 2 and xml.count("<failure") == 1
    with pytest.raises(SystemExit, match="holds no grpo.py"):
        grade.main([str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="--bugs are numbers from 1 to"):
        grade.main(["--tests", "mine.py", "--bugs", "12,0"])
    with pytest.raises(SystemExit, match="name the folder of a solution, or --tests"):
        grade.main([])


def test_some_functions_and_a_file_of_tests_are_graded_together(solution, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import os")
    out = tmp_path / "results.json"
    files = ["--tests", str(tmp_path / "mine.py"), "--gradescope", str(out)]
    grade.main([str(solution), "--functions", "kl_estimate", *files])
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].split() == ["tests", "0.0", "of", "25", "mine.py", "imports", "os"]
    assert last[1].split() == ["sum", "5.0", "of", "30"]
    tests = json.loads(out.read_text())["tests"]
    assert [test["max_score"] for test in tests] == [5, 25]


def test_a_submission_in_another_variant_is_noted(solution, capsys):
    grade.main([str(solution), "--functions", "none", "--variant", "0"])
    assert "note:" not in capsys.readouterr().out
    grade.main([str(solution), "--functions", "none", "--variant", "1"])
    assert "has the names of --variant 0" in capsys.readouterr().out


MINE = """
import torch
from adapters import kl_estimate

def test_kl_is_0_for_equal_log_probs_and_else_above():
    assert kl_estimate(torch.zeros(1, 1), torch.tensor([[0.0]])).item() == 0
    assert kl_estimate(torch.zeros(1, 1), torch.tensor([[1.0]])).item() > 0.5
    assert kl_estimate(torch.zeros(1, 1), torch.tensor([[1.0]])).item() > 0.7

def test_that_is_wrong():
    assert kl_estimate(torch.zeros(1, 1), torch.tensor([[1.0]])).item() > 0.8
"""


def test_a_students_tests_are_graded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grade, "RIGHT_RUNS", 2)
    wrong = [number for number, mutant in enumerate(MUTANTS, 1) if mutant[1] == KL]
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    # The one without a gradient has the same values.
    points, text = grade.grade_tests(path, 0, wrong)
    assert points == 2
    assert text.startswith("2 of 3 wrong versions are noticed; dropped, since they fail on")
    assert text.endswith(": test_that_is_wrong")


REFUSED = {
    "import grpo\ngrpo.nothing\n": "on the right version the file cannot be imported",
    "def test_state():\n    open('seen', 'x')\n": "line 2 calls open",
    "import subprocess\n": "imports subprocess",
    "import grpo\ngrpo.__loader__\n": "line 2 uses __loader__",
    "import grpo\ndef test_a():\n    getattr(grpo, 'a')\n": "line 3 calls getattr",
    "def test_eval():\n    eval('1')\n": "line 2 calls eval",
}


@pytest.mark.parametrize("text", REFUSED)
def test_tests_that_are_refused(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    points, reason = grade.grade_tests(tmp_path / "mine.py", 0, [1])
    assert points == 0 and REFUSED[text] in reason


def test_the_module_eval_is_not_the_function(tmp_path):
    (tmp_path / "mine.py").write_text("import eval\n\neval.wilson\n")
    assert broken_rule(tmp_path / "mine.py") == ""


def test_a_test_of_ours_is_no_test_of_theirs():
    """Under another name and with another docstring neither."""
    ours = (ROOT / "tests" / "test_objective.py").read_text(encoding="utf-8")
    theirs = MINE + ours.replace("def test_", "def test_my_").replace('    """', '    """My ')
    count = ours.count("\ndef test_")
    assert count > 20 and len(copied_tests(theirs, [ours])) == count
    assert copied_tests(MINE, [ours]) == []
    path = ROOT / "tests" / "test_objective.py"
    assert "copies tests of the hand-out" in grade.grade_tests(path, 0, [1])[1]


ENDLESS = """
import torch
from adapters import kl_estimate

def test_it():
    while kl_estimate(torch.zeros(1, 1), torch.tensor([[1.0]])).item() < 0.5:
        pass
"""


def test_a_loop_on_a_wrong_version_is_no_failed_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade, "CPU_LIMIT", 12)
    (tmp_path / "mine.py").write_text(ENDLESS)
    number = [mutant[0] for mutant in MUTANTS].index("KL of the other direction") + 1
    assert grade.grade_tests(tmp_path / "mine.py", 0, [number])[0] == 0
    assert "(it took more than 12 CPU seconds)" in capsys.readouterr().out


@pytest.mark.slow
def test_each_blank_loses_only_its_own_points_and_all_of_them_everything(solution):
    """Each part alone, since it is graded with all others right: blank, and with our solution."""
    assert sum(points for points, _ in grade.grade(solution).values()) == 100
    write_blanks(solution, [part.partition(".")[2] for part in PARTS])
    assert sum(points for points, _ in grade.grade(solution).values()) == 0


@pytest.mark.slow
def test_a_wrong_version_loses_points_in_its_function(solution):
    unnoticed = []
    for what, function, _, right, wrong in MUTANTS:
        if function in PARTS:
            script = f"{function.partition('.')[0]}.py"
            text = (ROOT / script).read_text(encoding="utf-8")
            text = plant(text, function, right, wrong)
            (solution / script).write_text(text, encoding="utf-8")
            if grade_part(function, solution, 0)[0] > PARTS[function].points / 2:
                unnoticed.append(what)
            shutil.copy(ROOT / script, solution)
    assert not unnoticed
