"""Grade a solution of the assignment, or the tests that a student wrote:

    python tests/grade.py FOLDER                      points for each function
    python tests/grade.py --tests FILE                which wrong versions do these tests notice?

Options: --variant N, as given to make_assignment.py; --junit FILE and --gradescope FILE write the
points in these formats.

Each function is graded alone: in a process of its own, in a new copy of this project with its
tests, where only this function is the student's, with the helpers that it calls. So a mistake costs
once, and tests that a student edits play no part. Full points if all tests pass that call the
function; otherwise half of them times the share that passes. A process that ends early or takes too
long earns nothing.

This stops mistakes and simple tricks, not an attack: code that runs in the tests' process could
forge their result, and could write files. Read what looks odd, and run grade.py in a container.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from course import PARTS, ROOT, VARIANTS, copy_project

LIMIT = 180  # seconds for the tests of one function
ALLOWED = {"collections", "contextlib", "functools", "itertools", "math", "torch", "typing"}
FOR_TESTS = {
    "adapters",
    "conftest",
    "eval",
    "grpo",
    "helpers",
    "pytest",
    "random",
    "reward",
    "train",
}
INNER = {"__class__", "__closure__", "__code__", "__dict__", "__globals__", "__wrapped__"}
FORBIDDEN = {"__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "setattr"}


# --- What a solution may not do -----------------------------------------------------------------


def imported_modules(tree):
    """Return the modules that a script imports: {first part of the name}."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def broken_rule(path, allowed):
    """Return why a script is not run at all, or "" if nothing speaks against it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot be read: {error}"
    modules = imported_modules(tree)
    if more := sorted(modules - allowed):
        return f"imports {', '.join(more)}"
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name) and name in FORBIDDEN:
            return f"{line} calls {name}"
        if isinstance(node, ast.Attribute):
            if name in INNER:
                return f"{line} uses {name}"
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            stored = isinstance(node.ctx, ast.Store) and isinstance(root, ast.Name)
            if stored and root.id in modules:
                return f"{line} changes the module {root.id}"
    return ""


# --- One process: the tests of one function -----------------------------------------------------


class Watcher:
    """A plugin of pytest: which tests call the function, and what is their outcome?"""

    def __init__(self):
        self.called = False
        self.outcomes = {}

    def watch(self, function):
        def call(*args, **options):
            self.called = True
            return function(*args, **options)

        call.__wrapped__ = function
        return call

    def pytest_runtest_logstart(self, nodeid):
        self.called = False
        self.outcomes[nodeid] = []

    def pytest_runtest_logreport(self, report):
        self.outcomes[report.nodeid].append(report.outcome)

    def pytest_runtest_logfinish(self, nodeid):
        if not self.called:
            del self.outcomes[nodeid]

    def passed(self):
        """Return {test: whether it passed} for the tests that call the function."""
        return {
            nodeid.rpartition("::")[2]: set(outcomes) == {"passed"}
            for nodeid, outcomes in self.outcomes.items()
        }


def enter(copy):
    """Make this process work in a copy of the project, and print nothing."""
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def run_pytest(words, plugin):
    """Run a file of tests, with words for -k, in this process."""
    import pytest

    file, _, names = words.partition(" ")
    options = ["-p", "no:cacheprovider", "-p", "no:terminal"]
    pytest.main([f"tests/test_{file}.py", "-k", names, *options], plugins=[plugin])


def run_part(connection, copy, part):
    """Run the tests of a part, with the function that the copy's submission.py has; send {test:
    whether it passed}, or a text that says why none could run.
    """
    enter(copy)
    module_name, _, name = part.partition(".")
    module = importlib.import_module(module_name)
    try:
        student = importlib.import_module("submission")
        function = getattr(student, name)
    except BaseException as error:
        connection.send(f"cannot be imported: {type(error).__name__}: {error}"[:200])
        return
    for other, value in vars(module).items():  # their other parts are ours, and so are all classes
        if f"{module_name}.{other}" in PARTS and other != name or isinstance(value, type):
            setattr(student, other, value)
    watcher = Watcher()
    setattr(module, name, watcher.watch(function))
    run_pytest(PARTS[part].tests, watcher)
    connection.send(watcher.passed())


def in_process(target, *args):
    """Run a function in a process of its own. Returns what it sends, or why it sent nothing."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT):
            return f"took more than {LIMIT} seconds"
        result = ours.recv()
        process.join(10)  # it may clean up
        return result
    except EOFError:
        return "its process ended before the tests did"
    finally:
        process.kill()
        process.join()


# --- The points ---------------------------------------------------------------------------------


