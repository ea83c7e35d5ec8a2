"""Train a language model on math problems with GRPO: Algorithm 1 of DeepSeekMath, outcome supervision.

    python train.py                                            a tiny model on built-in problems, on a CPU
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct         a real model on GSM8K, on one GPU

Both take the same path through this file: options, models, (supervised warm-up), evaluation before, the
three loops of Algorithm 1 in `train`, evaluation after. A run writes a folder that transformers can load.
"""

import copy
import dataclasses
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import (IN_TERMS, InputError, Parser, build_prompt, decode, default_request, eos_token_ids, evaluate,
                  free_path, load_model, load_problems, pad_prompts, pick_device, run_cli, score_table, versions)
from grpo import grpo_loss, loss_denominator, outcome_advantages, sample_groups, token_logprobs
from reward import accuracy_reward


# --- Options: one dataclass, one dict, one place for every default ------------------------------------

def opt(default, help, least=None, above=None, choices=None, group=None):
    """A field of Config: default, one line of help, bounds; `group` opens a new group in --help."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, least=least, above=above, choices=choices, group=group))


@dataclasses.dataclass
class Config:
    model: str = opt("", "folder or hub name; empty: a tiny model made on the spot", group="what")
    problems: str = opt("gsm8k", "arithmetic, gsm8k, or a JSON-lines file")
    request: str = opt(None, "what follows each question (default: that of the problems)")
    out: str = opt("", "folder of the run (default: the next free runs/<problems>-<seed>)")
    seed: int = opt(0, "same seed, same CPU: same numbers", least=0)
    device: str = opt("auto", "auto, cpu or cuda")

    questions: int = opt(32, "questions per step, B", least=1, group="sampling")
    group_size: int = opt(8, "completions per question, G (paper: 64)", least=2)
    max_new_tokens: int = opt(512, "limit of a completion in tokens (paper: 1024)", least=1)
    temperature: float = opt(1.0, "of the sampling; log-probs are those of logits / T", above=0)

    iterations: int = opt(1, "times that the reference is renewed, I", least=1, group="algorithm")
    steps: int = opt(100, "steps per iteration, M", least=0)
    mu: int = opt(1, "updates on the same samples (paper: 1)", least=1)
    kl_beta: float = opt(0.04, "weight of the KL term (paper: 0.04); 0 loads no reference", least=0)
    clip_low: float = opt(0.2, "the ratio is clipped at 1 - this", above=0)
    clip_high: float = opt(0.2, "the ratio is clipped at 1 + this (DAPO: 0.28)", above=0)
    scale_rewards: str = opt("std", "std, or none for Dr. GRPO", choices=("std", "none"))
    aggregate: str = opt("sequence", "mean over completions (paper), tokens (DAPO) or a constant (Dr. GRPO)",
                         choices=("sequence", "token", "constant"))
    mask_truncated: bool = opt(False, "leave completions that hit the limit out of the loss")
    shuffle_rewards: bool = opt(False, "control experiment: shuffle rewards within each group")

    lr: float = opt(1e-6, "learning rate (paper: 1e-6)", above=0, group="optimizer")
    lr_warmup: int = opt(5, "steps until the learning rate is reached", least=0)
    lr_end: float = opt(1.0, "share of the learning rate left at the last step; it falls linearly", least=0)
    weight_decay: float = opt(0.0, "of AdamW", least=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", above=0)
    micro_tokens: int = opt(16384, "tokens per forward pass of the update", least=1)
    activation_checkpointing: bool = opt(False, "less memory for a slower update")

    sft_steps: int = opt(0, "steps of supervised warm-up on worked solutions", least=0, group="warm-up")
    sft_batch: int = opt(32, "solutions per step", least=1)
    sft_lr: float = opt(1e-5, "learning rate; rises, then falls linearly to 0", above=0)

    eval_problems: str = opt("", "held-out problems (default: the set's own; of a file, a tenth)", group="evaluation")
    eval_limit: int = opt(200, "at most so many problems", least=1)
    eval_samples: int = opt(8, "samples per problem, beside the greedy one", least=1)
    eval_every: int = opt(50, "steps between evaluations; 0: only before and after", least=0)
    show_every: int = opt(10, "steps between transcripts; 0: none", least=0)


# What differs for the built-in problems (--problems arithmetic, or no --model). A model of 200,000
# parameters wants a larger learning rate than one of 500 million.
BUILTIN = dict(problems="arithmetic", questions=16, max_new_tokens=40, steps=60, lr=3e-4, lr_end=0.1,
               sft_steps=800, sft_lr=6e-3, eval_every=20, show_every=20)


def parse_config(argv):
    """Config from the command line: what is given, else BUILTIN if it applies, else the default. Raises InputError."""
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        meta, flag = field.metadata, "--" + field.name.replace("_", "-")
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        text = f"{meta['help']} [{field.default}" if field.default not in ("", None) else meta["help"] + " ["
        text = (text + (f"; built-in: {BUILTIN[field.name]}" if field.name in BUILTIN else "") + "]").replace(" []", "")
        if field.type is bool:
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            group.add_argument(flag, type=field.type, choices=meta["choices"], metavar=field.name.upper(), help=text)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}

    builtin = not given.get("model") or given.get("problems") == "arithmetic"
    if not given.get("model") and given.get("problems", "arithmetic") != "arithmetic":
        raise InputError("the tiny built-in model knows only arithmetic: name a --model for --problems " + given["problems"])
    trained = {"sft_steps": 0} if given.get("model") else {}   # a model that is given needs no warm-up
    config = Config(**{**(BUILTIN if builtin else {}), **trained, **given})
    for field in dataclasses.fields(Config):
        value, least, above = getattr(config, field.name), field.metadata["least"], field.metadata["above"]
        for wrong, bound in ((least is not None and not value >= least, f"at least {least}"),
                             (above is not None and not above < value < math.inf, f"above {above}")):
            if wrong:
                raise InputError(f"--{field.name.replace('_', '-')} must be {bound}, not {value}: {field.metadata['help']}")
    if config.request is None:
        config.request = default_request(config.problems)
    return config


# --- The tiny model of the default run ---------------------------------------------------------------

def make_tiny_model(seed, device):
    """(model, tokenizer): a Llama of 200,000 random parameters that knows numbers, signs and \\boxed{}."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, decoders
    words = ["<pad>", "<end>", "<user>", "<assistant>", "<unk>", "\\boxed{", "}", "\n", "+", "-", "="]
    words += [str(number) for number in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[0-9]{1,2}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()   # joins the tokens without spaces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                        unk_token="<unk>", additional_special_tokens=["<user>", "<assistant>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=1, pad_token_id=0))
    return model.to(device), tokenizer


# --- Batches -----------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One step's completions, scored. N = B * G rows, question-major."""
    prompt_ids: torch.Tensor       # (N, P)
    prompt_mask: torch.Tensor      # (N, P)
    completion_ids: torch.Tensor   # (N, T)
    mask: torch.Tensor             # (N, T) tokens that count
    logp_sampler: torch.Tensor     # (N, T) what the sampler says of its own samples
    truncated: torch.Tensor        # (N,)
    rewards: torch.Tensor          # (B, G)
    advantages: torch.Tensor       # (N,)
    texts: list                    # N completions


def micro_batches(prompt_mask, mask, limit):
    """Cut N rows into lists of row numbers, each of at most `limit` tokens with its padding. Each row once.

    Sorted by length, so that long rows keep company and few tokens are padding.
    """
    lengths = (prompt_mask.sum(dim=1) + mask.sum(dim=1)).tolist()
    cuts, longest = [[]], 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        longest = max(longest, lengths[row])
        if cuts[-1] and (len(cuts[-1]) + 1) * longest > limit:
            cuts.append([])
        cuts[-1].append(row)
    return cuts


def score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, temperature):
    """`token_logprobs` of some rows, without the padding columns that none of them needs.

    Returns logp and entropy (n, t) and the mask (n, t), for n rows whose longest completion has t tokens.
    """
    P, t = prompt_mask[rows].sum(dim=1).max(), mask[rows].sum(dim=1).max()
    return *token_logprobs(model, prompt_ids[rows, -P:], prompt_mask[rows, -P:], completion_ids[rows, :t],
                           mask[rows, :t], temperature), mask[rows, :t]


