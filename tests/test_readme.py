"""What the README says can be typed is there: its commands, files, links, line counts. And the card of the project."""

import ast
import dataclasses
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import eval as evaluation
import make_assignment
import train
from test_mutants import MUTANTS

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", README, re.M | re.S)
TYPED = [line.strip() for _, language, text in FENCES if not language for line in text.splitlines()]
TYPED += [
    " ".join(code.split())
    for code in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^ *```.*?^ *```$", "", README))
]
COMMANDS = sorted(
    {
        part.strip()
        for line in TYPED
        for part in line.split("&&")
        if re.match(r"([A-Z_]+=\S+ )*(python|pip|grep|bash) ", part.strip())
    }
)
TESTS = {
    node.name: path.name
    for path in (ROOT / "tests").glob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


class Reached(Exception):
    """The command line was understood."""


def understood(program, words, folder, monkeypatch):
    """Parse the options of train.py or eval.py, as the program does, and stop there."""

    def stop(*_, **__):
        raise Reached

    for flag, run in zip(words, words[1:]):  # the runs that it goes on with
        if flag == "--resume" or flag == "--model" and run.startswith("runs/"):
            (folder / run).mkdir(parents=True)
            config = dataclasses.asdict(train.Config(problems=run[5:].partition("-")[0]))
            (folder / run / "run.json").write_text(json.dumps({"config": config}))
    monkeypatch.chdir(folder)
    for module, name in (
        (train, "load_reward"),
        (evaluation, "load_problems"),
        (evaluation, "pick_device"),
        (evaluation, "compare"),
    ):
        monkeypatch.setattr(module, name, stop)
    with pytest.raises(SystemExit if "--help" in words else Reached):
        (train if program == "train.py" else evaluation).main(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    command = re.sub(r"\bS\b", "0", command).replace(" ...", "")  # S: a seed
    command = re.sub(r"^([A-Z_]+=\S+ )+", "", command)  # settings of the environment
    program, *words = shlex.split(command)
    if program == "python" and words[0] in ("train.py", "eval.py"):
        return understood(words[0], words[1:], tmp_path, monkeypatch)
    if program == "python" and words[:2] == ["-m", "pytest"]:
        names = words[words.index("-k") + 1].split(" or ") if "-k" in words else []
        assert all(any(name in test for test in TESTS) for name in names)
    elif program == "python" and words[0].endswith(".py"):
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), (
            "an unknown option"
        )
        if "--bug" in words:
            assert 1 <= int(words[words.index("--bug") + 1]) <= len(MUTANTS)
        if "--functions" in words and "a,b" not in words:
            functions = make_assignment.public_functions(
                (ROOT / "grpo.py").read_text(encoding="utf-8")
            )
            assert set(words[words.index("--functions") + 1].split(",")) <= set(functions)
    elif program == "pip":
        assert words[0] == "install"
    for word in words:  # files of this project that a command names
        if re.fullmatch(r"(tests|\.github|\.ci)(/\S+)?|\w+\.(py|txt)", word) and word not in (
            "brief.py",
            "grpo_trl.py",
        ):
            assert (ROOT / word).exists(), word


def test_there_are_commands_and_every_option_exists():
    """Options that stand in sentences, too."""
    assert len(COMMANDS) > 20 and any("--resume" in command for command in COMMANDS)
    ours = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(train.Config)} | {
        "--help"
    }
    for path in ("eval.py", "tests/bench.py", "tests/make_assignment.py"):
        ours |= set(
            re.findall(
                r'add(?:_argument)?\("(--[a-z-]+)"', (ROOT / path).read_text(encoding="utf-8")
            )
        )
    others = {
        "--index-url",
        "--num_processes",
        "--use_deepspeed",
        "--zero_stage",
        "--nproc_per_node",
    }  # of pip, accelerate, torchrun
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= ours | others


def test_code_blocks_are_python_and_rewards_are_defined():
    blocks = [
        text
        for _, language, text in FENCES
        if language == "python" or re.match(r" *(from|import) ", text)
    ]
    defined = {
        node.name
        for text in blocks
        for node in ast.parse(textwrap.dedent(text)).body
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"--reward (\w+\.py):(\w+)", README)) - {("FILE.py", "FUNCTION")}
    assert len(blocks) >= 3 and named and {function for _, function in named} <= defined


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_test_that_is_named_exists():
    """In the README, and beside every TRAP of the code, which must name one."""
    assert {name for name in re.findall(r"`(test_\w+)`", README)} <= set(TESTS)
    traps = 0
    for name in make_assignment.SCRIPTS:
        for trap in (ROOT / name).read_text(encoding="utf-8").split("TRAP:")[1:]:
            (test,) = re.findall(
                r"\((test_\w+)\)", " ".join(re.sub(r"\n *#? *", " ", trap).split())[:400]
            )[:1]
            assert test in TESTS, test
            traps += 1
    assert traps >= 12


def test_the_card_is_kept():
    """Line counts as in the README's table, within the limits; five packages; a picture that is not too large."""
    lines = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in make_assignment.SCRIPTS
    }
    for name, limit in (("grpo.py", 400), ("reward.py", 400), ("eval.py", 380), ("train.py", 500)):
        assert lines[name] <= limit and f"[{name}]({name}) | {lines[name]} |" in README
    packages = {
        re.match(r"\w+", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip()
    }
    assert packages == {"torch", "transformers", "tqdm", "numpy", "pytest"}
    assert (ROOT / ".github" / "learning.png").stat().st_size <= 150_000
