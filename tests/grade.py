"""Grade a solution of the assignment, the tests that a student wrote, or both:

    python tests/grade.py FOLDER --tests FILE         points for each function, and for tests
    python tests/grade.py FOLDER --functions a,b      only these
    python tests/grade.py --tests FILE --bugs 24,31   only these wrong versions, without points

Options: --variant N, as given to make_assignment.py; --junit FILE and --gradescope FILE write the
points in these formats. README.md says how points are given, and what this does not prevent.

Each function is graded alone: in a process of its own, in a new copy of this project with its
tests, where only this function is the student's, with the helpers that it calls; ours is blank.
Tests are run against each wrong version in a process and a copy of their own, too.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from course import BLANK, PARTS, ROOT, STAY, VARIANTS, copy_project, parts_named, plant_bug, vary
from make_assignment import write_blanks
from rules import broken_rule, copied_tests

CPU_LIMIT = 150  # CPU seconds for all tests of one function; ours need about a tenth
LIMIT = 900  # seconds, for a process that sleeps, or that shares its core with others
POINTS_FOR_TESTS = 25
MOST = {part: known.points for part, known in PARTS.items()} | {"tests": POINTS_FOR_TESTS}
RIGHT_RUNS = 3  # on the right version, since a test may pass by luck
ONE_AT_A_TIME = threading.Lock()  # in Python 3.11, ast.parse in two threads fails now and then


# --- One process: the tests of one function -----------------------------------------------------


class Watcher:
    """A plugin of pytest: which tests call the function, and what is their outcome?"""

    def __init__(self):
        self.called = False
        self.outcomes = {}

    def watch(self, function):
        def call(*args, **options):
            self.called = True
            try:
                return function(*args, **options)
            except NotImplementedError as error:
                if BLANK in str(error):  # the caller may hide that, as accuracy_reward does
                    self.outcomes[self.nodeid].append("blank")
                raise

        call.__wrapped__ = function
        return call

    def pytest_runtest_logstart(self, nodeid):
        self.called = False
        self.nodeid = nodeid
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
            return f"it took more than {LIMIT} seconds: is this machine busy?"
        result = ours.recv()
        process.join(10)  # it may clean up
        return result
    except EOFError:
        process.join(10)
        if process.exitcode == -signal.SIGXCPU:
            return f"it took more than {CPU_LIMIT} CPU seconds"
        return "its process ended before the tests did"
    finally:
        process.kill()
        process.join()


# --- The points ---------------------------------------------------------------------------------


def variant_of(submission):
    """Return the variant whose names a submission has."""
    text = (submission / "grpo.py").read_text(encoding="utf-8", errors="replace")
    words = set(re.findall(r"\w+", text))
    names = {old for names in VARIANTS for old in names if " " not in old}
    known = [sum(vary(name, number) in words for name in names) for number in range(len(VARIANTS))]
    return known.index(max(known))


def grade_part(part, submission, variant):
    """Return (points, text): what one function of a submission earns, and why."""
    module, _, name = part.partition(".")
    script = f"{module}.py"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        with ONE_AT_A_TIME:
            if reason := broken_rule(submission / script):
                return 0.0, f"{script} {reason}"
            copy_project(copy, variant)
            write_blanks(copy, [name])  # a submission could find a way to call ours
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
        if points < MOST[part]:
            ElementTree.SubElement(case, "failure", message=f"{points} points: {text}")
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def write_gradescope(path, results):
    """Write the points as Gradescope's results.json."""
    tests = [
        {"name": part, "score": points, "max_score": MOST[part], "output": text}
        for part, (points, text) in results.items()
    ]
    path.write_text(json.dumps({"tests": tests}, indent=1), encoding="utf-8")


# --- The tests that a student wrote -------------------------------------------------------------


class Failed:
    """A plugin of pytest: which tests failed, and whether the file could not be read."""

    def __init__(self):
        self.unreadable = False
        self.names = []

    def pytest_collectreport(self, report):
        self.unreadable |= report.failed

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid.rpartition("::")[2])


