"""Every option of train.py and eval.py has its effect: a table, with a row per option or more.

A row names an option, a value and other flags; then what is seen of a run with all of them. The
same run without the option must show something else: if an option is ignored, they are the same.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers import make_chat_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

import eval as evaluation
import train
from reward import InputError

BASE = {
    train: "--model random --problems adas.jsonl --reward rewards.py:first --reward-size 12 "
    "--questions 3 --group-size 4 --max-new-tokens 5 --steps 2 --lr 1e-3 --lr-warmup 0 --threads 1 "
    "--eval-limit 2 --eval-samples 2 --eval-every 0 --show-every 0 --save-every 0 --device cpu",
    evaluation: "--model random --problems adas.jsonl --limit 4 --samples 2 --max-new-tokens 5 "
    "--device cpu",
}
REWARDS = """
import glob, os, torch
def first(prompts, completions, answer):
    return [float(i % 4 == 0) for i in range(len(completions))]
def one(prompts, completions, answer):
    return [1.0 for text in completions]
def saved(prompts, completions, answer):
    newest = max(glob.glob("*/checkpoint.pt"), key=os.path.getmtime)
    return [torch.load(newest)["row"]["step"] for text in completions]
"""
TAUGHT = "--model taught --max-new-tokens 20"  # it says 1+1=3, a wrong step, and \boxed{2}
TENSORBOARD = MagicMock()  # stands in for a package that need not be installed


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """Go to a folder with models, problems, rewards, a run that has not finished, and results."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("options"))
        patch.setitem(sys.modules, "torch.utils.tensorboard", TENSORBOARD)
        ends = [0, *range(150, 200)]  # tokens that end a completion: so many that some come early
        make_chat_model("random", num_hidden_layers=1, initializer_range=0.3, eos_token_id=ends)
        Path("rewards.py").write_text(REWARDS)
        for name, question in (("adas", "Ada-{}?"), ("bobs", "Bob-{}?"), ("same", "Cy?")):
            rows = [{"question": question.format(i), "answer": "1+1=3\n#### 2"} for i in range(40)]
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        look(train, "--steps 1 --sft-steps 60 --sft-lr 0.02 --out teacher")
        Path("teacher/sft").rename("taught")
        look(train, "--out half")
        Path("half/summary.json").unlink()
        look(evaluation, f"{TAUGHT} --out one.json")
        yield
    torch.set_num_threads(before)


