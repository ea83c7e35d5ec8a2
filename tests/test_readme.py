"""What the README says can be typed is there: commands, files, links, tests. And the card."""

import ast
import json
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
from course import parts_named
from test_mutants import FLAGS

import eval as evaluation
import train

ROOT = Path(train.__file__).parent
SCRIPTS = ["grpo.py", "reward.py", "eval.py", "train.py"]
PAGES = {
    page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "tests/README.md")
}
README = "\n".join(PAGES.values())
FENCES = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", README, re.M | re.S)
TYPED = [line for _, language, text in FENCES if not language for line in text.splitlines()]
PROSE = re.sub(r"(?ms)^ *```.*?^ *```$", "", README)
TYPED += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
PARTS = [part.strip() for line in TYPED for part in line.split("&&")]
COMMAND = re.compile(r"([A-Z_]+=\S+ )*((python|pip|grep|bash) .*)")
COMMANDS = sorted({COMMAND.fullmatch(part)[2] for part in PARTS if COMMAND.fullmatch(part)})


def names_of_tests():
    """Return the names of all tests of the project."""
    names = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
    return names


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    command = re.sub(r"\bS\b", "0", command).replace(" ...", "")  # S: a seed
    program, *words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    if words[1:] == ["--help"]:
        return
    if words[0] == "train.py":
        if "--resume" in words:
            run = Path(words[words.index("--resume") + 1])
            run.mkdir(parents=True)
            config = vars(train.Config(problems="gsm8k", model="m"))
            (run / "run.json").write_text(json.dumps({"config": config}))
        train.parse_config(words[1:])
    elif words[0] == "eval.py":
        evaluation.parse_options(evaluation.Options, words[1:], "")
    elif words[:2] == ["-m", "pytest"] and "-k" in words:
        assert any(words[words.index("-k") + 1] in name for name in names_of_tests())
    elif words[0].endswith(".py") and words[0] != "brief.py":
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), "an option"
        if "--bug" in words:
            assert int(words[words.index("--bug") + 1]) in FLAGS
        if "--functions" in words and "a,b" not in words:
            parts_named(words[words.index("--functions") + 1])  # it exits if there is none
    elif program == "pip":
        assert words[0] == "install"
    for word in words:  # files of this project that a command names
        if re.fullmatch(r"(tests|\.github|\.ci)(/\S+)?|(grpo|reward|eval|train)\.py", word):
            assert (ROOT / word).exists(), word


def test_there_are_commands_and_every_option_exists():
    """Options that stand in sentences, too."""
    assert len(COMMANDS) > 15 and any("--resume" in command for command in COMMANDS)
    fields = [*vars(train.Config()), *vars(evaluation.Options())]
    ours = {"--" + name.replace("_", "-") for name in fields} | {"--help"}
    for name in ("bench.py", "grade.py", "make_assignment.py", "miniature.py", "one_step.py"):
        source = (ROOT / "tests" / name).read_text(encoding="utf-8")
        ours |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    # of pip, accelerate and torchrun
    others = {"--index-url", "--num_processes", "--use_deepspeed", "--zero_stage"}
    others |= {"--nproc_per_node"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= ours | others


def test_code_blocks_are_python_and_rewards_are_defined():
    defined = set()
    for _, language, text in FENCES:
        if language == "python" or re.match(r" *(from|import) ", text):
            for node in ast.parse(textwrap.dedent(text)).body:
                defined.add(getattr(node, "name", None))
    named = set(re.findall(r"--reward \w+\.py:(\w+)", README)) - {"FUNCTION"}
    assert named and named <= defined


def test_links_and_names_lead_somewhere():
    """Links of the README, the tests that it names, and the test beside every TRAP of the code."""
    for page, text in PAGES.items():
        headings = [line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")]
        anchors = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, target
            elif not target.startswith("http"):
                file = target.partition("#")[0]
                assert (ROOT / page).parent.joinpath(file).exists(), target
    known = names_of_tests()
    assert set(re.findall(r"`(test_\w+)`", README)) - {"test_objective", "test_mutants"} <= known
    traps = 0
    for name in SCRIPTS:
        text = " ".join(re.sub(r"\n *#? *", " ", (ROOT / name).read_text("utf-8")).split())
        for trap in text.split("TRAP: ")[1:]:
            assert re.findall(r"\((test_\w+)\)", trap[:450])[0] in known, trap[:450]
            traps += 1
    assert traps >= 12


def test_the_card_is_kept():
    """Five packages, four scripts, nothing else at the top; line counts as in the README."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = {re.match(r"\w+", line)[0] for line in lines if line.strip()}
    assert packages == {"torch", "transformers", "tqdm", "numpy", "pytest"}
    top = {*SCRIPTS, "tests", "requirements.txt", "README.md", "LICENSE", ".gitignore"}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        tracked = {name.partition("/")[0] for name in done.stdout.splitlines()}
        assert tracked <= top | {".ci", ".github"}
    for name in SCRIPTS:
        count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert f"[{name}]({name}) | {count} |" in README
    for picture in (ROOT / ".github").glob("*.*g"):
        assert picture.stat().st_size <= 150_000
    assert len(PAGES["README.md"].encode()) <= 15_000
    assert len(PAGES["tests/README.md"].encode()) <= 12_000
    assert len(PAGES["README.md"].splitlines()) <= 300
