"""Steps of equal work, this project against TRL's GRPOTrainer: seconds, tokens per second, peak memory.

    pip install trl==1.16.0 && python tests/bench.py     the cases below; without trl only this project
    python tests/bench.py --growth                       how a step's time grows with G and with the length
    python tests/bench.py --device cuda                  on a GPU, with the shape of Qwen2.5-0.5B
    python tests/bench.py --case "fixed length"          one case alone
    python tests/bench.py --memory                       what GRPO keeps, against PPO with a value model

Both train the same random weights on the same prompts, with the same G, lengths, rewards, learning rate,
beta = 0.04 and tokens in a micro-batch, one optimizer step for each sampling. Each is a process of its own;
they take turns step by step, so that both see the same noise of the machine, and only one works at a time.
TRL samples with transformers' generate, without vLLM, and trains without activation checkpointing.
"""

import argparse
import importlib.metadata
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

SMALL = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SIZES = {  # of Qwen2.5: parameters, layers, shape
    "0.5B": (
        494_032_768,
        24,
        dict(
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
        ),
    ),
    "1.5B": (
        1_543_714_304,
        28,
        dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_attention_heads=12,
            num_key_value_heads=2,
            head_dim=128,
        ),
    ),
}
QWEN = dict(SIZES["0.5B"][2], num_hidden_layers=SIZES["0.5B"][1], max_position_embeddings=4096)
LARGE = 151_936  # the vocabulary of Qwen2.5
LONGEST_PROMPT = 44  # and 20 is the shortest: 32 on average, as spread as the questions of GSM8K
CASES = {  # eos: how likely each token is the last one; micro: tokens in a micro-batch
    "cpu": {
        "fixed length": dict(body=SMALL, B=8, G=8, T=64, V=2000, eos=0.0, micro=4096),
        "varying length": dict(body=SMALL, B=8, G=8, T=192, V=2000, eos=1 / 40, micro=4096),
        "large vocabulary": dict(body=SMALL, B=4, G=8, T=64, V=LARGE, eos=0.0, micro=4096),
    },
    "cuda": {
        "fixed length": dict(body=QWEN, B=32, G=8, T=512, V=LARGE, eos=0.0, micro=16384),
        "long and many": dict(body=QWEN, B=32, G=16, T=1024, V=LARGE, eos=0.0, micro=16384),
        "varying length": dict(body=QWEN, B=32, G=8, T=512, V=LARGE, eos=1 / 150, micro=16384),
    },
}


def parity(completions, **kwargs):
    """A reward that costs nothing and differs within a group: 1.0 for texts of even length."""
    return [1.0 - len(str(text)) % 2 for text in completions]


