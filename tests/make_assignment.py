"""Make an assignment out of this project, in a new folder:

    python tests/make_assignment.py FOLDER                      all functions of course.py are blank
    python tests/make_assignment.py FOLDER --functions a,b      only these
    python tests/make_assignment.py FOLDER --functions none     no function: the solution
    python tests/make_assignment.py FOLDER --bug 12             a bug of test_mutants.py

Each of these takes --variant N, which renames constants and options, so that last year's solution
loses points.

A blank function keeps its signature and docstring, and raises NotImplementedError; helpers that
nothing else uses are removed. README.md becomes the hand-out (handout.md). Tests that hold
solutions, and those of the README, are left out. Then the tests of these functions run in both
folders: those skipped in the fork must be exactly those that call a blank function.
"""

import argparse
import ast
import functools
import importlib
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from course import (
    BLANK,
    PARTS,
    ROOT,
    STAY,
    VARIANTS,
    copy_project,
    copy_scripts,
    fault_of,
    parts_named,
    plant_bug,
    vary,
)


def functions(source):
    """Return the functions of a module: {name: its syntax tree}, in order."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def names_used(source):
    """Return all names that a module mentions, but for its own definitions."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {node.name for node in nodes if isinstance(node, ast.alias)}


def blank(source, names, elsewhere):
    """Return a script with these functions blank, without the helpers that only they use.

    elsewhere: the names that other scripts and tests use.
    """
    lines = source.splitlines(keepends=True)
    for name, node in reversed(functions(source).items()):  # from the end, so line numbers hold
        if name in names:
            body = slice(node.body[0].end_lineno, node.end_lineno)
            lines[body] = [f'    raise NotImplementedError("{name} {BLANK}")\n']
    text = "".join(lines)
    kept = names_used(text) | elsewhere | {part.partition(".")[2] for part in PARTS}
    kept.add("preallocate")  # no solution, and the hand-out has a hint on it
    for name, node in functions(text).items():
        if name not in kept:
            lines = text.splitlines(keepends=True)
            del lines[node.lineno - 1 : node.end_lineno + 2]  # and two blank lines behind it
            return blank("".join(lines), [], elsewhere)  # its own helpers may go, too
    return text