def learning_rate(step, steps, peak, warmup, end):
    """Linear up to `peak` over `warmup` steps, then linear down to `end * peak` at the last of `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (1 - end) * (step - warmup) / max(1, steps - 1 - warmup))


def take_step(model, optimizer, lr, max_grad_norm):
    """One optimizer step on the gradients that have been summed up; returns their norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def warm_up(model, tokenizer, problems, config, autocast):
    """Supervised fine-tuning on worked solutions, cross-entropy on the completion only, as before RL in the paper."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng, pad = random.Random(config.seed), tokenizer.pad_token_id
    bar = tqdm(range(config.sft_steps), desc="supervised warm-up")
    for step in bar:
        batch = rng.sample(problems, min(config.sft_batch, len(problems)))
        prompt_ids, prompt_mask = pad_prompts(
            [build_prompt(tokenizer, p.question, config.request) for p in batch], pad, model.device)
        solutions = [tokenizer(p.solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for p in batch]
        T = max(map(len, solutions))
        completion_ids = torch.tensor([s + [pad] * (T - len(s)) for s in solutions], device=model.device)
        mask = torch.arange(T, device=model.device) < torch.tensor([[len(s)] for s in solutions], device=model.device)
        total = 0.0
        for rows in micro_batches(prompt_mask, mask, config.micro_tokens):
            with autocast():
                logp, _, _ = score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, 1.0)
            loss = -logp.sum() / mask.sum()
            loss.backward()
            total += loss.item()
        take_step(model, optimizer, learning_rate(step, config.sft_steps, config.sft_lr, 20, 0.0), config.max_grad_norm)
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)


# --- One step of GRPO --------------------------------------------------------------------------------

def sample_and_score(sampler, tokenizer, problems, config, generator, eos_ids):
    """G completions for each of B problems, their rewards and advantages: the inner lines of Algorithm 1."""
    prompts = [build_prompt(tokenizer, p.question, config.request) for p in problems]
    prompt_ids, prompt_mask = pad_prompts(prompts, tokenizer.pad_token_id, sampler.device)      # (B, P)
    samples = sample_groups(sampler, prompt_ids, prompt_mask, config.group_size, config.max_new_tokens,
                            eos_ids, tokenizer.pad_token_id, config.temperature, generator)
    texts = decode(tokenizer, samples)
    G = config.group_size
    rewards = torch.tensor([[accuracy_reward(text, problem.answer) for text in texts[i * G:(i + 1) * G]]
                            for i, problem in enumerate(problems)])                             # (B, G)
    if config.shuffle_rewards:
        rewards = torch.stack([row[torch.randperm(G)] for row in rewards])
    advantages = outcome_advantages(rewards, config.scale_rewards).to(sampler.device)           # (B, G)
    return Batch(prompt_ids.repeat_interleave(G, 0), prompt_mask.repeat_interleave(G, 0), samples.completion_ids,
                 samples.mask, samples.logp, samples.truncated, rewards, advantages.flatten(), texts)


def update(policy, reference, optimizer, batch, config, lr, autocast):
    """mu passes over one batch, each with one optimizer step. Returns metrics, averaged over all tokens.

    pi_old is the policy before the first optimizer step, so the first pass yields its log-probs for free.
    """
    loss_mask = batch.mask & ~batch.truncated[:, None] if config.mask_truncated else batch.mask
    denominator = loss_denominator(loss_mask, config.aggregate, config.max_new_tokens)
    cuts = micro_batches(batch.prompt_mask, batch.mask, config.micro_tokens)
    inputs = batch[:4]
    logp_old, logp_ref = [None] * len(cuts), [None] * len(cuts)
    sums = dict.fromkeys(("kl", "clip_share", "entropy", "gap", "loss", "grad_norm"), 0.0)
    policy.train()   # for activation checkpointing; dropout is 0, so nothing else depends on it
    bar = tqdm(total=len(cuts) * config.mu, desc="update", delay=5, leave=False)
    for pass_number in range(config.mu):
        for i, rows in enumerate(cuts):
            if reference is not None and pass_number == 0:
                with torch.no_grad():
                    logp_ref[i] = score_rows(reference, rows, *inputs, config.temperature)[0]
            with autocast():
                logp, entropy, mask = score_rows(policy, rows, *inputs, config.temperature)     # (n, t)
            if pass_number == 0:
                # PAPER: pi_old here is what the trainer computes for the sampled tokens, not what the
                # sampler did. The two differ by rounding (in bf16 more), which is logged as the gap.
                logp_old[i] = logp.detach()
                sums["gap"] += (logp_old[i] - batch.logp_sampler[rows, :mask.shape[1]])[mask].abs().sum().item()
                sums["entropy"] += entropy.sum().item()
            in_loss = loss_mask[rows, :mask.shape[1]]
            loss, diagnostics = grpo_loss(
                logp, logp_old[i], logp_ref[i], batch.advantages[rows], in_loss, config.clip_low, config.clip_high,
                config.kl_beta, config.aggregate, config.max_new_tokens, denominator)
            loss.backward()
            sums["loss"] += loss.item() / config.mu
            for name, value in diagnostics.items():
                sums[name] += value.item() * in_loss.sum().item() / config.mu
            bar.update()
        sums["grad_norm"] += take_step(policy, optimizer, lr, config.max_grad_norm) / config.mu
    bar.close()
    policy.eval()
    for name, tokens in (("gap", batch.mask), ("entropy", batch.mask), ("kl", loss_mask), ("clip_share", loss_mask)):
        sums[name] /= max(1, tokens.sum().item())
    return sums


# --- The log -----------------------------------------------------------------------------------------

COLUMNS = dict(step="5d", reward="7.3f", zero_var="9.2f", length="7.1f", truncated="10.2f", kl="7.4f",
               clip_share="11.3f", entropy="8.3f", gap="8.0e", grad_norm="10.3f", lr="8.1e", tok_s="7.0f",
               t_sample="9.2f", t_update="9.2f", mem_gb="7.2f")


def log_line(metrics):
    return " ".join(format(metrics[name], spec) for name, spec in COLUMNS.items())


def peak_memory(device):
    """Largest memory so far in GB: allocated on the GPU, else resident of this process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    except ImportError:   # Windows
        return 0.0