def run_student(connection, copy):
    """Run the student's tests in a copy; send the names of those that failed, or why none ran."""
    enter(copy)
    failed = Failed()
    run_pytest("student", failed)
    connection.send("the file cannot be imported" if failed.unreadable else failed.names)


def try_tests(text, variant, number=0):
    """Run tests against wrong version `number`, or the right one (0), each in a new copy, where no
    earlier run has left anything. Returns the names of those that fail, or why they are not known.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        with ONE_AT_A_TIME:
            copy_project(copy, variant, STAY)
            if number:
                plant_bug(copy, number, variant)
        (copy / "tests" / "test_student.py").write_text(text, encoding="utf-8")
        return in_process(run_student, copy)


def grade_tests(path, variant, numbers):
    """Print which of these wrong versions the tests in a file notice. Returns (points, text)."""
    from test_mutants import MUTANTS

    if reason := broken_rule(path):
        return 0.0, f"{path.name} {reason}"
    text = path.read_text(encoding="utf-8")
    handed_out = [
        vary(ours.read_text(encoding="utf-8"), variant) for ours in ROOT.glob("tests/test_*.py")
    ]
    if copies := copied_tests(text, handed_out):
        return 0.0, f"copies tests of the hand-out: {', '.join(copies[:5])}"
    noticed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        dropped = set()
        for right in pool.map(lambda _: try_tests(text, variant), range(RIGHT_RUNS)):
            if isinstance(right, str):
                return 0.0, f"on the right version {right}"
            dropped.update(right)
        results = pool.map(lambda number: try_tests(text, variant, number), numbers)
        for number, result in zip(numbers, results, strict=True):
            # A process that ended has not said that something is wrong.
            failed = [] if isinstance(result, str) else sorted({*result} - dropped)
            note = result if isinstance(result, str) else ", ".join(failed[:2])
            noticed += bool(failed)
            what, function, *_ = MUTANTS[number - 1]
            print(f"{'noticed' if failed else '-':<8} {number:>3} {function}: {what}", end="")
            print(f" ({note})" if note else "", flush=True)
    text = f"{noticed} of {len(numbers)} wrong versions are noticed"
    if dropped:
        text += f"; dropped, since they fail on the right version: {', '.join(sorted(dropped))}"
    return min(noticed, POINTS_FOR_TESTS), text


def bug_numbers(text):
    return [int(number) for number in text.split(",")]


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--functions", type=parts_named, default=list(PARTS))
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--bugs", type=bug_numbers, default=[])
    parser.add_argument("--variant", type=int, choices=range(len(VARIANTS)), default=0)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--gradescope", type=Path)
    args = parser.parse_args(argv)
    if not (args.folder or args.tests):
        sys.exit("error: name the folder of a solution, or --tests")
    if args.folder and not (args.folder / "grpo.py").exists():
        sys.exit(f"error: {args.folder} holds no grpo.py: name the folder of a solution")
    results = {}
    if args.tests:
        sys.path.insert(0, str(ROOT))
        from test_mutants import MUTANTS

        numbers = args.bugs or range(1, len(MUTANTS) + 1)
        if not set(numbers) <= set(range(1, len(MUTANTS) + 1)):
            sys.exit(f"error: --bugs are numbers from 1 to {len(MUTANTS)}")
        results["tests"] = grade_tests(args.tests, args.variant, numbers)
        if args.bugs:
            return print(results["tests"][1])
    if args.folder:
        if (variant := variant_of(args.folder)) != args.variant:
            print(f"note: {args.folder} has the names of --variant {variant}")
        results = grade(args.folder, args.variant, args.functions) | results
    for part, (points, text) in results.items():
        print(f"{part:<26} {points:>5.1f} of {MOST[part]:>3}   {text}")
    earned = sum(points for points, _ in results.values())
    print(f"{'sum':<26} {earned:>5.1f} of {sum(MOST[part] for part in results):>3}")
    if args.junit:
        write_junit(args.junit, results)
    if args.gradescope:
        write_gradescope(args.gradescope, results)


if __name__ == "__main__":
    main(sys.argv[1:])