def make_inputs(folder, case):
    """Write a random model whose tokens are EOS with the wanted probability, and problems for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from helpers import make_chat_model

    make_chat_model(folder, vocab_size=case["V"], **case["body"])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    # Feature 0 of every embedding is 0.2, so behind the last norm it is about the same number everywhere: with it
    # the row of a token in the (tied) head can set the token's logit.
    rows, p = model.get_input_embeddings().weight.data, max(case["eos"], 1e-9)
    rows[:, 0] = 0.2
    with torch.no_grad():
        constant = (
            model.base_model(input_ids=torch.arange(50, 250)[None])
            .last_hidden_state[0, :, 0]
            .mean()
        )
    wanted = torch.tensor(case["V"] * p / (1 - p)).log()
    rows[tokenizer.eos_token_id, 0] += wanted / constant
    rows[tokenizer.convert_tokens_to_ids("<|im_end|>"), 0] += (
        torch.tensor(case["V"] * 1e-9).log() / constant
    )
    model.save_pretrained(folder)
    rng, template = (
        random.Random(0),
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": ""}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        ),
    )
    # prompts of random letters, each of which is a token, behind those of the chat template
    lines = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(20, LONGEST_PROMPT) - template))
        for _ in range(case["B"] * 20)
    ]
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({"question": line, "answer": "1"}) + "\n" for line in lines)
    )


def clock():
    """Seconds; on a GPU only after it has finished what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The largest memory so far in GB: allocated on a GPU, else that of the process."""
    import torch

    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def run_ours(pipe, folder, case, device, steps):
    """Train with train.py; before each step wait for a word, after it send its figures."""
    import train

    def report(metrics, heading):
        pipe.send(
            dict(
                sample=metrics["t_sample"] + metrics["t_reward"],
                ref=metrics["t_ref"],
                update=metrics["t_update"],
                generate=metrics["t_sample"],
                memory=peak_memory(device),
                tokens=round(metrics["length"] * case["B"] * case["G"]),
            )
        )
        pipe.recv()

    train.print_metrics = report
    train.main(
        [
            "--model",
            str(folder),
            "--problems",
            str(folder / "problems.jsonl"),
            "--request",
            "",
            "--reward",
            f"{__file__}:parity",
            "--out",
            str(folder / "ours"),
            "--device",
            device,
            "--questions",
            str(case["B"]),
            "--group-size",
            str(case["G"]),
            "--max-new-tokens",
            str(case["T"]),
            "--steps",
            str(steps),
            "--micro-tokens",
            str(case["micro"]),
            "--eval-limit",
            "1",
            "--eval-samples",
            "1",
            "--eval-every",
            "0",
            "--show-every",
            "0",
            "--save-every",
            "0",
        ]
    )


def run_trl(pipe, folder, case, device, steps):
    """The same with TRL."""
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    cpu, N, t = device == "cpu", case["B"] * case["G"], {}
    rows_at_once = max(
        n
        for n in range(1, N + 1)
        if N % n == 0 and n * (LONGEST_PROMPT + case["T"]) <= case["micro"]
    )

    def timed(name, function):
        def call(*args, **kwargs):
            start = clock()
            result = function(*args, **kwargs)
            t[name] += clock() - start
            return result

        return call

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            t.update(start=clock(), scored=0.0, ref=0.0, generate=0.0)

        def on_step_end(self, *args, **kwargs):
            whole = clock() - t["start"]
            pipe.send(
                dict(
                    sample=t["scored"] - t["ref"],
                    ref=t["ref"],
                    update=whole - t["scored"],
                    generate=t["generate"],
                    tokens=t["tokens"],
                    memory=peak_memory(trainer.model.device),
                )
            )
            pipe.recv()

    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    prompts = [{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=parity,
        train_dataset=datasets.Dataset.from_list(prompts),
        callbacks=[Turns()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=cpu,
            bf16=not cpu,
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
        ),
    )
    trainer.model.generate = timed("generate", trainer.model.generate)
    score = trainer._get_per_token_logps_and_entropies
    score_reference = timed("ref", score)
    trainer._get_per_token_logps_and_entropies = lambda model, *args, **kwargs: (
        score_reference if model is trainer.ref_model else score
    )(model, *args, **kwargs)
    sample = timed("scored", trainer._generate_and_score_completions)

    def sample_and_count(inputs):
        output = sample(inputs)
        t["tokens"] = output["completion_mask"].sum().item()
        return output

    trainer._generate_and_score_completions = sample_and_count
    trainer.train()


def measure(case, device, steps, runs):
    """{name: a dict of figures for each step} of the given run functions, which take turns."""
    found = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), case)
        context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
        for run in runs:
            pipes[run], theirs = context.Pipe()
            processes.append(
                context.Process(
                    target=quietly,
                    daemon=True,
                    args=(run, theirs, Path(folder), case, device, steps + 1),
                )
            )
            processes[-1].start()
            theirs.close()
            pipes[run].recv()  # the first step warms up, and is not counted
        for _ in range(steps):
            for run in runs:
                pipes[run].send("go")
                found[run].append(pipes[run].recv())
        for pipe in pipes.values():
            pipe.send("end")
        for process in processes:
            process.join()
    return {run.__name__.removeprefix("run_"): rows for run, rows in found.items()}


def quietly(run, *args):
    """Run without the usual output; an error still shows."""
    sys.stdout = open("/dev/null", "w")
    run(*args)


def seconds(row):  # of the whole step
    return row["sample"] + row["ref"] + row["update"]


def median(rows, key):
    return statistics.median(key(row) if callable(key) else row[key] for row in rows)


def show(name, who, rows):
    """One line of the table: medians over the steps."""
    phases = [median(rows, key) for key in ("sample", "ref", "update", seconds)]
    print(
        f"{name:<18}{who:<6}"
        + "".join(f"{phase:>9.2f}" for phase in phases)
        + f"{median(rows, lambda row: row['tokens'] / row['generate']):>10,.0f}"
        + f"{median(rows, 'tokens'):>9,.0f}{rows[-1]['memory']:>9.2f}",
        flush=True,
    )


def show_ratio(ours, theirs):
    """Ratios of each pair of steps: median (smallest - largest). Time is that of a step per completion token."""
    pairs = list(zip(ours, theirs))
    for label, ratios in (
        (
            "time per token",
            [seconds(a) / a["tokens"] / (seconds(b) / b["tokens"]) for a, b in pairs],
        ),
        (
            "sampling, tokens/s",
            [a["tokens"] / a["generate"] / (b["tokens"] / b["generate"]) for a, b in pairs],
        ),
        ("memory", [ours[-1]["memory"] / theirs[-1]["memory"]]),
    ):
        print(
            f"    ours / TRL, {label:<19}{statistics.median(ratios):.2f}   ({min(ratios):.2f} - {max(ratios):.2f})"
        )


def limits(case, device):
    """Seconds that sampling, reference and update take on paper: bytes over the rate at which this machine copies,
    operations over that at which it multiplies matrices, in bf16 on a GPU and float32 on a CPU."""
    import torch

    dtype, size, n = (torch.bfloat16, 2, 8192) if device == "cuda" else (torch.float32, 4, 2048)
    device = torch.device(device)

    def fastest(work):
        spans = []
        for _ in range(10):
            start = clock()
            work()
            spans.append(clock() - start)
        return min(spans)

    a, b = torch.ones(2, n, n, dtype=dtype, device=device)
    large = torch.ones(n * n * 8, dtype=dtype, device=device)
    operations_s = 2 * n**3 / fastest(lambda: a @ b)
    bytes_s = 2 * large.numel() * size / fastest(lambda: large.clone())
    body, N, T, P = case["body"], case["B"] * case["G"], case["T"], 32  # P: the mean
    D, layers = body["hidden_size"], body["num_hidden_layers"]
    kv = D // body["num_attention_heads"] * body["num_key_value_heads"]
    # q and o, k and v, three matrices of the MLP; the backward pass counts as two forward passes
    weights, head = (
        layers * (2 * D * D + 2 * D * kv + 3 * D * body["intermediate_size"]),
        case["V"] * D,
    )
    cache = N * sum(P + t for t in range(T)) * layers * 2 * kv  # numbers read in all of sampling
    forward = 2 * (weights * (N * T + case["B"] * P) + head * N * T) / operations_s
    sample = max(
        (T * (weights + head) + cache) * size / bytes_s, 2 * (weights + head) * N * T / operations_s
    )
    return dict(sample=sample, ref=forward, update=3 * forward)


def kept_bytes(trained, frozen):
    """Bytes of weights, gradients and AdamW's state behind one step, of models that are trained and that are not."""
    import torch

    total = sum(p.nbytes for model in frozen for p in model.parameters())
    for model in trained:
        optimizer = torch.optim.AdamW(model.parameters())
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        tensors = [x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values())]
        total += sum(x.nbytes for x in tensors if x.dim())  # without the step counters
    return total


