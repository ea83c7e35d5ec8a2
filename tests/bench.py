"""Time steps of equal work, this project against TRL's GRPOTrainer: seconds, tokens/s, memory.

    pip install trl==1.16.0 && python tests/bench.py     the cases below; without trl only ours
    python tests/bench.py --device cuda                  on a GPU, with the shape of Qwen2.5-0.5B
    python tests/bench.py --case "fixed length"          one case alone
    python tests/bench.py --memory                       what GRPO keeps, against PPO

Both train the same random weights on the same prompts, with the same G, lengths, rewards, learning
rate, beta = 0.04 and tokens in a micro-batch, one optimizer step per sampling. Each is a process
of its own; they take turns step by step, so that both see the same noise of the machine, and only
one works at a time. TRL samples with transformers' generate, without vLLM.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import random
import resource
import statistics
import string
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import make_chat_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

import eval as evaluation
import train
from grpo import bf16_weights, token_logprobs
from reward import LearnedReward

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096}
LARGE = 151_936  # the vocabulary of Qwen2.5
LONGEST_PROMPT = 44  # and 20 is the shortest, 32 the mean
FIELDS = ("body", "B", "G", "T", "V", "eos")  # eos: how likely each token is the last one
CASES = {
    "cpu": {
        "fixed length": (SMALL, 8, 8, 64, 2000, 0.0),
        "varying length": (SMALL, 8, 8, 192, 2000, 1 / 40),
        "large vocabulary": (SMALL, 4, 8, 64, LARGE, 0.0),
    },
    "cuda": {
        "fixed length": (QWEN, 32, 8, 512, LARGE, 0.0),
        "long and many": (QWEN, 32, 16, 1024, LARGE, 0.0),
        "varying length": (QWEN, 32, 8, 512, LARGE, 1 / 150),
    },
}
MICRO_TOKENS = 4096


def parity(completions, **kwargs):
    """A reward that costs nothing and differs within a group: 1.0 for texts of even length."""
    return [1.0 - len(str(text)) % 2 for text in completions]


def make_inputs(folder, case):
    """Write a random model whose tokens are EOS with the wanted probability, and its problems."""
    make_chat_model(folder, vocab_size=case["V"], **case["body"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Feature 0 of every embedding is 0.2, so behind the last norm it is about the same number
    # everywhere. With it the row of a token in the (tied) head can set the token's logit.
    rows = model.get_input_embeddings().weight.data
    rows[:, 0] = 0.2
    with torch.no_grad():
        states = model.base_model(input_ids=torch.arange(50, 250)[None]).last_hidden_state
    constant = states[0, :, 0].mean()
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for token, p in ((tokenizer.eos_token_id, max(case["eos"], 1e-9)), (end_of_turn, 1e-9)):
        rows[token, 0] += torch.tensor(case["V"] * p / (1 - p)).log() / constant
    model.save_pretrained(folder)
    # Prompts of random letters, each of which is a token, within those of the chat template.
    template = len(evaluation.build_prompt(tokenizer, evaluation.Problem("", "1")))
    rng = random.Random(0)
    lines = []
    for _ in range(case["B"] * 20):
        length = rng.randint(20, LONGEST_PROMPT) - template
        question = "".join(rng.choices(string.ascii_lowercase, k=length))
        lines.append(json.dumps({"question": question, "answer": "1"}))
    (folder / "problems.jsonl").write_text("\n".join(lines))


def clock():
    """Return seconds; on a GPU only after it has finished what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Return the largest memory so far in GB: allocated on a GPU, else that of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_ours(pipe, folder, case, device, steps):
    """Train with train.py; after each step send its figures, and wait for a word."""
    flags = f"--model {folder} --problems {folder / 'problems.jsonl'} --questions {case['B']} "
    flags += f"--group-size {case['G']} --max-new-tokens {case['T']} --steps {steps} "
    flags += f"--micro-tokens {MICRO_TOKENS} --eval-limit 1 --eval-samples 1 --eval-every 0 "
    flags += f"--show-every 0 --save-every 0 --device {device}"
    config = train.parse_config([*flags.split(), "--request", ""])

    def report(row):
        if row["step"]:
            figures = {"generate": row["t_sample"], "sample": row["t_sample"] + row["t_reward"]}
            figures |= {"ref": row["t_ref"], "update": row["t_update"]}
            figures["tokens"] = round(row["length"] * case["B"] * case["G"])
            pipe.send(figures | {"memory": peak_memory(device)})
            pipe.recv()

    place, bf16 = evaluation.pick_device(device)
    policy, tokenizer = evaluation.load_model(config.model, place)
    sets = train.gather_problems(config, policy, tokenizer)
    out = folder / "ours"
    out.mkdir()
    train.train(policy, tokenizer, *sets, parity, config, out, report, bf16)