def write_blanks(folder, names):
    """Make these functions blank in the scripts of a fork."""
    used = {path: names_used(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}
    for script in ("grpo.py", "reward.py", "train.py"):
        elsewhere = set().union(*(used[path] for path in used if path.name != script))
        path = folder / script
        path.write_text(blank(path.read_text(encoding="utf-8"), names, elsewhere), encoding="utf-8")


class Watcher:
    """A plugin of pytest: which of some functions does each test call, which tests do not pass?"""

    def __init__(self):
        self.seen = set()
        self.calls = {}
        self.failed = set()
        self.skipped = set()

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
        if report.skipped and BLANK in report.longreprtext:
            self.skipped.add(report.nodeid)


def watch(project, parts, files):
    """Run files of tests of a project: ({test: calls}, tests that fail, that meet a blank)."""
    os.chdir(project)
    sys.path.insert(0, str(project))
    watcher = Watcher()
    for part in parts:
        module_name, _, name = part.partition(".")
        module = importlib.import_module(module_name)
        setattr(module, name, watcher.noted(getattr(module, name)))
    if pytest.main([*files, "-p", "no:terminal", "-p", "no:cacheprovider"], [watcher]) > 1:
        sys.exit(f"error: in {project} pytest cannot run {', '.join(files)}")
    return watcher.calls, watcher.failed, watcher.skipped


def check(folder, parts, variant):
    """Print how many tests each function has; exit with an error unless the right ones miss it."""
    files = {f"tests/test_{PARTS[part].tests.partition(' ')[0]}.py" for part in parts}
    files = sorted(files - {"tests/test_train.py"})  # which the fork has not
    if not files:
        return
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        both = pool.map(watch, (ROOT, folder), [parts] * 2, [files] * 2)
        (calls, broken, _), (_, failed, skipped) = both
    for part in parts:
        if part.startswith("train."):
            continue  # the fork has no tests of it
        count = sum(part.partition(".")[2] in called for called in calls.values())
        print(f"{part:<26} {count:>4} tests call it")
    # Names of tests may hold a name that the variant changes.
    expected = {vary(test, variant) for test, called in calls.items() if called}
    if misfits := sorted(broken | failed | skipped ^ expected):
        sys.exit(f"error: {len(misfits)} tests fail, or are skipped for no reason: {misfits[:5]}")
    print(
        f"{len(skipped)} of {len(calls)} tests are skipped there: those that call a blank function"
    )


def write_handout(folder, parts, variant):
    """Write the fork's README.md: handout.md with a table of its parts."""
    rows = []
    for number, part in enumerate(parts, 1):
        module, _, name = part.partition(".")
        points, minutes, tests, task = PARTS[part]
        file, _, words = tests.partition(" ")
        file = (
            "not here" if module == "train" else f"test_{file}.py" + f" -k '{words}'" * bool(words)
        )
        rows.append(
            f"| {number} | `{name}` | {module}.py | {task} | {file} | {points} | {minutes} |"
        )
    text = (ROOT / "tests" / "handout.md").read_text(encoding="utf-8").partition("\n")[2]
    ours = {part.partition(".")[2] for part in PARTS}
    names = {part.partition(".")[2] for part in parts}
    for item in re.findall(r"^- (?:.|\n(?!- |\n))*\n", text, re.M):
        about = ours & set(re.findall(r"`(\w+)`", item))
        if about and not about & names:  # a hint on functions that are not blank
            text = text.replace(item, "")
    text = text.replace("ROWS", "\n".join(rows))
    text = text.replace("POINTS", str(sum(PARTS[part].points for part in parts)))
    (folder / "README.md").write_text(vary(text, variant), encoding="utf-8")


def write_bug(folder, number, variant):
    """Write the scripts with wrong version `number` of test_mutants.py, and print the key."""
    from test_mutants import FLAGS

    copy_scripts(folder, variant)
    what, function = plant_bug(folder, number, variant)
    print(f"{folder} has one bug. For you alone: {function}: {what}.")
    print("With it, and without it in a right solution, this prints other numbers:")
    print(f"python train.py {vary(FLAGS[number], variant)}".rstrip())


def fail(message):
    sys.exit(f"error: {message}")


def parse(argv):
    """Return the options, with the full names of the parts."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--functions", dest="parts", type=parts_named, default=list(PARTS))
    parser.add_argument("--variant", type=int, choices=range(len(VARIANTS)), default=0)
    parser.add_argument("--bug", type=int)
    args = parser.parse_args(argv)
    if args.bug is not None:
        from test_mutants import FLAGS, MUTANTS

        if args.bug not in FLAGS:
            shown = ", ".join(map(str, FLAGS))
            fail(f"--bug {args.bug} shows in no run: of 1 to {len(MUTANTS)}, take {shown}")
    if fault := fault_of(VARIANTS[args.variant]):
        fail(f"variant {args.variant} of course.py would not work: {fault}")
    if args.folder.exists():
        fail(f"{args.folder} exists, and nothing is overwritten: name a new folder")
    return args


def main(argv):
    sys.path.insert(0, str(ROOT))
    args = parse(argv)
    if args.bug is not None:
        return write_bug(args.folder, args.bug, args.variant)
    copy_project(args.folder, args.variant, STAY)
    write_blanks(args.folder, [part.partition(".")[2] for part in args.parts])
    if args.parts:
        write_handout(args.folder, args.parts, args.variant)
    check(args.folder.resolve(), args.parts, args.variant)
    print(f"{args.folder} is ready")


if __name__ == "__main__":
    main(sys.argv[1:])