def show_memory():
    """GRPO trains the policy alone; PPO also a value model of its size: the same body with a scalar head."""
    import copy
    import torch
    import train
    from grpo import bf16_weights
    from reward import RewardModel

    for bf16 in (
        False,
        True,
    ):  # as on a CPU; as on a GPU, with a bf16 copy that samples and a bf16 reference
        policy, _ = train.make_tiny_model(train.Config(), torch.device("cpu"))
        copies = (
            [bf16_weights(copy.deepcopy(policy)) for _ in range(2)]
            if bf16
            else [copy.deepcopy(policy)]
        )
        grpo = kept_bytes([policy], copies)
        ppo = kept_bytes([policy, RewardModel(policy)], copies)
        print(
            f"built-in model, {'bf16 copies' if bf16 else 'float32'}, allocated: GRPO {grpo / 1e6:.2f} MB, PPO {ppo / 1e6:.2f} MB, "
            f"{grpo / ppo:.2f} of it"
        )
    # float32: weights, gradients, two moments; bf16: the copy that samples, the reference
    for name, (parameters, layers, shape) in SIZES.items():
        grpo, ppo = 20 * parameters, 36 * parameters
        print(
            f"Qwen2.5-{name}, bf16 copies, computed: GRPO {grpo / 1e9:.1f} GB, PPO {ppo / 1e9:.1f} GB, {grpo / ppo:.2f} of it"
        )
        cache = (
            2 * 2 * layers * shape["num_key_value_heads"] * shape["head_dim"]
        )  # keys and values of 2 bytes
        kept = []  # bytes a token, with all layers: from one and two, since a micro-batch of 2,048 fits everywhere
        for checkpointing in (False, True):
            (a, b), (c, d) = (
                [kept_for_backward(shape, n, tokens, checkpointing) for tokens in (1024, 2048)]
                for n in (1, 2)
            )
            kept.append((b - a + (layers - 1) * (d - c - b + a)) / 1024)
        print(
            f"    KV cache {cache} bytes a token; the update keeps {kept[0] / 1e6:.2f} MB a token, "
            f"{kept[1] / 1e6:.2f} with --activation-checkpointing"
        )