def run_trl(pipe, folder, case, device, steps):
    """Do the same with TRL."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    N = case["B"] * case["G"]
    width = LONGEST_PROMPT + case["T"]
    rows_at_once = max(n for n in range(1, N + 1) if N % n == 0 and n * width <= MICRO_TOKENS)
    t = {}  # seconds of this step

    def timed(name, function):
        def call(*args, **kwargs):
            start = clock()
            result = function(*args, **kwargs)
            t[name] += clock() - start
            return result

        return call

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            t.update(start=clock(), scored=0.0, ref=0.0, generate=0.0)

        def on_step_end(self, *args, **kwargs):
            figures = {"generate": t["generate"], "sample": t["scored"] - t["ref"]}
            figures |= {"ref": t["ref"], "update": clock() - t["start"] - t["scored"]}
            pipe.send(figures | {"tokens": t["tokens"], "memory": peak_memory(device)})
            pipe.recv()

    prompts = []
    for line in (folder / "problems.jsonl").read_text().splitlines():
        prompts.append({"prompt": [{"role": "user", "content": json.loads(line)["question"]}]})
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        max_steps=steps,
        learning_rate=1e-6,
        beta=0.04,
        loss_type="grpo",
        num_generations=case["G"],
        max_completion_length=case["T"],
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=N // rows_at_once,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=parity,
        train_dataset=datasets.Dataset.from_list(prompts),
        callbacks=[Turns()],
        args=settings,
    )
    trainer.model.generate = timed("generate", trainer.model.generate)
    score = trainer._get_per_token_logps_and_entropies
    score_reference = timed("ref", score)
    sample = timed("scored", trainer._generate_and_score_completions)

    def score_either(model, *args, **kwargs):
        function = score_reference if model is trainer.ref_model else score
        return function(model, *args, **kwargs)

    def sample_and_count(inputs):
        output = sample(inputs)
        t["tokens"] = output["completion_mask"].sum().item()
        return output

    trainer._get_per_token_logps_and_entropies = score_either
    trainer._generate_and_score_completions = sample_and_count
    trainer.train()


def quietly(run, *args):
    """Run without the usual output; an error still shows."""
    with open("/dev/null", "w") as sys.stdout:
        run(*args)


def measure(case, device, steps, runs):
    """Let the given run functions take turns: [figures of each step] of each."""
    found = [[] for _ in runs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, case)
        context = multiprocessing.get_context("spawn")
        pipes = []
        processes = []
        for run in runs:
            pipe, theirs = context.Pipe()
            args = (run, theirs, folder, case, device, steps + 1)
            processes.append(context.Process(target=quietly, args=args, daemon=True))
            processes[-1].start()
            theirs.close()
            pipe.recv()  # the first step warms up, and is not counted
            pipes.append(pipe)
        for _ in range(steps):
            for pipe, rows in zip(pipes, found, strict=True):
                pipe.send("go")
                rows.append(pipe.recv())
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send("end")
            process.join()
    return found


def seconds(row):
    """Return the seconds of a whole step."""
    return row["sample"] + row["ref"] + row["update"]


def show(name, who, rows):
    """Print one line of the table: medians over the steps."""
    columns = [[row[key] for row in rows] for key in ("sample", "ref", "update")]
    columns.append([seconds(row) for row in rows])
    cells = "".join(f"{statistics.median(column):>9.2f}" for column in columns)
    speed = statistics.median(row["tokens"] / row["generate"] for row in rows)
    tokens = statistics.median(row["tokens"] for row in rows)
    print(f"{name:<18}{who:<6}{cells}{speed:>10,.0f}{tokens:>9,.0f}{rows[-1]['memory']:>9.2f}")


def show_ratios(ours, theirs):
    """Print ratios of each pair of steps: the median (smallest - largest)."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = {
        "a step": [seconds(a) / seconds(b) for a, b in pairs],
        "a step, per token": [
            seconds(a) / a["tokens"] / (seconds(b) / b["tokens"]) for a, b in pairs
        ],
        "tokens/s": [a["tokens"] / a["generate"] / (b["tokens"] / b["generate"]) for a, b in pairs],
        "memory": [ours[-1]["memory"] / theirs[-1]["memory"]],
    }
    for label, values in ratios.items():
        middle = statistics.median(values)
        print(f"    ours / TRL, {label:<18}{middle:.2f}   ({min(values):.2f} - {max(values):.2f})")