def grade_part(part, submission, variant):
    """Return (points, text): what one function of a submission earns, and why."""
    script = f"{part.partition('.')[0]}.py"
    reference = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    reason = broken_rule(submission / script, ALLOWED | imported_modules(reference))
    if reason:
        return 0.0, f"{script} {reason}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy_project(copy, variant)
        text = (submission / script).read_text(encoding="utf-8")
        (copy / "submission.py").write_text(text, encoding="utf-8")
        result = in_process(run_part, copy, part)
    if isinstance(result, str):
        return 0.0, result
    if not result:
        return 0.0, "no test could call it"
    wrong = [test for test, passed in result.items() if not passed]
    right = len(result) - len(wrong)
    points = PARTS[part].points
    if not wrong:
        return float(points), f"{right} tests"
    earned = round(points / 2 * right / len(result), 1)
    return earned, f"{len(wrong)} of {len(result)} tests fail: {', '.join(wrong[:3])}"


def grade(submission, variant=0, parts=PARTS):
    """Grade some parts of a submission: {part: (points, text)}."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda part: grade_part(part, submission, variant), parts)
        return dict(zip(parts, results, strict=True))


def write_junit(path, results):
    """Write the points as JUnit XML: a function that loses points has failed."""
    suite = ElementTree.Element("testsuite", name="grpo", tests=str(len(results)))
    for part, (points, text) in results.items():
        case = ElementTree.SubElement(suite, "testcase", classname="grpo", name=part)
        if points < PARTS[part].points:
            ElementTree.SubElement(case, "failure", message=f"{points} points: {text}")
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def write_gradescope(path, results):
    """Write the points as Gradescope's results.json."""
    tests = [
        {"name": part, "score": points, "max_score": PARTS[part].points, "output": text}
        for part, (points, text) in results.items()
    ]
    path.write_text(json.dumps({"tests": tests}, indent=1), encoding="utf-8")


# --- The tests that a student wrote -------------------------------------------------------------


class Failed:
    """A plugin of pytest: the names of the tests that failed, and how many ran."""

    def __init__(self):
        self.ran = 0
        self.names = []

    def pytest_collectreport(self, report):
        if report.failed:
            self.names.append("the file cannot be imported")

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        if report.failed:
            self.names.append(report.nodeid.rpartition("::")[2])


def run_against(connection, copy, number):
    """Run the student's tests against wrong version `number`, or against the right one (0)."""
    enter(copy)
    import test_mutants

    failed = Failed()
    if number:
        _, function, _, right, wrong = test_mutants.MUTANTS[number - 1]
        with test_mutants.mistake(function, right, wrong):
            run_pytest("student", failed)
    else:
        run_pytest("student", failed)
    connection.send((failed.ran, failed.names))


def grade_tests(path, variant, numbers):
    """Print which of these wrong versions the tests in a file notice. Returns how many."""
    from test_mutants import MUTANTS

    reason = broken_rule(path, ALLOWED | FOR_TESTS)
    if reason:
        sys.exit(f"error: {path} {reason}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy_project(copy, variant)
        student = copy / "tests" / "test_student.py"
        student.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        healthy = in_process(run_against, copy, 0)
        if isinstance(healthy, str) or healthy[1] or not healthy[0]:
            sys.exit(f"error: on the right version they have to pass, and do not: {healthy}")
        print(f"right version: {healthy[0]} tests pass")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda n: in_process(run_against, copy, n), numbers)
            noticed = 0
            for number, result in zip(numbers, results, strict=True):
                names = [result] if isinstance(result, str) else result[1]
                noticed += bool(names)
                what, function, *_ = MUTANTS[number - 1]
                print(f"{'noticed' if names else '-':<8} {number:>3} {function}: {what}", end="")
                print(f" ({', '.join(names[:2])})" if names else "", flush=True)
    print(f"{noticed} of {len(numbers)} wrong versions are noticed")
    return noticed


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--variant", type=int, choices=range(len(VARIANTS)), default=0)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--gradescope", type=Path)
    args = parser.parse_args(argv)
    if args.tests:
        sys.path.insert(0, str(ROOT))
        from test_mutants import MUTANTS

        return grade_tests(args.tests, args.variant, range(1, len(MUTANTS) + 1))
    if args.folder is None or not (args.folder / "grpo.py").exists():
        sys.exit(f"error: {args.folder} holds no grpo.py: name the folder of a solution")
    results = grade(args.folder, args.variant)
    for part, (points, text) in results.items():
        print(f"{part:<26} {points:>5.1f} of {PARTS[part].points:>2}   {text}")
    print(f"{'sum':<26} {sum(points for points, _ in results.values()):>5.1f} of 100")
    if args.junit:
        write_junit(args.junit, results)
    if args.gradescope:
        write_gradescope(args.gradescope, results)


if __name__ == "__main__":
    main(sys.argv[1:])
