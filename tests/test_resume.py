"""Nothing is lost: a run that was stopped, killed or out of disk goes on and becomes the run that would have been."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from eval import InputError
from helpers import make_chat_model

ROOT = Path(train.__file__).parent
# Twelve steps in three iterations; the last save is two steps behind the fifth step and one behind the border at 4.
FLAGS = (
    "--sft-steps 10 --steps 4 --iterations 3 --save-every 3 --questions 3 --eval-limit 3 --eval-samples 1 --eval-every 7 "
    "--show-every 0 --lr-warmup 0 --reward own.py:random_reward"
).split()
# "model" has the learned reward model in place of own.py, and is fitted behind steps 0 and 6; its SFT model knows a bit.
VARIANTS = {
    "1": [],
    "2": ["--mu", "2"],
    "model": (
        "--reward model --supervision process --iterations 2 --steps 6 --reward-size 20 --sft-steps 40"
    ).split(),
}
# All random numbers that a process has. the file stop_at holds the number of the call that fails.
OWN = """
import os, pathlib, random, signal, time, numpy, torch
calls = []

def random_reward(prompts, completions, answer):
    calls.append(1)
    if pathlib.Path("stop_at").exists() and len(calls) >= int(pathlib.Path("stop_at").read_text()):
        raise ValueError("stopped on purpose")
    if pathlib.Path("swallow").exists() and len(calls) == 6:
        try:
            pathlib.Path("now").touch()
            while pathlib.Path("now").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except BaseException:   # a reward that no error gets through
            return [0.0] * len(completions)
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in completions]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    train.load_reward.cache_clear()
    return tmp_path


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_state(run):
    """Everything that a run ends with, but for times and memory."""
    last = run / "checkpoints" / "12"
    state = torch.load(last / "state.pt", weights_only=True)
    assert state.pop("seconds") > 0
    log = [
        {
            key: value
            for key, value in row.items()
            if not key.startswith("t_") and key not in ("tok_s", "mem_gb")
        }
        for row in rows_of(run)
    ]
    assert [row["step"] for row in log] == list(range(13))
    paths = [*sorted(last.glob("*.safetensors")), run / "model.safetensors"]
    return dict(weights={path.stem: load_file(path) for path in paths}, state=state, log=log)


