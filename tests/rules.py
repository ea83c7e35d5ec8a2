"""Check files against the rules of the assignment: what they import and use, and copied tests.

    python tests/rules.py    grpo.py, reward.py, train.py, and the test files that are yours

grade.py gives no points for a file that breaks a rule.
"""

import ast
import sys
from pathlib import Path

ALLOWED = {"collections", "contextlib", "functools", "itertools", "math", "torch", "typing"}
# What each script imports besides. All other files are a student's tests.
IMPORTS = {
    "grpo.py": "tqdm transformers",
    "reward.py": "ast copy fractions mpmath operator random re runpy unicodedata zlib",
    "train.py": "bisect copy dataclasses eval fcntl grpo json numpy os pathlib random reward signal"
    " sys time tokenizers tqdm transformers zlib",
}
FOR_TESTS = "adapters conftest eval grpo helpers pytest random reward train"
FORBIDDEN = {"__import__", "breakpoint", "compile", "delattr", "eval", "exec", "globals", "setattr"}
FORBIDDEN_IN_TESTS = {"getattr", "open", "vars"}
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
MINE = ["test_mine.py", "test_bug_1.py", "test_bug_2.py"]


def imported_modules(tree):
    """Return the modules that a script imports: {first part of the name}."""
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def broken_rule(path):
    """Return which rule a file breaks, or "" if none."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return f"cannot be read: {error}"
    modules = imported_modules(tree)
    allowed = ALLOWED | set(IMPORTS.get(path.name, FOR_TESTS).split())
    if more := sorted(modules - allowed):
        return f"imports {', '.join(more)}"
    # After `import eval`, that name is a module.
    plain = [alias for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    forbidden = FORBIDDEN if path.name in IMPORTS else FORBIDDEN | FORBIDDEN_IN_TESTS
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


def tests_in(text):
    """Return the tests of a file, without names and docstrings: {what is left: name}."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    found = {}
    for node in nodes:
        if node.name.startswith("test"):
            body = node.body[ast.get_docstring(node) is not None :]
            found["".join(map(ast.dump, body))] = node.name
    return found


def copied_tests(text, handed_out):
    """Return the names of the tests in a text that some of these other texts have, too."""
    theirs = {body for other in handed_out for body in tests_in(other)}
    return [name for body, name in tests_in(text).items() if body in theirs]


def main():
    folder = Path(__file__).parents[1]
    handed_out = [path for path in folder.glob("tests/test_*.py") if path.name not in MINE]
    texts = [path.read_text(encoding="utf-8") for path in handed_out]
    broken = 0
    for path in (*map(folder.joinpath, IMPORTS), *map((folder / "tests").joinpath, MINE)):
        if path.exists():
            reason = broken_rule(path)
            if not reason and path.name in MINE:
                copies = copied_tests(path.read_text(encoding="utf-8"), texts)
                reason = f"copies {', '.join(copies)}" if copies else ""
            print(f"{path.relative_to(folder)}: {reason or 'keeps the rules'}")
            broken += bool(reason)
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