# --- Algorithm 1 -------------------------------------------------------------------------------------

def train(config, policy, tokenizer, problems, held_out, out, bf16):
    """The three loops of Algorithm 1. Writes out/metrics.jsonl; returns the scores before and after."""
    device = policy.device
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if bf16 else nullcontext
    # The optimizer moves float32 weights. For sampling on a GPU there is a bf16 copy, renewed at each step.
    sampler = copy.deepcopy(policy).to(torch.bfloat16) if bf16 else policy
    if config.activation_checkpointing:
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator(device).manual_seed(config.seed)
    rng, queue, eos_ids = random.Random(config.seed), [], eos_token_ids(policy, tokenizer)
    total = config.iterations * config.steps

    def renew_sampler():
        if sampler is not policy:
            with torch.no_grad():
                for copied, weight in zip(sampler.parameters(), policy.parameters()):
                    copied.copy_(weight)

    def evaluate_now():
        renew_sampler()
        return {split: evaluate(sampler, tokenizer, rows, config.request, config.max_new_tokens,
                                config.eval_samples, config.temperature, config.seed)[0]
                for split, rows in held_out.items()}

    def record(metrics):
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")

    before = after = evaluate_now()
    record({"step": 0, "eval": before})
    for split, scores in before.items():
        print(f"before, {split}:\n{score_table(scores)}", flush=True)
    step = 0
    for iteration in range(config.iterations):
        # pi_ref <- pi_theta
        reference = copy.deepcopy(sampler).requires_grad_(False) if config.kl_beta else None
        for _ in range(config.steps):
            started = time.perf_counter()
            if len(queue) < config.questions:   # every problem once before any comes again
                queue += rng.sample(problems, len(problems)) * math.ceil(config.questions / len(problems))
            batch_problems, queue = queue[:config.questions], queue[config.questions:]
            # pi_old <- pi_theta; sample G completions for each question, score them
            renew_sampler()
            batch = sample_and_score(sampler, tokenizer, batch_problems, config, generator, eos_ids)
            sampled = time.perf_counter()
            # mu updates on these samples
            lr = learning_rate(step, total, config.lr, config.lr_warmup, config.lr_end)
            metrics = update(policy, reference, optimizer, batch, config, lr, autocast)
            step += 1

            spread = batch.rewards.amax(1) - batch.rewards.amin(1)
            metrics.update(
                step=step, iteration=iteration, reward=batch.rewards.mean().item(), lr=lr,
                zero_var=(spread < 1e-6).float().mean().item(),
                length=batch.mask.sum(1).float().mean().item(), truncated=batch.truncated.float().mean().item(),
                tok_s=batch.mask.sum().item() / (sampled - started), t_sample=sampled - started,
                t_update=time.perf_counter() - sampled, mem_gb=peak_memory(device))
            if step % 20 == 1:
                print(" ".join(f"{name:>{int(float(spec[:-1]))}}" for name, spec in COLUMNS.items()))
            print(log_line(metrics), flush=True)
            if config.show_every and step % config.show_every == 0:
                print(f"--- {batch_problems[0].question}   (gold: {batch_problems[0].answer})\n{batch.texts[0]}\n"
                      f"--- reward {batch.rewards[0, 0]:.0f}, advantage {batch.advantages[0]:+.2f}", flush=True)
            if step == total or config.eval_every and step % config.eval_every == 0:
                metrics["eval"] = after = evaluate_now()
                print("  ".join(f"held out, {split}: greedy {s['greedy']:.3f}, sampled {s['sampled']:.3f}"
                                for split, s in after.items()), flush=True)
            record(metrics)
    return before, after