def show_memory():
    """Count what GRPO keeps, and PPO, which also trains a value model of the policy's size."""
    policy, tokenizer = train.make_tiny_model(0, torch.device("cpu"))
    value_model = LearnedReward(policy, tokenizer, 1e-3, 1)
    reference = bf16_weights(copy.deepcopy(policy))
    sampler = bf16_weights(copy.deepcopy(policy))
    kept = {}
    for name, trained in (("GRPO", [policy]), ("PPO", [policy, value_model])):
        tensors = [p for model in (sampler, reference) for p in model.parameters()]
        for model in trained:
            optimizer = torch.optim.AdamW(model.parameters())
            sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step()
            for p in model.parameters():
                moments = [x for x in optimizer.state[p].values() if x.dim()]  # no step counter
                tensors += [p, p.grad, *moments]
        kept[name] = sum(x.nbytes for x in tensors)
    ratio = kept["GRPO"] / kept["PPO"]
    print(f"built-in model, with bf16 copies, in MB: GRPO {kept['GRPO'] / 1e6:.2f}, ", end="")
    print(f"PPO {kept['PPO'] / 1e6:.2f}, {ratio:.2f} of it")
    shapes = {"0.5B": QWEN, "1.5B": QWEN | {"hidden_size": 1536, "intermediate_size": 8960}}
    shapes["1.5B"] |= {"num_hidden_layers": 28, "num_attention_heads": 12}
    for name, shape in shapes.items():
        one, two = (kept_for_backward(shape, layers) for layers in (1, 2))
        update = one + (shape["num_hidden_layers"] - 1) * (two - one)
        heads = shape["hidden_size"] // shape["num_attention_heads"] * 2  # of keys and of values
        cache = 2 * 2 * heads * shape["num_hidden_layers"]  # numbers of 2 bytes
        print(f"Qwen2.5-{name}: KV cache {cache} bytes per token; an update keeps ", end="")
        print(f"{update / 1e6:.2f} MB per token, {update * MICRO_TOKENS / 1e9:.1f} GB at a time")


def kept_for_backward(shape, layers, rows=8, width=512, prompt=150):
    """Count the bytes per token that autograd keeps of a micro-batch in bf16, on the CPU.

    Rows of `width` tokens, of which `prompt` are the prompt's; a token counts as in --micro-tokens.
    """
    config = Qwen2Config(vocab_size=1000, **(shape | {"num_hidden_layers": layers}))
    model = Qwen2ForCausalLM(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x: its place is not used again
        return x

    ids = torch.randint(1000, (rows, width))
    mask = torch.ones(rows, width - prompt).bool()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        prompts = ids[:1, :prompt]
        token_logprobs(model, prompts, torch.ones_like(prompts), ids[:, prompt:], mask, 1.0)
    return sum(size for size, _ in kept.values()) / ids.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each case (7)")
    parser.add_argument("--case", help="only this one (default: all)")
    parser.add_argument("--memory", action="store_true", help="bytes that GRPO and PPO keep")
    args = parser.parse_args()
    if args.memory:
        show_memory()
        return
    cases = CASES[args.device]
    if args.case:
        cases = {args.case: cases[args.case]} if args.case in cases else {}
    if not cases or args.steps < 1 or args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"the cases are {', '.join(CASES[args.device])}; cuda needs a GPU")
    runs = [run_ours]
    if importlib.util.find_spec("trl"):
        runs.append(run_trl)
    heading = (
        f"{'sample':>9}{'ref':>9}{'update':>9}{'sum, s':>9}{'tokens/s':>10}{'tokens':>9}{'GB':>9}"
    )
    print(f"{'medians of a step':<24}{heading}")
    for name, values in cases.items():
        found = measure(dict(zip(FIELDS, values, strict=True)), args.device, args.steps, runs)
        for who, rows in zip(("ours", "TRL"), found, strict=False):
            show(name, who, rows)
        if len(found) == 2:
            show_ratios(*found)


if __name__ == "__main__":
    main()