def assert_same(a, b, where="state"):
    """Equal bit by bit, whatever is in there."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b), where
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    else:
        assert a == b, where


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-u", ROOT / "train.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def resume(run):
    process = command("--resume", run)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """variant -> what a run that nobody stops ends with."""
    ends, here = {}, os.getcwd()
    os.chdir(tmp_path_factory.mktemp("straight"))
    Path("own.py").write_text(OWN)
    for variant, flags in VARIANTS.items():
        train.load_reward.cache_clear()
        train.main([*FLAGS, *flags, "--out", f"run{variant}"])
        ends[variant] = final_state(Path(f"run{variant}"))
    os.chdir(here)
    return ends


def failing_at(number, function):
    calls = []

    def counted(*given):
        calls.append(1)
        if len(calls) == number:
            raise InputError("stopped on purpose")
        return function(*given)

    return counted


# --- Resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_steps_and_seven_are_twelve_steps(variant, folder, straight, monkeypatch):
    """Bit by bit, across the border of an iteration; the sixth step has been dropped while sampling."""
    Path("stop_at").write_text("6")
    if variant == "model":  # own.py is not asked, so fail after the first fit and five steps
        monkeypatch.setattr(train, "score", failing_at(6, train.score))
    with pytest.raises(InputError, match="stopped on purpose"):
        train.main([*FLAGS, *VARIANTS[variant], "--out", "run"])
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())] == ["3", "5"]
    Path("stop_at").unlink()
    if variant == "1":
        resume("run")  # in a new process
    else:
        monkeypatch.undo()
        os.chdir(folder)
        train.main(["--resume", "run"])
    assert_same(final_state(Path("run")), straight[variant])


@pytest.mark.slow
def test_what_a_gpu_keeps_in_bf16_is_resumed_as_well(folder, monkeypatch):
    """The copy that samples and the reference, on a CPU."""
    monkeypatch.setattr(train, "pick_device", lambda name: (torch.device("cpu"), True))
    train.main([*FLAGS, "--out", "straight"])
    train.load_reward.cache_clear()
    Path("stop_at").write_text("6")
    with pytest.raises(InputError, match="stopped on purpose"):
        train.main([*FLAGS, "--out", "run"])
    Path("stop_at").unlink()
    train.main(["--resume", "run"])
    assert_same(final_state(Path("run")), final_state(Path("straight")))
    assert {
        weight.dtype for weight in final_state(Path("run"))["weights"]["reference"].values()
    } == {torch.bfloat16}


def test_the_random_numbers_and_both_passes_matter(straight):
    """What the comparison above rests on: rewards vary, weights move, mu = 2 is another run."""
    log = straight["1"]["log"]
    assert len({row["reward"] for row in log[1:]}) == 12 and all(
        row["grad_norm"] > 0 for row in log[1:]
    )
    assert not torch.equal(
        straight["1"]["weights"]["policy"]["lm_head.weight"],
        straight["2"]["weights"]["policy"]["lm_head.weight"],
    )
    assert not torch.equal(
        straight["1"]["weights"]["policy"]["lm_head.weight"],
        straight["1"]["weights"]["reference"]["lm_head.weight"],
    )


def test_a_run_that_has_finished_stays_as_it_is_and_its_time_goes_on(folder, capsys):
    train.main([*FLAGS, "--out", "run"])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["12", "9"]
    before = json.loads(Path("run/summary.json").read_text())
    Path(
        "run/summary.json"
    ).unlink()  # as if the process had been killed just before it was written
    state = torch.load("run/checkpoints/12/state.pt", weights_only=True)
    torch.save({**state, "seconds": 1000.0}, "run/checkpoints/12/state.pt")
    train.main(["--resume", "run"])
    after = json.loads(Path("run/summary.json").read_text())
    assert (
        1000 < after["seconds"] < 1060
        and before["after"] == after["after"]
        and before["before"] == after["before"]
    )

    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    train.main(["--resume", "run"])
    assert "run has finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_what_is_not_as_it_was_is_refused(folder):
    Path("own.jsonl").write_text(
        "".join('{"question": "1+%d?", "answer": "2"}\n' % n for n in range(20))
    )
    model = str(make_chat_model(folder / "model"))
    arguments = [
        "--model",
        model,
        "--problems",
        "own.jsonl",
        "--steps",
        "2",
        "--questions",
        "2",
        "--group-size",
        "2",
        "--out",
        "run",
        "--max-new-tokens",
        "4",
        "--eval-samples",
        "2",
        "--save-every",
        "1",
        "--reward",
        "own.py:random_reward",
    ]
    Path("stop_at").write_text("2")
    with pytest.raises(InputError, match="on purpose"):
        train.main(arguments)
    log = Path("run/metrics.jsonl").read_bytes()
    Path("stop_at").unlink()
    with pytest.raises(InputError, match="--temperature 0.5 contradicts the run's 1.0"):
        train.main(["--resume", "run", "--temperature", "0.5"])
    lines = Path("own.jsonl").read_text()
    Path("own.jsonl").write_text(lines.replace("1+7", "1+8"))
    with pytest.raises(InputError, match="--resume run: its problems or its model have changed"):
        train.main(["--resume", "run"])
    Path("own.jsonl").write_text(lines)
    template = Path("model/chat_template.jinja").read_text()
    Path("model/chat_template.jinja").write_text(template.replace("user", "User") + " ")
    with pytest.raises(InputError, match="its problems or its model have changed"):
        train.main(["--resume", "run"])
    Path("model/chat_template.jinja").write_text(template)
    assert Path("run/metrics.jsonl").read_bytes() == log  # nothing of this has touched the log
    # The options for memory may change, and what is as it was may be said again.
    train.main(
        [
            "--resume",
            "run",
            "--micro-tokens",
            "100",
            "--sample-tokens",
            "50",
            "--temperature",
            "1.0",
            "--out",
            "run",
        ]
    )
    assert [row["step"] for row in rows_of(Path("run"))] == [0, 1, 2]


def test_a_damaged_checkpoint_is_named_and_without_it_the_one_before_is_taken(folder, straight):
    """And nothing is touched."""
    Path("stop_at").write_text("6")
    with pytest.raises(InputError, match="stopped on purpose"):
        train.main([*FLAGS, "--out", "run"])
    Path("stop_at").unlink()
    log = Path("run/metrics.jsonl").read_bytes()
    for name in ("reference.safetensors", "state.pt"):
        path = Path("run/checkpoints/5", name)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1000])
        with pytest.raises(
            InputError,
            match="run/checkpoints/5 is damaged, or not of this model: delete it to go on with the one",
        ):
            train.main(["--resume", "run"])
        path.write_bytes(whole)
    assert Path("run/metrics.jsonl").read_bytes() == log
    shutil.rmtree("run/checkpoints/5")
    train.main(["--resume", "run"])
    assert_same(final_state(Path("run")), straight["1"])


def test_a_checkpoint_runs_no_code(folder):
    """A pickle that would run code is refused, by weights_only=True."""

    class Harmful:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    train.main([*FLAGS, "--steps", "1", "--iterations", "1", "--out", "run"])
    Path("run/summary.json").unlink()
    torch.save({"optimizer": Harmful()}, "run/checkpoints/1/state.pt")
    with pytest.raises(InputError, match="run/checkpoints/1 is damaged.*Weights only load failed"):
        train.main(["--resume", "run"])
    assert not Path("harm").exists()


# --- Kills and signals ------------------------------------------------------------------------------


def killed_at(kind, number, variant, folder):
    """Start the run, and kill it after so many seconds, begun checkpoints or lines of the log; or as its model is saved."""
    process, run = command(*FLAGS, *VARIANTS[variant], "--out", "run", cwd=folder), folder / "run"
    next(line for line in process.stdout if "the run goes to run" in line)
    begin, saves, was, log = time.perf_counter(), 0, False, run / "metrics.jsonl"
    while process.poll() is None:
        now = (run / "checkpoints" / "unfinished").exists()
        saves, was = saves + (now and not was), now
        if {
            "seconds": lambda: time.perf_counter() - begin >= number,
            "save": lambda: saves == number,
            "line": lambda: log.exists() and log.read_bytes().count(b"\n") > number,
            "model": (run / "model.safetensors").exists,
        }[kind]():
            break
    process.kill()
    process.communicate()
    return process.returncode


MOMENTS = [
    *(("seconds", seconds) for seconds in (0.0, 0.3, 0.6, 0.9)),
    *(("save", number) for number in (1, 2, 3, 4, 5)),
    *(("line", number) for number in (0, 1, 2, 3, 4, 5, 7, 8, 10, 11)),
    ("model", 1),
]


def kill_and_resume(moment, variant, folder, straight):
    status = killed_at(*moment, variant, folder)
    assert status == -signal.SIGKILL
    whole = sorted(path.name for path in (folder / "run").glob("checkpoints/*[0-9]"))
    resume("run")
    print(f"killed at {moment}, whole checkpoints {whole}")
    assert_same(final_state(folder / "run"), straight[variant])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["12", "9"]


@pytest.mark.parametrize("moment, variant", [(("save", 3), "model")])
def test_a_killed_run_becomes_the_run_that_would_have_been(moment, variant, folder, straight):
    kill_and_resume(moment, variant, folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["1", "model"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(moment, variant, folder, straight):
    kill_and_resume(moment, variant, folder, straight)


def test_sigterm_saves_and_names_the_command_that_goes_on(folder, straight, capsys):
    process = command(*FLAGS, "--out", "run", "--save-every", "0")
    for line in process.stdout:
        if re.match(r" +4 ", line):  # the fourth step has been printed
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors
    assert "stopped; to go on: python train.py --resume run" in errors
    first, saved = sorted(Path("run/checkpoints").iterdir(), key=lambda path: int(path.name))
    assert first.name == "0" and 3 <= int(saved.name) < 12
    train.main(["--resume", "run"])
    assert f"from step {saved.name}, the run goes to run" in capsys.readouterr().out
    weights, expected = load_file("run/model.safetensors"), straight["1"]["weights"]["model"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [row["step"] for row in rows_of(Path("run"))] == list(range(13))


def test_ctrl_c_saves_even_if_it_has_ended_the_reader_of_the_output_and_a_reward_catches_it(
    folder, straight
):
    """As in `python train.py 2>&1 | tee log`; and the rewards that were made up on the way do not get into the run."""
    Path("swallow").touch()
    process = command(*FLAGS, "--out", "run")
    while not Path("now").exists() and process.poll() is None:  # the sixth step is being sampled
        time.sleep(0.01)
    process.stdout.close()
    process.stderr.close()
    Path("now").unlink()
    assert process.wait(timeout=60) == 130 and Path("run/checkpoints/5").is_dir()
    Path("swallow").unlink()
    train.main(["--resume", "run"])
    assert_same(final_state(Path("run")), straight["1"])


SLOW_UPDATE = """
import signal, sys, time
sys.path.insert(0, sys.argv.pop())
import eval, train
train.update = lambda *_: (print("in the update", flush=True), time.sleep(60))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, train.on_signal)
eval.run_cli(train.main)
"""


@pytest.mark.slow
def test_the_second_ctrl_c_ends_the_process_at_once(folder):
    Path("slow.py").write_text(SLOW_UPDATE)
    process = subprocess.Popen(
        [sys.executable, "-u", "slow.py", *FLAGS, "--sft-steps", "0", "--out", "run", str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "in the update" in line:
            break
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "again" in line:
            break
    time.sleep(1)
    assert process.poll() is None  # it waits for the update
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


# --- Disk, memory, numbers --------------------------------------------------------------------------


def test_a_save_on_a_full_disk_leaves_the_checkpoints_before_whole(folder, straight, capsys):
    """A limit on the size of a file takes the place of the full disk: from step 7 on nothing large can be written."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    reward, calls = train.load_reward("own.py:random_reward"), []

    def filling(**arguments):
        calls.append(1)
        if len(calls) == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
        return reward(**arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "load_reward", lambda name: filling)
            with pytest.raises(
                OSError, match="the checkpoint of step 9 could not be written: .*File too large"
            ):
                train.main([*FLAGS, "--out", "run"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert len(calls) == 9 and sorted(path.name for path in Path("run/checkpoints").iterdir()) == [
        "3",
        "6",
    ]
    assert "python train.py --resume run" in capsys.readouterr().err
    train.main(["--resume", "run"])
    assert_same(final_state(Path("run")), straight["1"])


@pytest.mark.parametrize(
    "function, phase, saved",
    [
        ("sample_problems", "sampling of step 1", ["0"]),
        ("update", "update of step 1", ["0"]),
        ("evaluate", "evaluation after step 0", []),
    ],
)
def test_out_of_memory_names_the_phase_and_what_helps(
    function, phase, saved, folder, monkeypatch, capsys
):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, function, full)
    with pytest.raises(
        InputError, match=f"out of memory in the {phase}, peak 0.0 GB: lower"
    ) as error:
        train.main([*FLAGS, "--out", "run", "--save-every", "1", "--sft-steps", "0"])
    for flag in ("--sample-tokens", "--micro-tokens", "--group-size", "--activation-checkpointing"):
        assert flag in str(error.value)
    assert (
        "\n" not in str(error.value) and "python train.py --resume run" in capsys.readouterr().err
    )
    assert [path.name for path in Path("run").glob("checkpoints/*")] == saved
    monkeypatch.undo()


def spoiled(row, function):
    """score_rows, in which one completion has become nan."""

    def spoil(model, rows, *rest):
        logp, *others = function(model, rows, *rest)
        return logp.masked_fill((torch.tensor(rows) == row)[:, None], float("nan")), *others

    return spoil


@pytest.mark.parametrize(
    "case, phase, blamed",
    [
        ("warm-up", "step [2-9] of the warm-up", None),
        ("log-prob", "reference pass of step 1", [5]),
        ("update", "update of step 1", [5]),
        ("gradient", "update of step 1", list(range(24))),
        ("sampler", "sampling of step 2", None),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_and_are_saved(
    case, phase, blamed, folder, monkeypatch
):
    texts, original = [], train.sample_and_score
    monkeypatch.setattr(
        train,
        "sample_and_score",
        lambda *rest: (batch := original(*rest), texts.append(batch.texts))[0],
    )
    flags = []
    if case == "warm-up":
        flags = ["--sft-lr", "1e18"]
    elif case in ("log-prob", "update"):
        good = train.score_rows
        flags = ["--kl-beta", "0"] if case == "update" else []
        monkeypatch.setattr(
            train,
            "score_rows",
            lambda model, rows, *rest: (spoiled(5, good) if texts else good)(model, rows, *rest),
        )
    elif case == "gradient":
        flags = ["--sft-steps", "0"]
        monkeypatch.setattr(
            train,
            "grpo_loss",
            lambda *rest, loss=train.grpo_loss: (loss(*rest)[0] * float("inf"), loss(*rest)[1]),
        )
    else:
        flags = ["--lr", "1e18"]
    with pytest.raises(
        FloatingPointError, match=f"inf or nan in the {phase}, first with question '"
    ) as error:
        train.main([*FLAGS, *flags, "--out", "run"])
    found = json.loads(Path("run/not-finite.json").read_text())
    assert (
        re.fullmatch(phase, found["phase"])
        and found["completions"]
        and "\n" not in str(error.value)
    )
    assert all(re.fullmatch(r"[-+0-9]+", question) for question, text in found["completions"])
    if blamed:
        assert [text for _, text in found["completions"]] == [texts[0][row] for row in blamed]
    steps = (
        [row["step"] for row in rows_of(Path("run"))] if Path("run/metrics.jsonl").exists() else []
    )
    assert steps == {"warm-up": [], "sampler": [0, 1]}.get(
        case, [0]
    )  # the step is not in the log, and not skipped
    assert [path.name for path in Path("run").glob("checkpoints/*")] == (
        [] if case == "warm-up" else ["0"]
    )
