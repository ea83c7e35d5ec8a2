"""Test that a run that was stopped goes on and becomes, to the bit, the run that never stopped."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch

import train
from eval import load_problems, pick_device, save_model
from reward import InputError, LearnedReward, step_rewards

FLAGS = (
    "--sft-steps 8 --sft-lr 1e-2 --steps 4 --iterations 3 --save-every 3 --questions 3 --lr 1e-3 "
    "--group-size 4 --max-new-tokens 8 --eval-limit 2 --eval-samples 1 --eval-every 7 --threads 1 "
    f"--show-every 5 --lr-warmup 0 --reward {__file__}:random_reward "
)
LEARNED = "--iterations 2 --steps 6 --reward model --supervision process --reward-size 20 "
VARIANTS = ["--mu 2 --kl-beta 0 ", LEARNED + "--max-new-tokens 12 ", "--sample-from reference "]
# When to kill: a file exists, the log has so many lines; seconds to wait then.
MOMENTS = [("run.json", 0, delay) for delay in (0.1, 0.3, 0.6, 0.9)]
MOMENTS += [("checkpoint.pt.part", lines, 0.0) for lines in (0, 3, 6, 9, 12)]
MOMENTS += [("metrics.jsonl", lines, 0.0) for lines in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
MOMENTS += [("sft/config.json", 0, 0.0), ("model.safetensors", 13, 0.0)]
CALLS = []


def random_reward(prompts, completions, answer):
    """Draw all random numbers that a process has; in step 5, first do what STOP says."""
    CALLS.append(prompts)
    for word in os.environ.get("STOP", "").split() if len(CALLS) == 5 else []:
        if word == "deaf":  # as in `2>&1 | tee log`, where Ctrl-C ends the reader, too
            os.write(2, b"deaf\n")
            time.sleep(1)
        else:
            os.kill(os.getpid(), int(word))
    print("as a progress bar does", file=sys.stderr, flush=True)
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in completions]


def bits(tensor):
    """Return what to compare of a tensor: its type, its shape and a hash of its bits."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def end_of(run):
    """Return everything that a run ends with, but for clocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert len({row["grad_norm"] for row in rows[1:]}) == 12  # the comparisons rest on this
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)  # this clock goes on, too
    for row in rows:
        for name in {"tok_s", "seconds", "mem_gb", "t_sample", "t_reward", "t_ref", "t_update"}:
            row.pop(name, None)
    end = torch.load(run / "checkpoint.pt", weights_only=True)["states"] | {"rows": rows}
    for path in run.glob("model.safetensors"):
        end["model"] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (run / "checkpoint.pt.part").exists()
    return json.loads(json.dumps(end, default=bits))


def saved_step(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["row"]["step"]


def train_here(run, flags, stop=None):
    """Train the built-in model on a few sums, up to the end or to the log of step `stop`."""
    config = train.parse_config((FLAGS + flags).split())
    device, _ = pick_device("cpu", config.threads)
    policy, tokenizer = train.make_tiny_model(config.seed, device)
    sums = load_problems("arithmetic", "out")[:6]
    reward = random_reward
    if config.reward == "model":
        torch.manual_seed(run.exists())  # a run that goes on must not keep this head
        reward = LearnedReward(policy, tokenizer, 1e-3, config.reward_size, steps=True)
    run.mkdir(exist_ok=True)

    def log(row):
        train.write_log(row, run)
        if row["step"] == stop:
            raise SystemExit

    bf16 = config.sample_from == "reference"
    train.train(policy, tokenizer, sums, sums, {"in": sums}, reward, config, run, log, bf16)


@pytest.mark.parametrize("flags", VARIANTS)
def test_five_steps_and_seven_are_twelve_steps(flags, tmp_path):
    run = tmp_path / "run"
    train_here(tmp_path / "straight", flags)
    for stop in (5, 8):  # then three steps are lost, and done again
        with pytest.raises(SystemExit):
            train_here(run, flags + "--save-every 5", stop)
        assert saved_step(run) == 5
    train_here(run, flags + "--save-every 5")
    end = end_of(run)
    assert end == end_of(tmp_path / "straight")
    if flags == VARIANTS[2]:  # as a GPU computes
        assert end["reference"]["lm_head.weight"][0] == "torch.bfloat16"
    if "reward" in end:  # there were steps to judge, and to keep
        texts = end["reward"]["_extra_state"]["replay"]
        assert any(step_rewards(completion) for _, completion, _ in texts)


def test_a_full_disk_and_half_a_line_do_no_harm(tmp_path):
    """The checkpoint stays, and the log is cut back by the number in each line."""
    parts = {"policy": torch.nn.Linear(200, 200), "reward": random_reward}  # 160 kB
    train.save_checkpoint(tmp_path, parts, {"step": 3})
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 5, "rew')
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "metrics.jsonl").write_text('{"step": 0, "seconds": 1, "eval": {}}\n')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # as if the disk were full
        with pytest.raises(OSError, match="checkpoint.pt could not be written: .") as error:
            train.save_checkpoint(tmp_path, parts, {"step": 6})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        assert train.load_checkpoint(tmp_path, parts) == {"step": 3}
        with pytest.raises(OSError, match="model could not be written: .*"):
            save_model(*train.make_tiny_model(0, "cpu"), tmp_path / "model")
        shutil.rmtree(tmp_path / "model")
        with pytest.raises(OSError, match="summary.json could not be written: .*"):
            train.summarise(train.Config(), tmp_path / "ended")
        assert [path.name for path in (tmp_path / "ended").iterdir()] == ["metrics.jsonl"]
        shutil.rmtree(tmp_path / "ended")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert log.read_text() == '{"step": 0}\n{"step": 2}\n'
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "metrics.jsonl"]


def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(tmp_path):
    path = tmp_path / "checkpoint.pt"
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3}\n')
    parts = {"policy": torch.nn.Linear(2, 2)}
    train.save_checkpoint(tmp_path, {"policy": torch.nn.Linear(2, 2, bias=False)}, {"step": 3})
    other_model = path.read_bytes()
    code = f"cos\nmkdir\n(S'{tmp_path}/harm'\ntR.".encode()  # a pickle that makes a folder
    for damage in (other_model, other_model[:-100], b"", code):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=f"{path} is damaged, or not of this model"):
            train.load_checkpoint(tmp_path, parts)
        assert path.read_bytes() == damage
        assert log.read_text() == '{"step": 3}\n'
        assert not (tmp_path / "harm").exists()


@pytest.fixture(scope="module")
def straight(chat_folder, story_file, tmp_path_factory):
    """Options of train.py, whose model and problems load at once, and the end of their run."""
    flags = [*FLAGS.split(), "--model", str(chat_folder), "--problems", str(story_file)]
    run = tmp_path_factory.mktemp("straight") / "run"
    train.main([*flags, "--out", str(run)])
    return flags, run


def start(*arguments, stop=""):
    command = [sys.executable, train.__file__, *arguments]
    if "deaf" in stop:
        command = ["bash", "-c", 'set -o pipefail; "$@" 2>&1 | grep -qx deaf', "", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"STOP": stop, "PYTHONUNBUFFERED": ""}  # what is buffered may be lost
    return subprocess.Popen(command, env=env, **pipes)


def test_a_signal_ends_the_step_and_saves(straight, tmp_path):
    """SIGTERM; Ctrl-C that ends the reader of the output, too."""
    statuses = {"15": 143, "deaf 2": 130}
    processes = [start(*straight[0], "--out", tmp_path / stop, stop=stop) for stop in statuses]
    for process, (stop, status) in zip(processes, statuses.items(), strict=True):
        run = tmp_path / stop
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        if stop == "15":
            assert errors.endswith(f"\nto resume: python train.py --resume {run}\n")
        assert saved_step(run) == 5
        train.main(["--resume", str(run)])
        assert end_of(run) == end_of(straight[1])


def kill(process, run, name, lines=0, delay=0.0):
    """Kill a process as soon as a file of its run exists and the log has so many lines."""
    log = run / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.0002)
        found = log.read_bytes().count(b"\n") if log.exists() else 0
        if found >= lines and (run / name).exists():
            time.sleep(delay)
            process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_in_the_warm_up_and_as_it_saves(straight, tmp_path):
    flags = straight[0] + LEARNED.split()
    run = tmp_path / "run"
    process = start(*flags, "--out", run)
    assert "%" in iter(lambda: process.stderr.read(1), "")  # the bar of the warm-up
    kill(process, run, "run.json")
    assert not (run / "checkpoint.pt").exists()  # so the warm-up begins again
    kill(start("--resume", run), run, "checkpoint.pt.part", lines=6)
    train.main(["--resume", str(run)])
    train.main([*flags, "--out", str(tmp_path / "straight")])
    assert end_of(run) == end_of(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [[], LEARNED.split()], ids=["rule", "learned"])
def test_killed_at_twenty_moments(variant, straight, tmp_path):
    flags = straight[0] + variant
    train.main([*flags, "--out", str(tmp_path / "straight")])
    equal = 0
    for number, moment in enumerate(MOMENTS):
        run = tmp_path / str(number)
        kill(start(*flags, "--out", run), run, *moment)
        assert start("--resume", run).wait(timeout=120) == 0
        equal += end_of(run) == end_of(tmp_path / "straight")
    assert equal == len(MOMENTS) == 20


@pytest.mark.slow
def test_the_second_ctrl_c_ends_the_run_at_once(straight, tmp_path):
    process = start(*straight[0], "--out", tmp_path / "run", stop="2 2")
    assert process.wait(timeout=120) == -signal.SIGINT
    assert saved_step(tmp_path / "run") == 3


def test_two_processes_do_not_share_a_run(straight, tmp_path):
    run = tmp_path / "run"
    process = start(*straight[0], "--out", run)
    while not ((run / "run.json").exists() and (run / "run.json").stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)  # it is written when the lock is held
    with pytest.raises(InputError, match="run belongs to another process, which is still running"):
        train.main(["--resume", str(run)])
    with pytest.raises(InputError, match="run belongs to another process"):
        train.lock_run(run, "{}")  # that of a new run which found no folder, either
    assert process.poll() is None
    process.communicate()
    assert end_of(run) == end_of(straight[1])


def test_what_has_changed_since_a_run_began_is_said(straight, tmp_path, capsys):
    run = shutil.copytree(straight[1], tmp_path / "run")
    (run / "summary.json").unlink()
    saved = json.loads((run / "run.json").read_text())
    assert saved["conditions"]["threads"] == 1 and "1+1" in saved["conditions"]["prompt"]
    saved["conditions"] |= {"threads": 3, "prompt": "Today is Monday. 1+1"}
    (run / "run.json").write_text(json.dumps(saved))
    train.main(["--resume", str(run)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "not bit for bit" in line]
    assert len(lines) == 2 and "threads is 1 now, and was 3" in lines[0]
    assert "and was 'Today is Monday. 1+1'" in lines[1]


def test_a_finished_run_is_left_alone(straight, capsys):
    """So is one that is to go on with other options."""
    run = straight[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train.main(["--resume", str(run)])
    assert "run has finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="--temperature 0.5 contradicts the run's 1.0"):
        train.main(["--resume", str(run), "--temperature", "0.5"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