@functools.cache
def look(script, flags):
    """Run train.py or eval.py. Returns a dict of what is seen of it."""
    seen = {"error": ""}
    passes = []  # for each pass of a model the ids, (n, s), and whether it is for a gradient
    TENSORBOARD.reset_mock()

    def note(module, inputs):
        if isinstance(module, torch.nn.Embedding):
            passes.append((inputs[0], torch.is_grad_enabled()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            script.main(f"{BASE[script]} --out {look.cache_info().misses} {flags}".split())
        except InputError as error:
            seen["error"] = str(error)[:16]
    hook.remove()
    seen["threads"] = torch.get_num_threads()
    seen["curves"] = [call.args for call in TENSORBOARD.SummaryWriter().add_scalar.call_args_list]
    return seen | see_passes(passes) | see_output(printed.getvalue())


def see_passes(passes):
    """See what went through the model."""
    trained = [ids for ids, gradient in passes if gradient]
    end = max([i for i, (_, gradient) in enumerate(passes) if gradient], default=-1)
    parts = [ids for ids, _ in passes[: end + 1]], [ids for ids, _ in passes[end + 1 :]]
    prompts = [ids for ids, _ in passes if ids.shape[1] > 5 and ids[0, 0] == 1]  # <|im_start|>
    tokens = [[len(ids) for ids in part if ids.shape[1] == 1] for part in parts]
    return {
        "trained": [ids.tolist() for ids in trained],
        "devices": sorted({ids.device.type for ids, _ in passes}),
        "rows trained": [len(ids) for ids in trained],  # prompts, completions, prompts, ...
        "last": [ids.tolist() for ids in parts[1]],  # the evaluation at the end
        "most rows": [max(rows, default=0) for rows in tokens],  # until then, and there
        "single prompts": sum(len(ids) == 1 for ids in prompts),
        "prompt": AutoTokenizer.from_pretrained("random").decode(prompts[-1][0]) if prompts else "",
    }


def see_output(printed):
    """See what was printed, and the files that were written."""
    seen = {"printed": printed, "A": re.findall("--- A = (.*)", printed)}
    for name in re.findall("the run goes to (.*)", printed):
        rows = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        seen |= {"out": name, "evals": [row["step"] for row in rows if "eval" in row]}
        seen |= {"sets": list(rows[0]["eval"])} | list(rows[0]["eval"].values())[0]
        states = torch.load(Path(name, "checkpoint.pt"))["states"]
        seen |= states | {key: [row.get(key) for row in rows[1:]] for key in rows[1]}
        means = [state["exp_avg"].flatten() for state in states["optimizer"]["state"].values()]
        seen["norm"] = 10 * torch.cat(means).norm().item()  # one step: a tenth of the gradient
        seen["moved"] = moves(load_file(Path(name, "model.safetensors"))).max().item()
        if Path(name, "sft").exists():
            moved = moves(load_file(Path(name, "sft/model.safetensors")))
            seen |= {"warm-up moved": moved.max().item(), "warm-up mean": moved.mean().item()}
        if "reward" in states:
            seen["fitted"] = len(states["reward"].pop("_extra_state")["replay"])
            body = {key.replace("body", "model"): x for key, x in states["reward"].items()}
            seen["reward moved"] = moves(body).max().item()
    for name in re.findall("all results: (.*)", printed):
        result = json.loads(Path(name).read_text())
        seen |= result["scores"] | {"out": name, "questions": result["questions"]}
        for kind, records in result["records"].items():
            seen[f"{kind} texts"] = [row["completion"] for row in records]
    return seen


def moves(new):
    """How far each weight is from that of the model "random"."""
    old = load_file("random/model.safetensors")
    return torch.cat([(new[name] - old[name]).abs().flatten() for name in old])


OTHER = object()  # anything but what is seen without the option
about = functools.partial(pytest.approx, rel=0.01)
ONE = "--reward rewards.py:one --kl-beta 0"
RFT = f"{ONE} --advantage indicator --max-new-tokens 8"
SAME = "--problems same.jsonl --eval-problems adas.jsonl --lr 1e-12"
SHOW = "--show-every 1"
FAR = "--mu 2 --lr 0.01"
CUDA = ["cuda"] if torch.cuda.is_available() else []  # without a GPU it is refused
SUMS = [problem.question for problem in evaluation.load_problems("arithmetic", "out")[:4]]

# option, value, other flags, what to look at (a key of what is seen, or a function), what is there
TRAIN = [
    ("model", "taught", "--max-new-tokens 20", "greedy", 1),
    ("problems", "bobs.jsonl", "", lambda seen: "Bob" in seen["prompt"], True),
    ("reward", "rewards.py:one", "", "reward", [1, 1]),
    ("request", "Why?", "", lambda seen: "?\nWhy?<" in seen["prompt"], True),
    ("out", "here", "", "out", "here"),
    ("resume", "half --out half", "", lambda seen: [seen["out"], *seen["trained"]], ["half"]),
    ("save_every", "1", "--reward rewards.py:saved", "reward", [0, 1]),
    ("seed", "1", "", lambda seen: seen["trained"][0], OTHER),  # the questions
    ("seed", "1", SAME, lambda seen: seen["trained"][1], OTHER),  # completions of the same ones
    ("seed", "1", SAME, "last", OTHER),  # samples of the evaluation
    ("seed", "1", "--sft-steps 1", lambda seen: seen["trained"][0], OTHER),  # the warm-up
    ("device", "cuda", "", "devices", CUDA),
    ("threads", "2", "--max-new-tokens 1020", "threads", 2),
    ("precision", "bf16", "", lambda seen: 1e-4 < seen["gap"][0] < 1, True),
    ("questions", "2", "", "rows trained", [2, 8, 2, 8]),
    ("group_size", "2", "", "rows trained", [3, 6, 3, 6]),
    ("max_new_tokens", "3", TAUGHT, "length", [3, 3]),
    ("max_new_tokens", "3", TAUGHT, "greedy_truncated", 1),
    ("max_new_tokens", "1020", "", "error", "no question with"),
    # All 341 tokens get as likely, and the entropy log 341 = 5.8, in sampler and reference, too.
    ("temperature", "1000", TAUGHT, lambda seen: seen["gap"][0] < 5 < seen["entropy"][0], True),
    ("temperature", "1000", TAUGHT, lambda seen: seen["kl"][0] < 5 < seen["entropy"][0], True),
    ("temperature", "1000", TAUGHT, "sampled", 0),
    ("rows_at_once", "2", "", "most rows", [2, 2]),
    ("iterations", "2", "--steps 1", "iteration", [0, 1]),
    ("iterations", "2", "--steps 1", "kl", [0, 0]),  # each time the reference is new
    ("steps", "1", "", "step", [1]),
    ("mu", "3", "", "rows trained", [3, 12] * 3 * 2),
    ("kl_beta", "2", "", lambda seen: seen["loss"][1] / seen["kl"][1], about(2)),
    ("kl_beta", "0", "", lambda seen: seen.keys() & {"kl", "reference"}, set()),
    ("clip_low", "1", f"{FAR} --clip-high 1e9", "clip_share", [0, 0]),
    ("clip_high", "1e9", f"{FAR} --clip-low 1", "clip_share", [0, 0]),
    ("scale_rewards", "none", SHOW, "A", ["+0.75", "+0.75"]),  # 1 - 1/4
    ("scale_rewards", "none", f"{SHOW} --supervision process", "A", ["+0.75", "+0.75"]),
    ("aggregate", "constant", RFT, lambda seen: seen["loss"][0] / seen["length"][0], about(-1 / 8)),
    ("mask_truncated", "", f"{RFT} --model taught", "grad_norm", [0, 0]),  # all are cut off
    # A group has a wrong step and a right outcome, then six zeros: mean 1/8, variance 1/8. A of
    # its first token is the sum of both: (0 - 1/8 + 1 - 1/8) / sqrt(1/8).
    ("supervision", "process", f"{TAUGHT} {SHOW}", "A", ["+2.12", "+2.12"]),
    ("advantage", "indicator", ONE, "loss", about([-1, -1])),
    ("sample_from", "reference", f"{FAR} --kl-beta 0", "clip_share", [0, 0]),
    ("sample_from", "reference", f"{FAR} --kl-beta 0", lambda seen: seen["gap"][1] > 0.01, True),
    # 5 steps of Adam, while the rate falls from 1e-3 to 0
    ("reward_lr", "1e-3", "--reward model", lambda seen: 1e-3 < seen["reward moved"] < 3e-3, True),
    ("reward_size", "20", "--reward model", "fitted", 20),
    ("lr", "5e-4", "--steps 1", "moved", about(5e-4)),
    ("lr_warmup", "2", "", "lr", about([5e-4, 1e-3])),
    ("lr_end", "0.1", "", "lr", about([1e-3, 1e-4])),
    ("max_grad_norm", "0.05", "--steps 1", "norm", about(0.05)),
    # All weights move by 1e-5, unless gradients are below Adam's epsilon, 1e-8.
    ("max_grad_norm", "1e-6", "--sft-steps 1", lambda seen: seen["warm-up mean"] < 8e-6, True),
    # 32 problems of the warm-up, and in 2 steps 12 completions with and without a gradient
    ("micro_tokens", "1", "--sft-steps 1", "single prompts", 32 + 2 * 12 * 2),
    ("sft_steps", "1", "", "rows trained", [32, 32, 3, 12, 3, 12]),
    ("sft_lr", "0.01", "--sft-steps 1", "warm-up moved", about(0.01)),
    ("eval_problems", "same.jsonl,bobs.jsonl", "", "sets", ["same.jsonl", "bobs.jsonl"]),
    ("eval_limit", "3", "", "n", 3),
    ("eval_limit", "3", "--eval-problems bobs.jsonl", "n", 3),
    ("eval_samples", "3", "", "pass@3", 0),
    ("eval_every", "1", "", "evals", [0, 1, 2]),
    ("show_every", "1", "", "A", ["+1.50", "+1.50"]),
    ("tensorboard", "", "", lambda seen: ("lr", 1e-3, 2) in seen["curves"], True),
]
EVAL = [
    ("model", "taught", "--max-new-tokens 20", "greedy", 1),
    ("problems", "bobs.jsonl", "", "questions", ["Bob-0?", "Bob-1?", "Bob-2?", "Bob-3?"]),
    ("split", "out", "--problems arithmetic", "questions", SUMS),
    ("limit", "3", "", "n", 3),
    ("samples", "3", "", "pass@3", 0),
    ("temperature", "1000", TAUGHT, "sampled", 0),
    ("max_new_tokens", "3", TAUGHT, "greedy texts", ["1+1"] * 4),
    ("max_new_tokens", "3", f"{TAUGHT} --ask Ada-77?", "printed", "1+1\n"),
    ("max_new_tokens", "1020", "", "error", "no question with"),
    ("request", "Why?", "", lambda seen: "?\nWhy?<" in seen["prompt"], True),
    ("request", "Why?", "--ask Eva?", lambda seen: "\nEva?\nWhy?<" in seen["prompt"], True),
    ("rows_at_once", "2", "", "most rows", [0, 2]),
    ("seed", "1", "", "sampled texts", OTHER),
    ("device", "cuda", "", "devices", CUDA),
    ("threads", "2", "", "threads", 2),
    ("ask", "Ada-77?", TAUGHT, "printed", "1+1=3\n\\boxed{2}\n"),
    ("compare", "one.json one.json", "", lambda seen: seen["printed"][:13], "greedy   1.00"),
    ("out", "here.json", "", "out", "here.json"),
]
ROWS = [(train, *row) for row in TRAIN] + [(evaluation, *row) for row in EVAL]


@pytest.mark.parametrize("script, option, value, others, key, expected", ROWS)
def test_an_option_has_its_effect(script, option, value, others, key, expected):
    measure = key if callable(key) else lambda seen: seen.get(key)
    measured = measure(look(script, f"{others} --{option.replace('_', '-')} {value}"))
    assert expected is OTHER or measured == expected
    assert measured != measure(look(script, others)), "without the option the same is seen"


@pytest.mark.parametrize(
    "script, kind, table", [(train, train.Config, TRAIN), (evaluation, evaluation.Options, EVAL)]
)
def test_the_table_and_the_help_miss_no_option(script, kind, table, capsys):
    fields = dataclasses.fields(kind)
    assert {row[0] for row in table} == {field.name for field in fields}
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # a line may break at any hyphen
    for field in fields:
        line = f"{field.metadata['help']} (default: {field.default})"
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"{flag}(?!-)[^()]*{re.escape(''.join(line.split()))}", text), line
        if script is train and field.name in train.BUILTIN:
            assert f"{flag}{train.BUILTIN[field.name]}" in text


def test_defaults_are_the_papers_or_those_of_the_built_in_model_and_give_way_to_flags():
    config = train.parse_config(["--model", "any"])
    assert [config.lr, config.kl_beta, config.mu, config.micro_tokens] == [1e-6, 0.04, 1, 4096]
    built_in = vars(train.parse_config([]))
    assert built_in == vars(config) | {"model": ""} | train.BUILTIN
    for name in train.BUILTIN.keys() - {"problems"}:
        given = train.parse_config([f"--{name.replace('_', '-')}", str(getattr(config, name))])
        assert vars(given) == built_in | {name: getattr(config, name)}


@pytest.mark.parametrize("option, value", sorted({row[:2] for row in TRAIN}))
def test_a_resumed_run_keeps_its_options_but_for_those_that_save_memory(option, value):
    argv = f"--resume half --{option.replace('_', '-')} {value}".split()
    if option in ("resume", "micro_tokens", "rows_at_once"):
        assert str(getattr(train.parse_config(argv), option)) == value.split()[0]
    else:
        with pytest.raises(InputError, match="contradicts the run's"):
            train.parse_config(argv)


def test_the_seed_makes_the_built_in_model():
    flags = "--steps 1 --lr 1e-12 --sft-steps 0 --eval-limit 1 --max-new-tokens 2 --threads 1"
    train.main(f"{flags} --seed 7 --out built-in".split())
    policy, _ = train.make_tiny_model(7, torch.device("cpu"))
    saved = load_file("built-in/model.safetensors")
    assert all(torch.allclose(saved[name], x) for name, x in policy.state_dict().items())
