"""Make an assignment out of this project, in a new folder:

    python tests/make_assignment.py FOLDER                              all functions are blank
    python tests/make_assignment.py FOLDER --functions kl_estimate,...  only these
    python tests/make_assignment.py FOLDER --bug 12                     a bug of test_mutants.py

The functions are those of grpo.py with a contract in tests/adapters.py. A blank one keeps its
signature and its docstring, and raises NotImplementedError; helpers that nothing else uses go.
Then the tests are run, here and there: those that fail there must be exactly those that call a
blank function here. Tests that hold solutions stay behind.
"""

import argparse
import ast
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["grpo.py", "reward.py", "eval.py", "train.py"]
OTHERS = ["requirements.txt", "README.md", "LICENSE", ".gitignore"]
# They hold solutions, or test the README.
STAY = ["make_assignment.py", "test_assignment.py", "test_mutants.py", "test_readme.py"]
# The tests of single functions. All others train or evaluate, which needs nearly all of grpo.py.
FILES = ["test_objective.py", "test_sampling.py", "test_reward.py"]


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
    """A plugin of pytest: which of the functions does each test call, and which tests fail?"""

    def __init__(self, names):
        self.names = names
        self.calls = {}
        self.failed = set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.calls[item.nodeid] = self.seen = set()
        sys.setprofile(self.note)
        yield
        sys.setprofile(None)

    def note(self, frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_name in self.names and code.co_filename.endswith("grpo.py"):
            self.seen.add(code.co_name)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def watch(project, names, files):
    """Run the tests in these files of a project: ({test: calls}, tests that fail)."""
    os.chdir(project)
    watcher = Watcher(names)
    paths = [f"tests/{file}" for file in files]
    if pytest.main([*paths, "-p", "no:terminal", "-p", "no:cacheprovider"], [watcher]) > 1:
        sys.exit(f"error: in {project} pytest cannot run {', '.join(paths)}")
    return watcher.calls, watcher.failed


def check(folder, names, files):
    """Print how many tests each function has; exit with an error unless the right ones fail."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        here, there = pool.map(watch, (ROOT, folder), (names, names), (files, files))
    calls, broken = here
    failed = there[1]
    for name in names:
        print(f"{name:<20} {sum(name in called for called in calls.values()):>4} tests call it")
    expected = {test for test, called in calls.items() if called}
    if misfits := sorted(broken | failed ^ expected):
        sys.exit(f"error: {len(misfits)} tests fail for no reason, or pass: {misfits[:5]}")
    count = f"{len(failed)} of {len(calls)}"
    print(f"in {folder} {count} tests fail: exactly those that call a blank function")


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
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
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
    for name in SCRIPTS + OTHERS:
        shutil.copy(ROOT / name, args.folder)
    (args.folder / script).write_text(text, encoding="utf-8")
    if bug:
        print(f"{args.folder} has one bug, in one place; it runs, and says nothing")
        return
    (args.folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        if path.name not in STAY:
            shutil.copy(path, args.folder / "tests")
    check(args.folder.resolve(), names, FILES)


if __name__ == "__main__":
    main(sys.argv[1:])