def save(policy, tokenizer, folder):
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv):
    started = time.time()
    config = parse_config(argv)
    # Everything that can be wrong with the input comes first; only then is anything written.
    if config.out and Path(config.out).exists():
        raise InputError(f"--out {config.out} exists already, and nothing is overwritten: name another folder")
    problems, sft_problems, held_out = all_problems(config)
    device, bf16 = pick_device(config.device)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    if config.model:
        policy, tokenizer = load_model(config.model, device)
    else:
        policy, tokenizer = make_tiny_model(config.seed, device)
    longest = max(len(build_prompt(tokenizer, p.question, config.request))
                  for rows in (problems, *held_out.values()) for p in rows)
    room = getattr(policy.config, "max_position_embeddings", None) or math.inf
    if longest + config.max_new_tokens > room:
        raise InputError(f"the longest prompt has {longest} tokens; with --max-new-tokens {config.max_new_tokens} "
                         f"that is more than the {room} positions of the model: lower --max-new-tokens")

    out = Path(config.out) if config.out else free_path(f"runs/{Path(config.problems).stem}-{config.seed}")
    out.mkdir(parents=True)
    settings = dataclasses.asdict(config)
    (out / "run.json").write_text(json.dumps({"config": settings, "versions": versions(), "seed": config.seed}, indent=1))
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters on {device}; the run goes to {out}")
    try:
        if config.sft_steps:
            autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if bf16 else nullcontext
            warm_up(policy, tokenizer, sft_problems, config, autocast)
            save(policy, tokenizer, out / "sft")
        before, after = train(config, policy, tokenizer, problems, held_out, out, bf16)
    except KeyboardInterrupt:
        save(policy, tokenizer, out)
        print(f"\ninterrupted; the model as it is now is in {out}", file=sys.stderr)
        sys.exit(130)
    save(policy, tokenizer, out)
    seconds = time.time() - started
    (out / "summary.json").write_text(json.dumps(
        {"before": before, "after": after, "seconds": seconds, "seed": config.seed, "config": settings}, indent=1))
    for split in before:
        for name in ("sampled", "greedy", f"maj@{config.eval_samples}", f"pass@{config.eval_samples}"):
            cells = [f"{s[name]:.3f} ({s[name + '_interval'][0]:.3f} - {s[name + '_interval'][1]:.3f})"
                     for s in (before[split], after[split])]
            print(f"{split:<4}{name:<8} {cells[0]} -> {cells[1]}")
    print(f"saved to {out} after {seconds:.0f} s; python eval.py --model {out} --problems {config.problems}")