def kept_for_backward(shape, layers, tokens, checkpointing):
    """Bytes that autograd keeps of a micro-batch of four rows in bf16 autocast, on the CPU, with a small vocabulary."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from grpo import token_logprobs

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=1000, num_hidden_layers=layers, tie_word_embeddings=True, **shape)
    ).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                x,
            )  # with x, so that its place is not used again
        return x

    ids, mask = torch.randint(1000, (4, tokens // 4)), torch.ones(4, tokens // 4 - 20).bool()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        token_logprobs(model, ids[:, :20], torch.ones_like(ids[:, :20]), ids[:, 20:], mask, 1.0)
    return sum(size for size, _ in kept.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--steps", type=int, default=7, help="counted steps of each case (default: 7)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--case",
        choices=sorted({name for cases in CASES.values() for name in cases}),
        help="only this one (default: all)",
    )
    mode.add_argument(
        "--growth", action="store_true", help="this project alone, for several G and lengths"
    )
    mode.add_argument(
        "--memory", action="store_true", help="bytes kept by GRPO and by PPO, no time measured"
    )
    args = parser.parse_args()
    import torch

    if args.memory:
        return show_memory()
    cases = {name: case for name, case in CASES[args.device].items() if args.case in (None, name)}
    if not cases or args.steps < 1 or args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device} has the cases {', '.join(CASES[args.device])}; cuda needs a GPU, --steps at least 1"
        )
    found = {}
    for package in ("torch", "transformers", "trl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    print(
        ", ".join(f"{package} {version}" for package, version in found.items()), "on", args.device
    )
    print(
        f"{'medians of a step':<24}{'sample':>9}{'ref':>9}{'update':>9}{'sum, s':>9}{'tokens/s':>10}"
        f"{'tokens':>9}{'GB':>9}"
    )
    runs = [run_ours] + [run_trl] * ("trl" in found and not args.growth)
    if args.growth:
        fixed = CASES[args.device]["fixed length"]
        cases = {f"G = {G}": {**fixed, "G": G} for G in (4, 8, 16, 32)}
        cases |= {f"{T} new tokens": {**fixed, "T": T} for T in (64, 128, 256, 512)}
    for name, case in cases.items():
        rows = measure(case, args.device, args.steps, runs)
        for who in rows:
            show(name, who, rows[who])
        if "trl" in rows:
            show_ratio(rows["ours"], rows["trl"])
        if (
            case["eos"] == 0 and not args.growth
        ):  # else the number of tokens is not known beforehand
            for phase, limit in limits(case, args.device).items():
                reached = limit / median(rows["ours"], phase)
                print(
                    f"    {phase}: {limit:.2f} s on paper, ours reaches {reached:.0%} of that speed"
                )


if __name__ == "__main__":
    main()
