"""Grade a solution of the assignment, or the tests that a student wrote:

    python tests/grade.py FOLDER                      points for each function
    python tests/grade.py FOLDER --functions a,b      only these
    python tests/grade.py --tests FILE                which wrong versions do these tests notice?
    python tests/grade.py --tests FILE --bugs 24,31   only these

Options: --variant N, as given to make_assignment.py; --junit FILE and --gradescope FILE write the
points of a solution in these formats.

Each function is graded alone: in a process of its own, in a new copy of this project with its
tests, where only this function is the student's, with the helpers that it calls. So a mistake costs
once, and tests that a student edits play no part. A function earns full points if all tests that
call it pass; otherwise half its points, times the share of tests that pass with all their cases. A
process that ends early or takes too long earns nothing.

Tests are run against each wrong version in a process and a copy of their own, too, and three times
against the right version, where they must pass.

This stops mistakes and simple tricks, not an attack: code that runs in the tests' process could
forge their result, and could write files. Read what looks odd, and run grade.py in a container.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from course import PARTS, ROOT, STAY, VARIANTS, copy_project, parts_named, plant_bug, vary

CPU_LIMIT = 150  # seconds of one core for the tests of one function; ours need about a tenth
LIMIT = 900  # seconds, for a process that sleeps, or that shares its core with others
POINTS_FOR_TESTS = 25
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
INNER = {  # where one gets at the code of functions, and at what a module has imported
    "__base__",
    "__bases__",
    "__builtins__",
    "__class__",
    "__closure__",
    "__code__",
    "__dict__",
    "__getattribute__",
    "__globals__",
    "__loader__",
    "__mro__",
    "__spec__",
    "__subclasses__",
    "__wrapped__",
}
FORBIDDEN = {"__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "setattr"}
FORBIDDEN_IN_TESTS = FORBIDDEN | {"getattr", "open", "vars"}


# --- What a solution may not do -----------------------------------------------------------------


def imported_modules(tree):
    """Return the modules that a script imports: {first part of the name}."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def broken_rule(path, allowed, forbidden=FORBIDDEN):
    """Return why a script is not run at all, or "" if nothing speaks against it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot be read: {error}"
    modules = imported_modules(tree)
    if more := sorted(modules - allowed):
        return f"imports {', '.join(more)}"
    # After `import eval`, that name is a module.
    plain = [alias for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    forbidden = forbidden - {alias.asname or alias.name for alias in plain}
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Name) and name in forbidden:
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
        """Return {test: whether all its cases passed} for the tests that call the function."""
        tests = {}
        for nodeid, outcomes in self.outcomes.items():
            name = nodeid.rpartition("::")[2].partition("[")[0]
            tests[name] = tests.get(name, True) and set(outcomes) == {"passed"}
        return tests


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


def limited(seconds, target, *args):
    """Run a function on one core, for so many seconds of its time."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch is not there yet
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    target(*args)


def in_process(target, *args):
    """Run a function in a process of its own. Returns what it sends, or why it sent nothing."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    words = (CPU_LIMIT, target, theirs, *args)
    process = context.Process(target=limited, args=words, daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT):
            return f"took more than {LIMIT} seconds: is this machine busy?"
        result = ours.recv()
        process.join(10)  # it may clean up
        return result
    except EOFError:
        process.join(10)
        if process.exitcode == -signal.SIGXCPU:
            return f"took more than {CPU_LIMIT} seconds of a core"
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


def run_student(connection, copy):
    """Run the student's tests in a copy; send how many ran, and the names of those that failed."""
    enter(copy)
    failed = Failed()
    run_pytest("student", failed)
    connection.send((failed.ran, failed.names))


def try_tests(text, variant, number=0):
    """Run tests against wrong version `number`, or the right one (0), each in a new copy, where no
    earlier run has left anything. Returns (how many ran, which failed), or why that is not known.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy_project(copy, variant, STAY)
        if number:
            plant_bug(copy, number, variant)
        (copy / "tests" / "test_student.py").write_text(text, encoding="utf-8")
        return in_process(run_student, copy)


def copied_tests(text, variant):
    """Return the names of tests that also stand in the hand-out."""
    ours = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(vary(path.read_text(encoding="utf-8"), variant))
        ours |= {ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in nodes if ast.dump(node) in ours and node.name[:4] == "test"]


def grade_tests(path, variant, numbers):
    """Print which of these wrong versions the tests in a file notice. Returns how many."""
    from test_mutants import MUTANTS

    reason = broken_rule(path, ALLOWED | FOR_TESTS, FORBIDDEN_IN_TESTS)
    if reason:
        sys.exit(f"error: {path} {reason}")
    text = path.read_text(encoding="utf-8")
    if copies := copied_tests(text, variant):
        sys.exit(f"error: {path} has tests of the hand-out: {', '.join(copies[:5])}")
    noticed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for healthy in pool.map(lambda _: try_tests(text, variant), range(3)):
            if isinstance(healthy, str) or healthy[1] or not healthy[0]:
                sys.exit(f"error: on the right version they have to pass, and do not: {healthy}")
        print(f"right version: {healthy[0]} tests pass, three times")
        results = pool.map(lambda number: try_tests(text, variant, number), numbers)
        for number, result in zip(numbers, results, strict=True):
            # A process that ended has not said that something is wrong.
            failed = [] if isinstance(result, str) else result[1]
            note = result if isinstance(result, str) else ", ".join(failed[:2])
            noticed += bool(failed)
            what, function, *_ = MUTANTS[number - 1]
            print(f"{'noticed' if failed else '-':<8} {number:>3} {function}: {what}", end="")
            print(f" ({note})" if note else "", flush=True)
    points = min(noticed, POINTS_FOR_TESTS)
    print(f"{noticed} of {len(numbers)} wrong versions are noticed: {points} points")
    return noticed


def bug_numbers(text):
    return [int(number) for number in text.split(",")]


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--functions", type=parts_named, default=list(PARTS))
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--bugs", type=bug_numbers)
    parser.add_argument("--variant", type=int, choices=range(len(VARIANTS)), default=0)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--gradescope", type=Path)
    args = parser.parse_args(argv)
    if args.tests:
        if args.junit or args.gradescope:
            sys.exit("error: --junit and --gradescope are for the points of a solution")
        sys.path.insert(0, str(ROOT))
        from test_mutants import MUTANTS

        numbers = args.bugs or range(1, len(MUTANTS) + 1)
        if not set(numbers) <= set(range(1, len(MUTANTS) + 1)):
            sys.exit(f"error: --bugs are numbers from 1 to {len(MUTANTS)}")
        return grade_tests(args.tests, args.variant, numbers)
    if args.folder is None or not (args.folder / "grpo.py").exists():
        sys.exit(f"error: {args.folder} holds no grpo.py: name the folder of a solution")
    results = grade(args.folder, args.variant, args.functions)
    for part, (points, text) in results.items():
        print(f"{part:<26} {points:>5.1f} of {PARTS[part].points:>2}   {text}")
    most = sum(PARTS[part].points for part in results)
    print(f"{'sum':<26} {sum(points for points, _ in results.values()):>5.1f} of {most}")
    if args.junit:
        write_junit(args.junit, results)
    if args.gradescope:
        write_gradescope(args.gradescope, results)


if __name__ == "__main__":
    main(sys.argv[1:])