def all_problems(config):
    """(problems to train on, problems with solutions for the warm-up, {split: held-out problems})."""
    named = config.problems in ("arithmetic", "gsm8k")
    problems = load_problems(config.problems, "train")
    if config.eval_problems:
        held_out = {"in": load_problems(config.eval_problems, "in" if config.eval_problems == "arithmetic" else "test")}
    elif config.problems == "arithmetic":
        held_out = {split: load_problems("arithmetic", split) for split in ("in", "out")}
    elif named:
        held_out = {"in": load_problems(config.problems, "test")}
    else:   # a user's own file: hold a tenth of it out
        problems = random.Random(config.seed).sample(problems, len(problems))
        cut = min(config.eval_limit, math.ceil(len(problems) / 10))
        problems, held_out = problems[cut:], {"in": problems[:cut]}
    if not problems:
        raise InputError(f"{config.problems} has too few problems to hold some out: add some, or name --eval-problems")
    sft = load_problems("arithmetic", "sft") if config.problems == "arithmetic" else problems
    sft = [p for p in sft if p.solution]
    if config.sft_steps and not sft:
        raise InputError(f"--sft-steps needs worked solutions, and {config.problems} has none: use --sft-steps 0")
    return problems, sft, {split: rows[:config.eval_limit] for split, rows in held_out.items()}


if __name__ == "__main__":
    run_cli(main)
