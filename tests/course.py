"""The parts of the course, in the order to write them, and the names that change with a variant.

make_assignment.py blanks these functions, grade.py gives points for them; see README.md.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["grpo.py", "reward.py", "eval.py", "train.py"]
BLANK = "is yours to write"  # what a blank function raises; conftest.py skips tests that meet it


class Part(NamedTuple):
    points: int  # 100 in all
    minutes: int  # a guess, after a trial
    tests: str  # a file of tests, and words for its option -k
    task: str


PARTS = {
    "grpo.outcome_advantages": Part(
        8, 20, "objective advantages or groups or rewards", "4.1.2: a reward against its group"
    ),
    "grpo.process_advantages": Part(
        6, 35, "objective advantages or steps or process", "4.1.3: rewards of steps, summed"
    ),
    "grpo.token_weights": Part(4, 15, "objective", "the two means in front of eq. 3, as weights"),
    "grpo.clipped_surrogate": Part(8, 10, "objective", "eq. 3: ratio, clip and min"),
    "grpo.kl_estimate": Part(5, 10, "objective", "eq. 4: an estimate of the KL, never negative"),
    "grpo.grpo_loss": Part(10, 45, "objective", "eq. 3: all of it, with the sign flipped"),
    "grpo.micro_batches": Part(4, 15, "objective", "rows that fit in memory together"),
    "grpo.completion_mask": Part(4, 10, "objective eos", "which tokens belong to a completion"),
    "grpo.sample_token": Part(6, 20, "sampling", "one token per row, and its log-prob"),
    "grpo.sample_groups": Part(
        10, 120, "sampling", "line 7: G completions per prompt, with a cache"
    ),
    "grpo.token_logprobs": Part(10, 120, "sampling", "log pi of each token, and the entropy"),
    "reward.extract_answer": Part(
        5, 50, "reward marked or hostile or fuzzed", "the text that is marked as the answer"
    ),
    "reward.accuracy_reward": Part(
        2, 5, "reward equal_answers or copying or missing or hostile", "1.0 or 0.0"
    ),
    "train.sample_batch": Part(
        8, 45, "train naive_loop or its_own_gold or tell_apart", "lines 7 to 9: sample and compare"
    ),
    "train.update": Part(
        10, 45, "train naive_loop or old_logprobs or not_finite", "lines 10 and 11: mu updates"
    ),
}

# Last year's solution loses points this year: names and a value that change, for each variant. The
# new names are as long as the old ones, so that lines and tables keep their width.
VARIANTS = [
    {},
    {
        "STD_EPSILON = 1e-4": "STD_EPSILON = 5e-4",
        "STD_EPSILON": "SPREAD_BIAS",
        "MAX_LOG_RATIO": "LOG_RATIO_CAP",
        "clip_low": "low_clip",
        "clip_high": "high_clip",
        "sequence": "rollouts",
        "completion_ids": "generation_ids",
        "logp_ref": "ref_logp",
    },
    {
        "STD_EPSILON = 1e-4": "STD_EPSILON = 2e-4",
        "STD_EPSILON": "SCALE_FLOOR",
        "MAX_LOG_RATIO": "RATIO_LOG_MAX",
        "clip_low": "eps_down",
        "clip_high": "eps_above",
        "sequence": "response",
        "completion_ids": "sampled_tokens",
        "logp_ref": "logp_sft",
    },
]


# What students do not get.
STAY = [
    "README.md",
    "RESULTS.md",
    "bench.py",
    "course.py",
    "grade.py",
    "handout.md",
    "make_assignment.py",
    "miniature.py",
    "one_step.py",
    "smollm2.py",
    "test_assignment.py",
    "test_grade.py",
    "test_learning.py",
    "test_miniature.py",
    "test_mutants.py",
    "test_readme.py",
    "test_train.py",  # a second, slow solution of all of it
]


def vary(text, variant):
    """Return a script or a test with the names of a variant; 0 leaves it as it is."""
    for old, new in VARIANTS[variant].items():
        text = re.sub(rf"\b{old}\b", new, text)
        # The same name as an option of the command line.
        text = re.sub(rf"--{old.replace('_', '-')}\b", f"--{new.replace('_', '-')}", text)
    return text


def fault_of(names):
    """Say why a variant, {old: new}, would not work, or return ""."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.name != "course.py"]
    words = set(re.findall(r"\w+", " ".join(texts)))
    for i, (old, new) in enumerate(names.items()):
        name = old.partition(" ")[0]
        if any(known.endswith(f".{name}") for known in PARTS):
            return f"{name} is a function to write, and keeps its name"
        if name not in words:
            return f"{name} occurs nowhere"
        if old == name and new in words:
            return f"{new} occurs already"
        if name in [*names][:i]:
            return f"{old} has to stand before {name}"
    return ""


def copy_scripts(folder, variant):
    """Copy the scripts into a folder, with the names of a variant."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["requirements.txt", "LICENSE", ".gitignore"]:
        shutil.copy(ROOT / name, folder)
    for name in SCRIPTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        (folder / name).write_text(vary(text, variant), encoding="utf-8")


def copy_project(folder, variant, leave_out=()):
    """Copy scripts and tests, but for some of these, into a folder, with the names of a variant."""
    copy_scripts(folder, variant)
    leave_out = shutil.ignore_patterns("__pycache__", *leave_out)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=leave_out)
    for path in (folder / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(vary(text, variant), encoding="utf-8")


def plant_bug(folder, number, variant):
    """Plant wrong version `number` of test_mutants.py in a copy. Returns (what is wrong, where)."""
    from test_mutants import MUTANTS, plant

    what, function, _, right, wrong = MUTANTS[number - 1]
    script = function.partition(".")[0] + ".py"
    text = plant((ROOT / script).read_text(encoding="utf-8"), function, right, wrong)
    (folder / script).write_text(vary(text, variant), encoding="utf-8")
    return what, function


def parts_named(text):
    """Return the parts of some functions, "kl_estimate,grpo_loss", in the order to write; of "none"
    no part. Exits with an error if there is no such function.
    """
    known = {part.partition(".")[2]: part for part in PARTS}
    names = [] if text == "none" else text.split(",")
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no function {', '.join(unknown)}: take some of {', '.join(known)}")
    if "extract_answer" in names:
        names.append("accuracy_reward")  # it hides errors, so a blank inside would not show
    return [part for name, part in known.items() if name in names]
