"""Train a language model on math problems with GRPO: Algorithm 1 of DeepSeekMath, by right or wrong answers.

    python train.py                                        a tiny model on built-in problems; a CPU will do
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct     a real model on GSM8K, on one GPU

Both take the same way through this file: options, models, (supervised warm-up), evaluation before, the
three loops of Algorithm 1 in `train`, evaluation after. A run is a folder that transformers can load.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import runpy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import (SAMPLE_TOKENS, VERSIONS, InputError, Parser, check_room, encode_prompts, eos_token_ids, evaluate,
                  load_model, load_problems, pick_device, run_cli, sample_problems, score_table)
from grpo import bf16_weights, grpo_loss, loss_denominator, outcome_advantages, token_logprobs
from reward import MATH_REQUEST, accuracy_rewards


# --- 1. Options: one dataclass, and one dict of what differs for the built-in problems ---------------

def opt(default, help, least=None, above=None, choices=None, group=None):
    """A field of Config: its default, a line of help, its bounds; `group` starts a new group in --help."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, least=least, above=above, choices=choices, group=group))


@dataclasses.dataclass
class Config:
    model: str = opt("", "folder or hub name; none: a tiny model made on the spot", group="what to train")
    problems: str = opt("gsm8k", "arithmetic, gsm8k, or a JSON-lines file")
    reward: str = opt("", "FILE.py:FUNCTION, called like accuracy_rewards of reward.py; none: that one")
    request: str = opt(None, "what follows each question; none: as usual for the problems")
    out: str = opt("", "folder of the run; none: the next free runs/<problems>-<seed>")
    seed: int = opt(0, "the same seed on the same CPU gives the same numbers", least=0)
    device: str = opt("auto", "auto, cpu or cuda")

    questions: int = opt(32, "questions per step, B", least=1, group="sampling")
    group_size: int = opt(8, "completions per question, to compare with each other, G (paper: 64)", least=2)
    max_new_tokens: int = opt(512, "limit of a completion in tokens (paper: 1024)", least=1)
    sample_tokens: int = opt(SAMPLE_TOKENS, "tokens, prompts too, that are sampled at a time (KV cache)", least=1)
    temperature: float = opt(1.0, "of sampling and log-probs; at 0 all samples would be the same", above=0)

    iterations: int = opt(1, "how often the reference is renewed, I", least=1, group="algorithm")
    steps: int = opt(100, "steps per iteration, M", least=0)
    mu: int = opt(1, "updates on the same samples (paper: 1)", least=1)
    kl_beta: float = opt(0.04, "weight of the KL term (paper: 0.04); 0 loads no reference", least=0)
    clip_low: float = opt(0.2, "the ratio is clipped below 1 - this", least=0)
    clip_high: float = opt(0.2, "the ratio is clipped above 1 + this (DAPO: 0.28)", least=0)
    scale_rewards: str = opt("std", "by the group's std (paper), or none (Dr. GRPO)", choices=("std", "none"))
    aggregate: str = opt("sequence", "mean over completions: sequence (paper); over all tokens: token (DAPO); "
                         "by a constant: constant (Dr. GRPO)", choices=("sequence", "token", "constant"))
    mask_truncated: bool = opt(False, "leave completions that hit the limit out of the loss")
    shuffle_rewards: bool = opt(False, "control experiment: shuffle the rewards within each group")

    lr: float = opt(1e-6, "learning rate (paper: 1e-6)", above=0, group="optimizer")
    lr_warmup: int = opt(5, "steps in which the learning rate rises", least=0)
    lr_end: float = opt(1.0, "share of the learning rate that is left at the end; it falls linearly", least=0)
    weight_decay: float = opt(0.0, "of AdamW", least=0)
    max_grad_norm: float = opt(1.0, "longer gradients are scaled down to this norm", above=0)
    micro_tokens: int = opt(16384, "tokens, prompts and padding too, per forward pass but for sampling", least=1)
    activation_checkpointing: bool = opt(False, "less memory, slower update")

    sft_steps: int = opt(0, "steps on worked solutions before RL", least=0, group="supervised warm-up (SFT)")
    sft_batch: int = opt(32, "solutions per step", least=1)
    sft_lr: float = opt(1e-5, "peak of the learning rate, which rises for 20 steps and falls to 0", above=0)

    eval_problems: str = opt("", "held-out problems; none: the set's, or a tenth of a file", group="evaluation")
    eval_limit: int = opt(200, "at most so many of them", least=1)
    eval_samples: int = opt(8, "samples per problem, beside the greedy one", least=1)
    eval_every: int = opt(50, "steps between evaluations; 0: only before and after", least=0)
    show_every: int = opt(10, "steps between transcripts; 0: none", least=0)


