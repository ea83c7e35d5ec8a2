"""Make an assignment out of this project, in a new folder:

    python tests/make_assignment.py FOLDER                              all functions are blank
    python tests/make_assignment.py FOLDER --functions kl_estimate,...  only these
    python tests/make_assignment.py FOLDER --bug 12                     a bug of test_mutants.py

The functions are those of grpo.py with a contract in tests/adapters.py. A blank one keeps its
signature and docstring, and raises NotImplementedError; helpers that nothing else uses go. Then
the tests run, here and there: those that fail there must be just those that call a blank function
here. Tests that hold solutions stay behind, and those of the README.
"""

import argparse
import ast
import functools
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["grpo.py", "reward.py", "eval.py", "train.py"]
STAY = [
    "README.md",
    "make_assignment.py",
    "test_assignment.py",
    "test_mutants.py",
    "test_readme.py",
]
# The tests of single functions. All others train or evaluate, which needs nearly all of grpo.py.
FILES = ["tests/test_objective.py", "tests/test_sampling.py", "tests/test_reward.py"]


def functions(source):
    """Return the functions of a module: {name: its syntax tree}, in order."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def public_functions(source):
    """Return the names of the functions that have a contract in tests/adapters.py."""
    contracts = functions((ROOT / "tests" / "adapters.py").read_text(encoding="utf-8"))
    return [name for name in functions(source) if name in contracts]


def blank(source, names):
    """Return the source with these functions blank, without helpers that nothing uses any more."""
    lines = source.splitlines(keepends=True)
    for name, node in reversed(functions(source).items()):  # from the end, so line numbers hold
        if name in names:
            body = slice(node.body[0].end_lineno, node.end_lineno)
            lines[body] = [f'    raise NotImplementedError("{name} is yours to write")\n']
    source = "".join(lines)
    used = [node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    for name, node in functions(source).items():
        if name not in [*used, *public_functions(source)]:
            lines = source.splitlines(keepends=True)
            del lines[node.lineno - 1 : node.end_lineno + 2]  # and two blank lines behind it
            return blank("".join(lines), [])  # its own helpers may go, too
    return source


class Watcher:
    """A plugin of pytest: which of some functions does each test call, and which tests fail?"""

    def __init__(self):
        self.seen = set()
        self.calls = {}
        self.failed = set()

    def noted(self, function):
        @functools.wraps(function)
        def call(*args, **options):
            self.seen.add(function.__name__)
            return function(*args, **options)

        return call

    def pytest_runtest_logstart(self, nodeid):
        self.seen = self.calls[nodeid] = set()

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def watch(project, names, files):
    """Run the tests in these files of a project: ({test: calls}, tests that fail)."""
    os.chdir(project)
    sys.path.insert(0, str(project))
    import grpo

    watcher = Watcher()
    for name in names:
        setattr(grpo, name, watcher.noted(getattr(grpo, name)))
    if pytest.main([*files, "-p", "no:terminal", "-p", "no:cacheprovider"], [watcher]) > 1:
        sys.exit(f"error: in {project} pytest cannot run {', '.join(files)}")
    return watcher.calls, watcher.failed


def check(folder, names, files):
    """Print how many tests each function has; exit with an error unless the right ones fail."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        (calls, broken), (_, failed) = pool.map(watch, (ROOT, folder), [names] * 2, [files] * 2)
    for name in names:
        print(f"{name:<20} {sum(name in called for called in calls.values()):>4} tests call it")
    expected = {test for test, called in calls.items() if called}
    if misfits := sorted(broken | failed ^ expected):
        sys.exit(f"error: {len(misfits)} tests fail for no reason, or pass: {misfits[:5]}")
    print(f"{len(failed)} of {len(calls)} tests fail there: just those that call a blank function")


def with_bug(number):
    """Return the name of a script, and its text with a mistake of test_mutants.py."""
    sys.path.insert(0, str(ROOT))
    from test_mutants import MUTANTS, plant

    if not 1 <= number <= len(MUTANTS):
        sys.exit(f"error: --bug {number}: take 1 to {len(MUTANTS)}")
    _, function, _, right, wrong = MUTANTS[number - 1]
    script = function.partition(".")[0] + ".py"
    return script, plant((ROOT / script).read_text(encoding="utf-8"), function, right, wrong)


def main(argv):
    source = (ROOT / "grpo.py").read_text(encoding="utf-8")
    known = ",".join(public_functions(source))
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--functions", default=known)
    parser.add_argument("--bug", type=int)
    args = parser.parse_args(argv)
    names = args.functions.split(",")
    if unknown := set(names) - set(known.split(",")):
        sys.exit(f"error: no function {', '.join(unknown)} to blank: take some of {known}")
    bug = args.bug is not None
    script, text = with_bug(args.bug) if bug else ("grpo.py", blank(source, names))
    if args.folder.exists():
        sys.exit(f"error: {args.folder} exists, and nothing is overwritten: name a new folder")
    args.folder.mkdir(parents=True)
    for name in [*SCRIPTS, "requirements.txt", "README.md", "LICENSE", ".gitignore"]:
        shutil.copy(ROOT / name, args.folder)
    (args.folder / script).write_text(text, encoding="utf-8")
    if bug:
        print(f"{args.folder} has one bug, in one place; it runs, and says nothing")
        return
    stay = shutil.ignore_patterns("__pycache__", *STAY)
    shutil.copytree(ROOT / "tests", args.folder / "tests", ignore=stay)
    check(args.folder.resolve(), names, FILES)


if __name__ == "__main__":
    main(sys.argv[1:])
