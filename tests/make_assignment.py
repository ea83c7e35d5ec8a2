"""Make an assignment out of this project, in a new folder:

    python tests/make_assignment.py FOLDER                                     every public function of grpo.py is blank
    python tests/make_assignment.py FOLDER --functions kl_estimate,grpo_loss   only these
    python tests/make_assignment.py FOLDER --bug 12                            a silent bug, of test_mutants.py, instead

A blank function keeps its signature and its docstring, and raises NotImplementedError; helpers that only blank functions
use are gone. Then the tests are run, here and there: those that fail there must be exactly those that call a blank
function here. The table shows how many tests each function has. Tests that hold solutions stay behind.
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["grpo.py", "reward.py", "eval.py", "train.py"]
STAY = {
    "make_assignment.py",
    "test_assignment.py",
    "test_mutants.py",
    "test_readme.py",
}  # solutions, and tests of the README
# The tests of single functions. All others train or evaluate, which needs nearly all of grpo.py.
FILES = ["test_objective.py", "test_sampling.py", "test_reward.py"]


def public_functions(source):
    """The names of a module's functions that do not begin with "_", in its order."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
    ]


def blank(source, names):
    """The source with these functions blank, and without the helpers that nothing but them has used."""
    lines, functions = (
        source.splitlines(keepends=True),
        [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)],
    )
    for node in reversed(functions):  # from the end, so that line numbers hold
        if node.name in names:
            lines[node.body[0].end_lineno : node.end_lineno] = [
                f'    raise NotImplementedError("{node.name} is yours to write")\n'
            ]
    left = "".join(lines)
    for node in [
        node
        for node in ast.parse(left).body
        if isinstance(node, ast.FunctionDef) and node.name[0] == "_"
    ][::-1]:
        if left.count(node.name) == 1:  # its own definition
            rows = left.splitlines(keepends=True)
            left = "".join(rows[: node.lineno - 1] + rows[node.end_lineno :])
    return left


class Watcher:
    """A pytest plugin: which of the functions does each test call, and which tests fail?"""

    def __init__(self, names):
        self.names, self.calls, self.failed = set(names), {}, set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        seen = set()
        sys.setprofile(
            lambda frame, event, arg: (
                event == "call"
                and frame.f_code.co_filename.endswith("grpo.py")
                and seen.add(frame.f_code.co_name)
            )
        )
        yield
        sys.setprofile(None)
        self.calls[item.nodeid] = sorted(seen & self.names)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def watch(project, names, files):
    """(calls, failed) of the tests in these files of a project, run in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        done = subprocess.run(
            [sys.executable, __file__, "--watch", record, ",".join(names), *files],
            cwd=project,
            capture_output=True,
            text=True,
        )
        if not record.exists():
            sys.exit(
                f"error: the tests of {project} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return json.loads(record.read_text())


def watched(record, names, *files):
    """The other side of `watch`: runs in its process."""
    watcher = Watcher(names.split(","))
    pytest.main(
        [*(f"tests/{file}" for file in files), "-q", "--tb=no", "-p", "no:cacheprovider"],
        plugins=[watcher],
    )
    Path(record).write_text(json.dumps([watcher.calls, sorted(watcher.failed)]))


def check(folder, names):
    """Print which function has how many tests; exit with status 1 unless exactly those fail that have to."""
    calls, broken = watch(ROOT, names, FILES)
    _, failed = watch(folder, names, FILES)
    expected = sorted(test for test, functions in calls.items() if functions)
    tests = Counter(name for functions in calls.values() for name in functions)
    for name in names:
        print(f"{name:<20} {tests[name]:>4} tests call it")
    for what, wrong in (
        ("fail before anything is blank", broken),
        ("fail, and call nothing blank", {*failed} - {*expected}),
        ("pass, and call something blank", {*expected} - {*failed}),
    ):
        if wrong:
            sys.exit(f"error: {len(wrong)} tests {what}: {', '.join(sorted(wrong)[:5])}")
    print(
        f"in {folder} {len(failed)} of {len(calls)} tests fail: exactly those that call a blank function"
    )


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="a new one")
    parser.add_argument(
        "--functions", help="of grpo.py, with commas between (default: all public ones)"
    )
    parser.add_argument(
        "--bug",
        type=int,
        metavar="NUMBER",
        help="plant this wrong version, and leave the tests away",
    )
    args = parser.parse_args(argv)
    folder, source = Path(args.folder), (ROOT / "grpo.py").read_text(encoding="utf-8")
    names = args.functions.split(",") if args.functions else public_functions(source)
    if unknown := set(names) - set(public_functions(source)):
        sys.exit(
            f"error: grpo.py has no function {', '.join(unknown)}; it has {', '.join(public_functions(source))}"
        )
    if args.bug is not None:
        sys.path.insert(0, str(ROOT))
        from test_mutants import MUTANTS

        if not 1 <= args.bug <= len(MUTANTS):
            sys.exit(f"error: --bug {args.bug}: take 1 to {len(MUTANTS)}")
    if folder.exists():
        sys.exit(f"error: {folder} exists, and nothing is overwritten: name a new folder")
    folder.mkdir(parents=True)
    for name in [*SCRIPTS, "requirements.txt", "README.md", "LICENSE", ".gitignore"]:
        shutil.copy(ROOT / name, folder / name)
    if args.bug:
        _, module, right, wrong, _ = MUTANTS[args.bug - 1]
        path = folder / f"{module}.py"
        path.write_text(path.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
        return print(f"{folder} has one bug, in one line; it runs, and says nothing")
    (folder / "grpo.py").write_text(blank(source, names), encoding="utf-8")
    (folder / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        if path.name not in STAY:
            shutil.copy(path, folder / "tests" / path.name)
    check(folder.resolve(), names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        watched(*sys.argv[2:])
    else:
        main(sys.argv[1:])