# What differs when no --model is given. The tiny model wants a larger learning rate than a real one.
BUILTIN = dict(problems="arithmetic", questions=16, max_new_tokens=40, steps=60, lr=3e-4, lr_end=0.1,
               sft_steps=1000, sft_lr=4e-3, eval_every=20, show_every=20)


def parse_config(argv):
    """Config of a command line: what is given, else BUILTIN if it applies, else the default. Or InputError."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        meta, flag = field.metadata, "--" + field.name.replace("_", "-")
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        text = f"{meta['help']} [{'none' if field.default in ('', None) else field.default}"
        text += f"; built-in: {BUILTIN[field.name]}]" if field.name in BUILTIN else "]"
        if field.type is bool:
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            group.add_argument(flag, type=field.type, choices=meta["choices"], metavar="X", help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    model, problems = given.get("model"), given.get("problems")
    if not model and problems not in (None, "arithmetic"):
        raise InputError(f"the built-in model knows only arithmetic: --problems {problems} needs a --model")
    config = Config(**{**({} if model else BUILTIN), **given})
    for field in dataclasses.fields(Config):
        flag, value, meta = "--" + field.name.replace("_", "-"), getattr(config, field.name), field.metadata
        bound, low = ("at least", meta["least"]) if meta["above"] is None else ("above", meta["above"])
        if low is not None and (not low <= value < 2 ** 63 or value == meta["above"]):
            raise InputError(f"{flag} must be finite and {bound} {low}, not {value} ({meta['help']})")
    if config.request is None:
        config.request = "" if config.problems == "arithmetic" else MATH_REQUEST
    return config


# --- 2. The model and the problems ------------------------------------------------------------------

def make_tiny_model(seed, device):
    """(model, tokenizer): a Llama of 210,000 random parameters that knows numbers, signs and \\boxed{}."""
    words = [*"<pad> <end> <unk> <user> <assistant> \\boxed{ }".split(), "\n", *"+-=", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[0-9]{1,2}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()   # joins tokens without spaces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                        unk_token="<unk>", additional_special_tokens=["<user>", "<assistant>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.08,
        bos_token_id=None, eos_token_id=1, pad_token_id=0))
    return model.to(device), tokenizer


def gather_problems(config):
    """(training problems, those with solutions for the warm-up, held-out ones by split: "in" or longer, "out")."""
    problems = load_problems(config.problems, "train")
    worked = load_problems("arithmetic", "sft") if config.problems == "arithmetic" else problems
    named = config.eval_problems or config.problems
    if named == "arithmetic":
        held_out = {split: load_problems(named, split) for split in ("in", "out")}
    elif named == "gsm8k" or config.eval_problems:
        held_out = {"in": load_problems(named, "test")}
    else:   # a user's own file: a tenth of it is never trained on, the same tenth for every seed
        cut = min(math.ceil(len(problems) / 10), config.eval_limit)
        held_out = {"in": random.Random(0).sample(problems, cut)}
        questions = {problem.question for problem in held_out["in"]}
        problems = worked = [problem for problem in problems if problem.question not in questions]
    worked = [problem for problem in worked if problem.solution]
    if not problems:
        raise InputError(f"{config.problems} is too small to hold some out: add some, or give --eval-problems")
    if config.sft_steps and not worked:
        raise InputError(f"--sft-steps needs worked solutions; {config.problems} has none, so leave it out")
    return problems, worked, {split: rows[:config.eval_limit] for split, rows in held_out.items()}


# --- 3. Batches, and the supervised warm-up ---------------------------------------------------------

class Batch(NamedTuple):
    """The completions of one step, N = B * G rows, question-major. The first four fields are for `score_rows`."""
    prompt_ids: torch.Tensor       # (B, P)
    prompt_mask: torch.Tensor      # (B, P)
    completion_ids: torch.Tensor   # (N, T)
    mask: torch.Tensor             # (N, T) the tokens that count
    logp_sampler: torch.Tensor     # (N, T) what the sampler says of its own tokens
    truncated: torch.Tensor        # (N,)
    rewards: torch.Tensor          # (B, G)
    advantages: torch.Tensor       # (N,)
    texts: list                    # N strings
    t_reward: float                # seconds that the reward took


def micro_batches(rows, prompt_mask, mask, limit):
    """Cut row numbers into lists of at most `limit` tokens, with padding; a row that is longer stands alone.

    A prompt counts for each of its rows: its keys and values are there as often, though it goes through the
    model only once. Sorted by the length of the completions, so that little of them is padding.
    """
    G, p, t = len(mask) // len(prompt_mask), prompt_mask.sum(dim=1).tolist(), mask.sum(dim=1).tolist()
    cuts = [[]]
    for row in sorted(rows, key=lambda row: t[row]):
        together = cuts[-1] + [row]   # of these `row` is the longest
        if cuts[-1] and len(together) * (max(p[r // G] for r in together) + t[row]) > limit:
            cuts.append([])
        cuts[-1].append(row)
    return cuts


def score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, temperature):
    """logp, entropy and mask, each (n, t), of n rows. Prompts go through once, columns of padding alone do not."""
    rows, G = torch.tensor(rows, device=mask.device), len(mask) // len(prompt_mask)
    prompts, question = torch.unique(rows // G, return_inverse=True)   # prompts[question] is rows // G
    p, t = prompt_mask[prompts].sum(dim=1).max(), mask[rows].sum(dim=1).max()
    mask = mask[rows, :t]
    return *token_logprobs(model, prompt_ids[prompts, -p:], prompt_mask[prompts, -p:], completion_ids[rows, :t],
                           mask, temperature, question), mask


def learning_rate(step, steps, peak, warmup, end):
    """Of step 0, 1, ...: up linearly to `peak` in `warmup` steps, then down linearly to `end * peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (1 - end) * (step - warmup) / max(1, steps - 1 - warmup))


def optimizer_step(optimizer, lr, max_grad_norm):
    """One step along the gradients summed up so far; returns their norm before it is cut to `max_grad_norm`."""
    (group,) = optimizer.param_groups
    # error_if_nonfinite: a nan would spread to all weights in this very step; so the run ends here
    norm = torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm, error_if_nonfinite=True)
    group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def warm_up(policy, tokenizer, problems, config, autocast):
    """Supervised fine-tuning on worked solutions, before any reinforcement: cross-entropy on the completion."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng, eos = random.Random(config.seed), [tokenizer.eos_token_id]
    policy.train()
    bar = tqdm(range(config.sft_steps), desc="supervised warm-up")
    for step in bar:
        batch = rng.sample(problems, min(config.sft_batch, len(problems)))
        prompt_ids, prompt_mask = encode_prompts(tokenizer, batch, config.request, policy.device)
        solutions = [tokenizer(problem.solution, add_special_tokens=False).input_ids + eos for problem in batch]
        padded = tokenizer.pad({"input_ids": solutions}, padding_side="right", return_attention_mask=True,
                               return_tensors="pt")
        completion_ids, mask = (padded[key].to(policy.device) for key in ("input_ids", "attention_mask"))
        mask, total = mask.bool(), 0.0
        for rows in micro_batches(range(len(mask)), prompt_mask, mask, config.micro_tokens):
            with autocast():
                logp, _, _ = score_rows(policy, rows, prompt_ids, prompt_mask, completion_ids, mask, 1.0)
            loss = -logp.sum() / mask.sum()   # mean over the tokens of the whole batch
            loss.backward()
            total += loss.item()
        lr = learning_rate(step, config.sft_steps, config.sft_lr, 20, 0.0)
        optimizer_step(optimizer, lr, config.max_grad_norm)
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
    policy.eval()


# --- 4. One step of GRPO ----------------------------------------------------------------------------

@functools.cache   # a user's file is run once
def load_reward(name):
    """The function FILE.py:FUNCTION, or accuracy_rewards for "". Raises InputError."""
    path, _, function = name.rpartition(":")
    try:
        return runpy.run_path(path)[function] if name else accuracy_rewards
    except Exception as error:   # a user's file may fail in any way
        raise InputError(f"--reward {name}: {error!r}; want FILE.py:FUNCTION, see accuracy_rewards in reward.py")


def score_texts(reward, problems, texts):
    """Rewards of N completions, each with its problem: (N,). Raises InputError with the first that has none."""
    questions, answers = [problem.question for problem in problems], [problem.answer for problem in problems]
    try:
        rewards = torch.tensor(reward(prompts=questions, completions=texts, answer=answers), dtype=torch.float32)
        if rewards.shape != (len(texts),) or not rewards.isfinite().all():
            raise ValueError(f"{rewards.tolist()} is not one finite number for each completion")
        return rewards
    except Exception as error:   # a user's function may fail in any way
        for problem, text in zip(problems, texts) if len(texts) > 1 else ():   # of which completion?
            score_texts(reward, [problem], [text])
        of = f"question {questions[0]!r}, completion {texts[0]!r}" if len(texts) == 1 else "not of any one completion"
        raise InputError(f"--reward: {error!r}; {of}")


def sample_and_score(sampler, tokenizer, problems, config, generator):
    """G completions for each of B problems, their rewards and their advantages."""
    G = config.group_size
    prompt_ids, prompt_mask, samples, texts = sample_problems(
        sampler, tokenizer, problems, config.request, G, config.max_new_tokens, config.temperature, generator,
        config.sample_tokens)
    start = time.perf_counter()   # the texts are there, so a GPU has finished
    rows = [problem for problem in problems for _ in range(G)]   # question-major, as the texts are
    rewards = score_texts(load_reward(config.reward), rows, texts).view(len(problems), G)   # (B, G)
    if config.shuffle_rewards:
        rewards = torch.stack([group[torch.randperm(G)] for group in rewards])
    advantages = outcome_advantages(rewards, config.scale_rewards).flatten().to(sampler.device)   # (N,)
    return Batch(prompt_ids, prompt_mask, *samples, rewards, advantages, texts, time.perf_counter() - start)


def update(policy, optimizer, batch, cuts, logp_ref, config, lr, autocast):
    """mu optimizer steps on one batch. Returns means: of gap and entropy over the tokens of `cuts`, first pass only;
    of kl and clip_share over the tokens in the loss, all passes; of loss and grad_norm over the passes.

    cuts: the micro-batches; logp_ref: the reference's log-probs of each of them, or None. In the first pass
    the weights are still those that sampled, so its log-probs are logp_old, and later passes reuse them.
    """
    in_loss = batch.mask & ~batch.truncated[:, None] if config.mask_truncated else batch.mask   # (N, T)
    denominator = loss_denominator(in_loss, config.aggregate, config.max_new_tokens)
    tokens, tokens_in_loss = batch.mask[sum(cuts, [])].sum().item(), max(1, in_loss.sum().item())
    means = dict.fromkeys(("loss", "kl", "clip_share", "entropy", "gap", "grad_norm"), 0.0)
    logp_old = [None] * len(cuts)
    policy.train()   # activation checkpointing works only in train(); load_model has set every dropout to 0
    for pass_number in range(config.mu):
        for i, rows in enumerate(tqdm(cuts, desc="update", delay=5, leave=False)):
            with autocast():
                logp, entropy, mask = score_rows(policy, rows, *batch[:4], config.temperature)   # (n, t)
            t = mask.shape[1]
            if pass_number == 0:
                # PAPER: pi_old is what the trainer computes for the sampled tokens, not what the sampler
                # said. The two differ by rounding, in bf16 visibly; the gap is logged.
                logp_old[i] = logp.detach()
                gap = (logp_old[i] - batch.logp_sampler[rows, :t])[mask].abs()
                means["gap"] += gap.sum().item() / tokens
                means["entropy"] += entropy.sum().item() / tokens
            loss_mask = in_loss[rows, :t]
            loss, diagnostics = grpo_loss(
                logp, logp_old[i], logp_ref[i], batch.advantages[rows], loss_mask, config.clip_low,
                config.clip_high, config.kl_beta, config.aggregate, config.max_new_tokens, denominator)
            loss.backward()
            means["loss"] += loss.item() / config.mu
            for name, value in diagnostics.items():
                means[name] += value.item() * loss_mask.sum().item() / tokens_in_loss / config.mu
        means["grad_norm"] += optimizer_step(optimizer, lr, config.max_grad_norm) / config.mu
    policy.eval()
    return means


# --- 5. The log -------------------------------------------------------------------------------------

COLUMNS = dict(step="5d", reward="7.3f", zero_var="9.2f", length="7.1f", truncated="10.2f", loss="8.4f",
               kl="8.4f", clip_share="11.3f", entropy="8.3f", gap="8.0e", grad_norm="10.3f", lr="8.1e",
               tok_s="8.0f", t_sample="9.2f", t_reward="9.2f", t_ref="6.2f", t_update="9.2f", mem_gb="7.2f")


def print_metrics(metrics):
    """One line of fixed columns, a heading above every twentieth."""
    if metrics["step"] % 20 == 1:
        print(" ".join(f"{name:>{spec.split('.')[0].rstrip('d')}}" for name, spec in COLUMNS.items()))
    print(" ".join(format(metrics[name], spec) for name, spec in COLUMNS.items()), flush=True)
    if metrics["truncated"] > 0.5:
        print(f"{metrics['truncated']:.0%} of the completions hit the limit: raise --max-new-tokens?")


def clock(device):
    """Seconds; on a GPU only after it has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The largest memory so far in GB: allocated on a GPU, else that of the process (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource   # not on Windows
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- 6. Algorithm 1 ---------------------------------------------------------------------------------

def train(config, policy, tokenizer, problems, held_out, out, autocast, bf16, summary):
    """The three loops: iterations, steps, updates. Writes out/metrics.jsonl, and the scores into `summary`."""
    device = policy.device
    # The optimizer moves float32 weights. On a GPU the samples come from a bf16 copy, renewed at each step.
    sampler = bf16_weights(copy.deepcopy(policy)) if bf16 else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    generator, rng = torch.Generator(device).manual_seed(config.seed), random.Random(config.seed)
    step, total, queue = 0, config.iterations * config.steps, []

    @torch.no_grad()
    def renew_sampler():
        if sampler is not policy:
            for copied, weight in zip(sampler.parameters(), policy.parameters()):
                copied.copy_(weight)

    def evaluate_now():
        renew_sampler()
        return {split: evaluate(sampler, tokenizer, rows, config.request, config.max_new_tokens,
                                config.eval_samples, config.temperature, config.seed, config.sample_tokens)[0]
                for split, rows in held_out.items()}

    def record(metrics):
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")

    summary["before"] = summary["after"] = evaluate_now()
    record({"step": 0, "eval": summary["before"]})
    for split, scores in summary["before"].items():
        print(f"held out, {split}, before:\n{score_table(scores)}", flush=True)
    if config.mu == 1 and config.aggregate == "sequence" and not config.mask_truncated:
        print("the loss stays near 0 because the advantages of a group add up to 0; its gradient does not")

    for iteration in range(config.iterations):
        # pi_ref <- pi_theta
        renew_sampler()
        reference = copy.deepcopy(sampler) if config.kl_beta else None
        for _ in range(config.steps):
            start = clock(device)
            while len(queue) < config.questions:   # every problem once, then every problem once more
                queue += rng.sample(problems, len(problems))
            questions, queue = queue[:config.questions], queue[config.questions:]
            # pi_old <- pi_theta; G completions of each question, their rewards and advantages
            renew_sampler()
            batch = sample_and_score(sampler, tokenizer, questions, config, generator)
            sampled = clock(device)
            # what pi_ref says of them. (Without a KL term a completion of advantage 0 has no gradient, and is
            # left out; one stays, so that the optimizer makes its step.)
            rows = [i for i, a in enumerate(batch.advantages.tolist()) if a or config.kl_beta] or [0]
            cuts = micro_batches(rows, batch.prompt_mask, batch.mask, config.micro_tokens)
            with torch.no_grad():
                logp_ref = [None if reference is None else
                            score_rows(reference, rows, *batch[:4], config.temperature)[0] for rows in cuts]
            referred = clock(device)
            # mu updates of pi_theta
            lr = learning_rate(step, total, config.lr, config.lr_warmup, config.lr_end)
            metrics = update(policy, optimizer, batch, cuts, logp_ref, config, lr, autocast)
            step += 1

            zero_var = (batch.advantages.view_as(batch.rewards) == 0).all(dim=1)
            lengths, t_sample = batch.mask.sum(dim=1).float(), sampled - start - batch.t_reward
            metrics.update(
                step=step, iteration=iteration, reward=batch.rewards.mean().item(), lr=lr,
                zero_var=zero_var.float().mean().item(), left_out=1 - len(rows) / len(lengths),
                length=lengths.mean().item(), truncated=batch.truncated.float().mean().item(),
                tok_s=lengths.sum().item() / t_sample, t_sample=t_sample, t_reward=batch.t_reward,
                t_ref=referred - sampled, t_update=clock(device) - referred, mem_gb=peak_memory(device))
            print_metrics(metrics)
            if config.show_every and step % config.show_every == 0:
                print(f"--- {questions[0].question}   (gold: {questions[0].answer})\n{batch.texts[0]}\n"
                      f"--- reward {batch.rewards[0, 0]:g}, advantage {batch.advantages[0]:+.2f}", flush=True)
            if step == total or config.eval_every and step % config.eval_every == 0:
                metrics["eval"] = summary["after"] = evaluate_now()
                for split, scores in summary["after"].items():
                    print(f"held out, {split}: greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}")
            record(metrics)


def save(policy, tokenizer, folder):
    """Write a folder for from_pretrained, without sampling settings that came along: some cannot be saved."""
    policy.generation_config = GenerationConfig(
        eos_token_id=sorted(eos_token_ids(policy, tokenizer)), pad_token_id=tokenizer.pad_token_id)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv):
    started, config = time.time(), parse_config(argv)
    # Whatever can be wrong with the input is found out first; only then is anything written.
    name = f"runs/{Path(config.problems).stem}-{config.seed}"
    numbered = (Path(f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    out = Path(config.out) if config.out else next(path for path in numbered if not path.exists())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out} is a file or not empty, and nothing is overwritten: name another folder")
    load_reward(config.reward)
    device, bf16 = pick_device(config.device)
    torch.manual_seed(config.seed)
    policy, tokenizer = load_model(config.model, device) if config.model else make_tiny_model(config.seed, device)
    problems, worked, held_out = gather_problems(config)
    for rows in (problems, *held_out.values()):
        check_room(policy, tokenizer, rows, config.request, config.max_new_tokens)

    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    (out / "run.json").write_text(json.dumps({
        "command": ["train.py", *argv], "config": settings, "seed": config.seed, "versions": VERSIONS,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}, indent=1))
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters on {device}; the run goes to {out}")
    print(" ".join(f"{name}={value!r}" for name, value in settings.items()), flush=True)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    if config.activation_checkpointing:   # until transformers 5.22 it has the second name
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    summary = {"before": {}, "after": {}, "seed": config.seed, "config": settings}
    try:
        if config.sft_steps:
            warm_up(policy, tokenizer, worked, config, autocast)
            save(policy, tokenizer, out / "sft")
        train(config, policy, tokenizer, problems, held_out, out, autocast, bf16, summary)
    except (KeyboardInterrupt, InputError):
        print(f"\nstopped; {out} gets the model as it is now and the last evaluation", file=sys.stderr)
        raise
    finally:
        save(policy, tokenizer, out)
        summary["seconds"] = time.time() - started
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
    for split in summary["before"]:
        for name in ("sampled", "greedy", f"maj@{config.eval_samples}", f"pass@{config.eval_samples}"):
            cells = ["{:.3f} ({:.3f} - {:.3f})".format(scores[name], *scores[f"{name}_interval"])
                     for scores in (summary["before"][split], summary["after"][split])]
            print(f"{split:<4}{name:<8} {cells[0]} -> {cells[1]}")
    print(f"saved after {summary['seconds']:.0f} s; to evaluate it, give eval.py --model {out}")


if __name__ == "__main__":
    run_cli(main)
