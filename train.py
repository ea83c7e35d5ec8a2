"""Train a language model on math problems with GRPO: Algorithm 1 of DeepSeekMath.

    python train.py                                       a tiny model, on sums; a CPU will do
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct    a real model on GSM8K, on one GPU
    python train.py --resume runs/gsm8k-0                 continues a run that was stopped

Order: 1. one step, 2. Algorithm 1; `Batch`, `micro_batches` and `token_logprobs` are in grpo.py,
sections 3 and 5. The rest may be skipped at first: 3. the supervised warm-up,
4. process supervision, 5. options, 6. the built-in model and the problems, 7. the log,
8. checkpoints and signals, 9. the run.
"""

import bisect
import contextlib
import copy
import dataclasses
import fcntl
import itertools
import json
import os
import random
import signal
import sys
import time
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Literal

import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from eval import (
    ROWS_AT_ONCE,
    Problem,
    build_prompt,
    check_bounds,
    drop_long_problems,
    evaluate,
    load_model,
    load_problems,
    opt,
    pad_rows,
    parse_options,
    pick_device,
    read_run,
    run_cli,
    sample_problems,
    save_model,
    versions,
    write_whole,
)
from grpo import (
    Batch,
    bf16_weights,
    grpo_loss,
    micro_batches,
    outcome_advantages,
    process_advantages,
    token_logprobs,
    token_weights,
)
from reward import (
    InputError,
    LearnedReward,
    accuracy_rewards,
    ask_reward,
    load_reward,
    step_rewards,
)

# --- 1. One step: sample, reward, compare, update -----------------------------------------------


def sample_batch(author, tokenizer, problems, reward, config):
    """Sample, reward and compare: lines 7 to 9 of Algorithm 1, for B problems.

    author: the model that writes the completions. reward: a function from prompts, completions and
    answer (lists of N texts) to N numbers, which are compared in float64. Returns
    (batch, texts, stats): a `Batch` of N = B * G completions, their texts, and these numbers for
    the log: reward, length, truncated (means over completions); zero_var (the share of groups whose
    advantages are all 0); tok_s (sampled tokens per second); t_sample, t_reward (in seconds); with
    a learned reward, also `right` (the mean of the rule's rewards) and `agree` (how often the
    rounded reward equals the rule's). logp_ref is 0 until `add_reference` fills it in.
    mask_truncated changes the weights only: truncated completions still count in the group's mean.
    """
    G = config.group_size
    moments = [time.perf_counter()]
    prompt_ids, prompt_mask, samples, texts = sample_problems(
        author,
        tokenizer,
        problems,
        G,
        config.max_new_tokens,
        config.temperature,
        config.rows_at_once,
    )
    moments.append(time.perf_counter())  # the texts exist, so the GPU is done

    # Question-major, as the rows are: the first question G times, then the second.
    questions = [problem.question for problem in problems for _ in range(G)]
    answers = [problem.answer for problem in problems for _ in range(G)]
    outcomes = ask_reward(reward, questions, texts, answers)  # N numbers
    rewards = torch.tensor(outcomes, dtype=torch.float64).view(-1, G)  # (B, G)

    if config.supervision == "process":  # section 4.1.3: the answer is the last step
        steps, ends = rewards_of_steps(tokenizer, samples, questions, texts, outcomes, reward)
        mask = samples.mask.cpu()
        advantages = process_advantages(steps, ends, mask, G, config.scale_rewards)  # (N, T)
    elif config.advantage == "indicator":  # RFT and Online RFT: the bare reward
        advantages = rewards.view(-1, 1)  # (N, 1), for all tokens of a completion
    else:
        advantages = outcome_advantages(rewards, config.scale_rewards).view(-1, 1)  # (N, 1)

    in_loss = samples.mask
    if config.mask_truncated:
        in_loss = in_loss & ~samples.truncated[:, None]
    batch = Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=samples.completion_ids,
        mask=samples.mask,
        question=torch.arange(len(texts), device=prompt_ids.device) // G,
        advantages=advantages.float().to(prompt_ids.device).expand(samples.mask.shape),
        weights=token_weights(in_loss, config.aggregate, config.max_new_tokens),
        logp_old=samples.logp,  # the sampler's; update overwrites them
        logp_ref=torch.zeros_like(samples.logp),
    )
    moments.append(time.perf_counter())
    t_sample, t_reward = numpy.diff(moments).tolist()
    lengths = samples.mask.sum(dim=1).float()
    stats = {
        "reward": rewards.mean().item(),
        "zero_var": (advantages == 0).view(len(problems), -1).all(dim=1).float().mean().item(),
        "length": lengths.mean().item(),
        "truncated": samples.truncated.float().mean().item(),
        "tok_s": lengths.sum().item() / t_sample,
        "t_sample": t_sample,
        "t_reward": t_reward,
    }
    if isinstance(reward, LearnedReward):  # compare with the rule
        right = torch.tensor(accuracy_rewards(questions, texts, answers)).view(-1, G)
        stats["right"] = right.mean().item()
        stats["agree"] = (right == rewards.round()).float().mean().item()
    return batch, texts, stats


@torch.no_grad()
def add_reference(batch, reference, config):
    """Fill in batch.logp_ref: how likely the reference finds the tokens that were sampled."""
    for rows in micro_batches(batch, config.micro_tokens):
        micro = batch.rows(rows)  # its first four: prompt_ids, prompt_mask, completion_ids, mask
        logp, _ = token_logprobs(reference, *micro[:4], config.temperature, micro.question)
        batch.logp_ref[rows, : logp.shape[1]] = logp  # (n, t)


def update(policy, optimizer, batch, config, lr, autocast):
    """Take mu optimizer steps on one batch: lines 10 and 11 of Algorithm 1.

    PAPER: the log-probs of the first update, computed before it moves the weights, replace the
    sampler's in batch.logp_old. They differ by rounding, most in bf16. With sample_from "reference"
    (RFT) there is no ratio, so every update replaces batch.logp_old.

    autocast: the context in which the policy computes (float32, or bf16). Returns these numbers for
    the log: loss, kl, clip_share and grad_norm, means over the updates; entropy, from the first
    update only. kl, clip_share and entropy are means over tokens, weighted as in the loss, with
    weights scaled to add up to 1. A token's gap is the absolute difference between the sampler's
    log-prob and that of the first update. Over the n gaps, gap is the mean, gap_max the
    maximum, and gap_999 is entry int(0.999 n) in sorted order.
    """
    stats = defaultdict(float)
    gaps = []
    # The weights sum to 1, or to 0 if no token counts; with "constant" to at most 1.
    total_weight = batch.weights.sum().item() or 1.0
    for epoch in range(config.mu):
        for rows in micro_batches(batch, config.micro_tokens):
            micro = batch.rows(rows)
            with autocast:  # logp and entropy: (n, t)
                logp, entropy = token_logprobs(
                    policy, *micro[:4], config.temperature, micro.question
                )
            logp_old = micro.logp_old
            if epoch == 0:
                gaps.append((logp.detach() - logp_old)[micro.mask].abs())
                stats["entropy"] += (micro.weights * entropy).sum().item() / total_weight
            if epoch == 0 or config.sample_from == "reference":
                logp_old = logp.detach()
                batch.logp_old[rows, : logp.shape[1]] = logp_old
            loss, diagnostics = grpo_loss(
                logp,
                logp_old,
                micro.logp_ref if config.kl_beta else None,
                micro.advantages,
                micro.weights,
                config.clip_low,
                config.clip_high,
                config.kl_beta,
            )
            loss.backward()  # gradients of micro-batches add up, as their losses do
            for name, value in diagnostics.items():  # the log shows means over the mu updates
                per_token = 1.0 if name == "loss" else total_weight
                stats[name] += value / per_token / config.mu
        norm = step_optimizer(optimizer, policy, lr, config.max_grad_norm)
        stats["grad_norm"] += norm / config.mu
    gap = torch.cat(gaps).sort().values
    stats["gap"] = gap.mean().item()
    stats["gap_999"] = gap[int(0.999 * len(gap))].item()  # at most one token in 1,000 exceeds it
    stats["gap_max"] = gap[-1].item()
    return stats


def step_optimizer(optimizer, model, lr, max_grad_norm):
    """Clip the gradient, move the weights, and forget the gradient. Returns its unclipped norm.

    Raises FloatingPointError, with the weights as they were, if the norm is inf or nan.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    if not numpy.isfinite(norm):
        raise FloatingPointError("the gradient is inf or nan: try a lower learning rate")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# --- 2. Algorithm 1 -----------------------------------------------------------------------------


def train(policy, tokenizer, problems, worked, held_out, reward, config, out, log, bf16=False):
    """Run Algorithm 1: iterations contain steps, and steps contain updates. Its lines:

     1  pi_theta <- pi_theta_init             6        pi_old <- pi_theta
     2  for each iteration                    7-9      sample, reward, compare
     3    pi_ref <- pi_theta                  10, 11   mu updates of pi_theta
     4    for each step                       12     retrain the reward model
     5      take a batch of questions

    worked: problems with worked solutions, for the warm-up. held_out: {name: problems}. log: a
    function that takes the row of each step, a dict. bf16: sample and compute in bf16, as on a
    GPU. Continues from the checkpoint in the folder `out`, if there is one. Raises SystemExit after
    Ctrl-C or SIGTERM, with the run saved.
    """
    autocast = torch.autocast(policy.device.type, torch.bfloat16, enabled=bf16)
    # AdamW needs float32 weights, sampling does not: with bf16, pi_old is a bf16 copy. In float32
    # the policy itself can serve as pi_old: nothing is sampled during an update, and the batch
    # stores logp_old.
    pi_old = bf16_weights(copy.deepcopy(policy)) if bf16 else policy
    needed = config.kl_beta or config.sample_from == "reference"
    reference = copy.deepcopy(pi_old) if needed else None
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    parts = {"policy": policy, "reference": reference, "optimizer": optimizer, "reward": reward}
    row = load_checkpoint(out, parts)
    started = time.time() - (row or {}).get("seconds", 0.0)
    if row is None:
        warm_up(policy, tokenizer, worked, config, out, autocast)  # line 1
        row = {"step": 0, "seconds": time.time() - started}
        save_checkpoint(out, parts, row)
    first = row["step"]
    total = config.iterations * config.steps
    deck = itertools.islice(shuffle(problems, config.seed), first * config.questions, None)

    with catch_signals() as signals:
        for step in range(first, total + 1):
            set_seed(zlib.crc32(f"{config.seed} {step}".encode()))  # same draws when resumed
            # Line 6. It comes first since evaluation and reference use these weights as well.
            pi_old.load_state_dict(policy.state_dict())
            if step in (0, total) or config.eval_every and step % config.eval_every == 0:
                row["eval"] = evaluate_all(pi_old, tokenizer, held_out, config)
            log(row)  # the row of the step before, or of the checkpoint
            if step == total:
                break
            if step % config.steps == 0:  # line 2
                if reference:
                    reference.load_state_dict(pi_old.state_dict())  # line 3
                if isinstance(reward, LearnedReward):  # line 12, and before the first iteration
                    renew_reward(reward, pi_old, tokenizer, problems, config)

            questions = list(itertools.islice(deck, config.questions))  # line 5
            author = reference if config.sample_from == "reference" else pi_old
            batch, texts, stats = sample_batch(author, tokenizer, questions, reward, config)
            moments = [time.perf_counter()]
            if config.kl_beta:
                add_reference(batch, reference, config)  # no autocast: a bf16 run has a bf16 copy
            moments.append(time.perf_counter())
            lr = learning_rate(step, total, config.lr, config.lr_warmup, config.lr_end)
            stats |= update(policy, optimizer, batch, config, lr, autocast)  # lines 10, 11
            moments.append(time.perf_counter())

            row = {"step": step + 1, "iteration": step // config.steps, **stats, "lr": lr}
            row["t_ref"], row["t_update"] = numpy.diff(moments).tolist()
            row["seconds"] = time.time() - started
            if config.show_every and (step + 1) % config.show_every == 0:
                show_transcript(questions[0], texts[0], batch.advantages[0, 0])
            due = step + 1 == total or config.save_every and (step + 1) % config.save_every == 0
            if due or signals:
                save_checkpoint(out, parts, row)
            if signals:
                sys.exit(128 + signals[0])


def shuffle(problems, seed):
    """Yield every problem once, then all once more in another order, and so on without end."""
    for epoch in itertools.count():
        yield from random.Random(f"{seed} {epoch}").sample(problems, len(problems))


def learning_rate(step, steps, peak, warmup, end):
    """Return the rate of step 0, 1, ...: up to `peak` in `warmup` steps, then down to end * peak.

    Both ramps are linear; the last step has end * peak, if steps > warmup + 1.
    """
    down = 1 - (1 - end) * max(0, step - warmup) / max(1, steps - 1 - warmup)
    return peak * min(down, (step + 1) / max(1, warmup))


def evaluate_all(model, tokenizer, held_out, config):
    """Evaluate on every held-out set, with the same random numbers each time: {name: scores}."""
    scores = {}
    for name, problems in held_out.items():
        scores[name], _, _ = evaluate(
            model,
            tokenizer,
            problems,
            config.max_new_tokens,
            config.eval_samples,
            config.temperature,
            config.seed,
            config.rows_at_once,
        )
    return scores


def renew_reward(reward, policy, tokenizer, problems, config):
    """Retrain the reward model on the samples of the previous iteration: line 12 of Algorithm 1.

    Before the first iteration the policy writes the samples, and the reward model starts from the
    policy's weights.
    """
    if not reward.replay:
        reward.body.load_state_dict(policy.base_model.state_dict())
        while len(reward.fresh) < reward.size:
            questions = random.sample(problems, min(len(problems), config.questions))
            sample_batch(policy, tokenizer, questions, reward, config)  # reward keeps the texts
    reward.renew()


# --- 3. The supervised warm-up ------------------------------------------------------------------


def warm_up(policy, tokenizer, worked, config, out, autocast):
    """Fine-tune on worked solutions (SFT) and save the model as out/sft.

    PAPER: here all tokens of a batch weigh the same; table 10 averages over each solution first.
    """
    if not config.sft_steps:
        return
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(config.seed)
    for step in (bar := tqdm(range(config.sft_steps), desc="supervised warm-up")):
        rows = rng.sample(worked, min(32, len(worked)))
        prompts = [build_prompt(tokenizer, problem) for problem in rows]
        solutions = []
        for problem in rows:
            ids = tokenizer(problem.solution, add_special_tokens=False).input_ids
            solutions.append([*ids, tokenizer.eos_token_id])
        prompt_ids, prompt_mask = pad_rows(prompts, "left", policy.device)
        ids, mask = pad_rows(solutions, "right", policy.device)
        weights = token_weights(mask, "token")
        at_once = max(1, config.micro_tokens // (prompt_ids.shape[1] + ids.shape[1]))
        total = 0.0
        for i in range(0, len(rows), at_once):
            part = slice(i, i + at_once)
            texts = (prompt_ids[part], prompt_mask[part], ids[part], mask[part])
            with autocast:
                logp, _ = token_logprobs(policy, *texts, 1.0)  # (n, t), at temperature 1
            loss = -(weights[part] * logp).sum()  # cross-entropy: the mean -log p of a token
            loss.backward()
            total += loss.item()
        lr = learning_rate(step, config.sft_steps, config.sft_lr, config.sft_steps // 10, 0.0)
        step_optimizer(optimizer, policy, lr, config.max_grad_norm)
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
    save_model(policy, tokenizer, out / "sft")


# --- 4. Process supervision ---------------------------------------------------------------------


def rewards_of_steps(tokenizer, samples, questions, texts, outcomes, reward):
    """Reward the steps of N completions: (rewards, ends), both (N, K), for `process_advantages`.

    PAPER: a model judges the steps; here the rule does, or a model that learns the rule. The final
    answer is the last step, and ends with the last token.
    """
    places = []  # for each text, where its steps end, in characters
    earned = []
    for text in texts:
        steps = step_rewards(text)
        places.append([end for end, _ in steps])
        earned.append([right for _, right in steps])
    if isinstance(reward, LearnedReward):
        earned = reward.judge(questions, texts, places)
    rewards = []
    ends = []
    for i in range(len(texts)):
        ids = samples.completion_ids[i][samples.mask[i]].tolist()
        rewards.append(torch.tensor([*earned[i], outcomes[i]], dtype=torch.float64))
        ends.append(torch.tensor([*step_ends(tokenizer, ids, places[i]), len(ids) - 1]))
    pad = partial(pad_sequence, batch_first=True, padding_value=-1)
    return pad(rewards), pad(ends)


def step_ends(tokenizer, ids, ends):
    """Return the token that contains each end. ends: character offsets in the decoded text."""
    stream = DecodeStream(skip_special_tokens=True)
    reached = 0
    lengths = []  # of the text up to and including each token
    for token in ids:  # a character split across tokens arrives with the last
        try:
            reached += len(stream.step(tokenizer.backend_tokenizer, token) or "")
        except Exception:  # a character left unfinished: the stream has lost its place
            stream = DecodeStream(skip_special_tokens=True)
        lengths.append(reached)
    return [min(bisect.bisect_left(lengths, end), len(ids) - 1) for end in ends]


# --- 5. Options ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    # What to train
    model: str = opt("", "folder or hub name; empty: a tiny model, made on the spot")
    problems: str = opt("gsm8k", "gsm8k, math, svamp, a JSON lines file, or arithmetic (built in)")
    reward: str = opt(
        "", "FILE.py:FUNCTION, or model: a network that learns the rule; empty: the rule"
    )
    request: str | None = opt(None, "text after each question; default: the usual one")
    out: str = opt("", "folder of the run; empty: the next free runs/<problems>-<seed>")
    resume: str = opt("", "run to continue; only micro-tokens and rows-at-once may change")
    save_every: int = opt(25, "steps between checkpoints; 0: one at the end, or when stopped")
    seed: int = opt(0, "the same seed on the same CPU gives the same numbers")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    threads: int = opt(0, "CPU threads (they affect the last bits of sums); 0: torch decides")
    precision: Literal["auto", "float32", "bf16"] = opt(
        "auto", "number format; auto: bf16 on a GPU that has it, else float32"
    )
    # Sampling
    questions: int = opt(32, "questions per step, B (paper: 16 or 1024, unclear)")
    group_size: int = opt(8, "completions per question, to compare with each other, G (paper: 64)")
    max_new_tokens: int = opt(512, "limit of a completion in tokens (paper: 1024)")
    temperature: float = opt(1.0, "of sampling and log-probs (paper: unknown)")
    rows_at_once: int = opt(ROWS_AT_ONCE, "completions sampled together; fewer save memory")
    # Algorithm
    iterations: int = opt(1, "rounds, each with a new reference and reward model (paper: 1, 2)")
    steps: int = opt(100, "steps per iteration, M")
    mu: int = opt(1, "updates on the same samples (paper: 1)")
    kl_beta: float = opt(0.04, "weight of the KL term (paper: 0.04); 0 needs no reference")
    clip_low: float = opt(0.2, "the ratio is clipped below 1 - this (paper: unknown)")
    clip_high: float = opt(0.2, "the ratio is clipped above 1 + this (DAPO: 0.28)")
    scale_rewards: Literal["std", "none"] = opt("std", "divide by the group's std (Dr. GRPO: none)")
    aggregate: Literal["sequence", "token", "constant"] = opt(
        "sequence", "the weight of a token (paper: sequence, DAPO: token, Dr. GRPO: constant)"
    )
    mask_truncated: bool = opt(False, "leave completions that hit the limit out of the loss")
    supervision: Literal["outcome", "process"] = opt("outcome", "process: reward steps, too")
    advantage: Literal["group", "indicator"] = opt("group", "indicator: the bare reward")
    sample_from: Literal["policy", "reference"] = opt("policy", "the model that samples")
    reward_lr: float = opt(2e-5, "learning rate of --reward model (paper: 2e-5)")
    reward_size: int = opt(2048, "new completions to fit the reward model to, per iteration")
    # Optimizer
    lr: float = opt(1e-6, "learning rate (paper: 1e-6)")
    lr_warmup: int = opt(5, "steps in which the learning rate rises")
    lr_end: float = opt(1.0, "share of the learning rate that is left at the end")
    max_grad_norm: float = opt(1.0, "longer gradients are scaled down to this norm")
    micro_tokens: int = opt(4096, "tokens, with padding, per pass; fewer save memory")
    # Supervised warm-up (SFT)
    sft_steps: int = opt(0, "steps on worked solutions before RL")
    sft_lr: float = opt(1e-5, "learning rate of SFT: rises for the first tenth, then falls to 0")
    # Evaluation and log
    eval_problems: str = opt("", "held-out sets, such as gsm8k,mgsm_zh; empty: those of --problems")
    eval_limit: int = opt(200, "use only this many problems of each held-out set")
    eval_samples: int = opt(8, "samples per problem, besides the greedy one")
    eval_every: int = opt(50, "steps between evaluations; 0: only before and after")
    show_every: int = opt(10, "steps between transcripts; 0: none")
    tensorboard: bool = opt(False, "write the log for TensorBoard as well, into the run's folder")

    def __post_init__(self):
        check_bounds(self, BOUNDS)
        if self.supervision == "process" and self.advantage == "indicator":
            raise InputError(
                "--advantage indicator has no step rewards: leave out --supervision process"
            )


BOUNDS = {"group_size": 2, "temperature": 0.01, "lr": 1e-12, "sft_lr": 1e-12, "reward_lr": 1e-12}
BOUNDS |= {"max_grad_norm": 1e-6, "questions": 1, "max_new_tokens": 1, "rows_at_once": 1}
BOUNDS |= {"iterations": 1, "mu": 1, "reward_size": 1, "micro_tokens": 1}
BOUNDS |= {"eval_limit": 1, "eval_samples": 1}
BUILTIN = {  # what differs without --model: small models want large learning rates
    "problems": "arithmetic",
    "questions": 16,
    "max_new_tokens": 40,
    "steps": 60,
    "lr": 2e-4,
    "lr_end": 0.1,
    "sft_steps": 1000,
    "sft_lr": 4e-3,
    "reward_lr": 1e-3,
    "eval_every": 20,
    "show_every": 20,
    "threads": 1,
}


def parse_config(argv):
    """Return the Config of a command line or of the run it resumes. Raises InputError."""
    builtin = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in BUILTIN.items())
    about = f"{__doc__.splitlines()[0]} Without --model: {builtin}"
    config = parse_options(Config, argv, about)
    if config.resume:
        saved = read_run(config.resume)
        if saved.keys() != vars(config).keys():
            raise InputError(f"--resume {config.resume}: no run.json from this version")
        saved |= {"out": config.resume, "resume": config.resume}
        run = parse_options(Config, [], about, saved)
        config = parse_options(Config, argv, about, saved)
        for name, value in vars(config).items():
            before = getattr(run, name)
            if value != before and name not in ("micro_tokens", "rows_at_once"):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value} contradicts the run's {before}: leave it out")
    elif not config.model:
        config = parse_options(Config, argv, about, **BUILTIN)
        if config.problems != "arithmetic":
            raise InputError(f"--problems {config.problems} needs a --model")
    return config


# --- 6. The built-in model and the problems -----------------------------------------------------


def make_tiny_model(seed, device):
    """Make (model, tokenizer): a random Llama of 210,000 parameters, and a vocabulary for sums."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "\\boxed{", "}", "\n"]
    words += ["+", "-", "=", *map(str, range(100))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = Regex(r"\\boxed\{|[0-9]{1,2}|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins tokens without spaces
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(device).eval(), tokenizer


def gather_problems(config, model, tokenizer):
    """Return problems to train on, those with solutions, and held-out ones: {name: problems}."""

    def load(name, split):
        found = load_problems(name, split, config.request)
        return drop_long_problems(model, tokenizer, found, config.max_new_tokens)

    problems = load(config.problems, "train")
    worked = problems
    if config.problems == "arithmetic":
        worked = load_problems("arithmetic", "sft", config.request) if config.sft_steps else []
    held_out = {}
    for name in config.eval_problems.split(",") if config.eval_problems else [config.problems]:
        if name == "arithmetic":
            prefix = "arithmetic " if config.eval_problems else ""
            held_out |= {prefix + split: load(name, split) for split in ("in", "out")}
        elif config.eval_problems or not Path(name).is_file():
            held_out[name if config.eval_problems else "in"] = load(name, "test")
    if not held_out:  # a user's file: a tenth is never trained on, the same tenth for every seed
        count = min(-(-len(problems) // 10), config.eval_limit)
        held_out = {"in": random.Random(0).sample(problems, count)}
        hidden = {problem.question for problem in held_out["in"]}
        problems = worked = [problem for problem in problems if problem.question not in hidden]
    worked = [problem for problem in worked if problem.solution]
    if not problems:
        raise InputError(f"{config.problems} is too small to hold any out: give --eval-problems")
    if config.sft_steps and not worked:
        raise InputError(f"--sft-steps needs worked solutions; {config.problems} has none")
    if config.questions > len(problems):
        raise InputError(f"--questions {config.questions} exceeds the {len(problems)} problems")
    if config.sft_steps:
        worked = drop_long_problems(model, tokenizer, worked)
    return problems, worked, {name: rows[: config.eval_limit] for name, rows in held_out.items()}


# --- 7. The log ---------------------------------------------------------------------------------

COLUMNS = {
    "step": "d",
    "reward": ".3f",
    "right": ".3f",
    "agree": ".3f",
    "zero_var": ".2f",
    "length": ".1f",
    "truncated": ".2f",
    "loss": "z.4f",  # z: no -0.0000
    "kl": ".4f",
    "clip_share": ".3f",
    "entropy": ".3f",
    "gap": ".0e",
    "grad_norm": ".3f",
    "lr": ".1e",
    "tok_s": ".0f",
    "t_sample": ".2f",
    "t_reward": ".2f",
    "t_ref": ".2f",
    "t_update": ".2f",
    "mem_gb": ".2f",
}


def write_log(row, out, writer=None):
    """Print the row of a step, and append it to out/metrics.jsonl and, if asked, TensorBoard."""
    row["mem_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if row["step"]:
        print_columns(row)
    for name, scores in row.get("eval", {}).items():
        accuracy = f"greedy {scores['greedy']:.3f}, sampled {scores['sampled']:.3f}"
        print(f"held out, {name} ({scores['n']}): {accuracy}", flush=True)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if writer:
        curves = dict(row)
        for name, scores in curves.pop("eval", {}).items():
            curves |= {f"{name}/{key}": value for key, value in scores.items()}
        for name, value in curves.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()


def print_columns(row):
    """Print one line of numbers, with a header now and then."""
    widths = {name: max(7, len(name)) for name in COLUMNS if name in row}
    if row["step"] % 20 == 1:
        print(*(f"{name:>{width}}" for name, width in widths.items()))
    cells = {name: format(row[name], COLUMNS[name]) for name in widths}
    print(*(f"{cells[name]:>{width}}" for name, width in widths.items()), flush=True)
    if row["truncated"] > 0.5:
        print(f"{row['truncated']:.0%} of the completions hit the limit: raise --max-new-tokens?")


def show_transcript(problem, text, advantage):
    """Print a whole completion: reading samples is the first debugging tool."""
    print(f"--- {problem.question}   (gold: {problem.answer})\n{text}\n--- A = {advantage:+.2f}")


# --- 8. Checkpoints and signals -----------------------------------------------------------------


def save_checkpoint(out, parts, row):
    """Write out/checkpoint.pt, whole or not at all: the state of all parts, and the last row."""
    states = {
        name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")
    }
    saved = {"row": row, "states": states}
    write_whole(out / "checkpoint.pt", lambda part: torch.save(saved, part))


def load_checkpoint(out, parts):
    """Load out/checkpoint.pt into the parts; cut the log back to match. Returns its row, or None.

    Raises InputError if it is damaged, or belongs to another model.
    """
    path = out / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, state in saved["states"].items():
            parts[name].load_state_dict(state)
    except Exception as error:  # a broken file, or another model, may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged, or not of this model ({reason})") from error
    log = out / "metrics.jsonl"
    size = 0
    for line in log.read_bytes().splitlines(keepends=True) if log.exists() else []:
        with contextlib.suppress(ValueError):  # the last line is incomplete after a kill
            if json.loads(line)["step"] < saved["row"]["step"]:  # that row is logged again
                size += len(line)
    if log.exists():
        os.truncate(log, size)  # in one call: a kill must not lose the log
    return saved["row"]


@contextlib.contextmanager
def catch_signals():
    """Collect Ctrl-C and SIGTERM in a list, so a step can finish; a repeat exits at once."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; again to quit now, without saving\n")
        for stream in (1, 2):  # stop printing: Ctrl-C may have ended the `tee log` that reads this
            os.dup2(nowhere, stream)

    nowhere = os.open(os.devnull, os.O_WRONLY)
    stderr = os.dup(2)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        os.dup2(stderr, 2)  # for the hint on how to resume
        os.close(stderr)
        os.close(nowhere)
        for number, handler in before.items():
            signal.signal(number, handler)


# --- 9. The run ---------------------------------------------------------------------------------


def main(argv):
    config = parse_config(argv)
    out = choose_folder(config)
    if config.resume:
        lock = lock_run(out)
        if (out / "summary.json").exists():
            print(f"{out} has finished: there is nothing to resume")
            return
    learned = config.reward == "model"
    reward = None if learned else load_reward(config.reward)  # to fail early
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    device, bf16 = pick_device(config.device, config.threads, config.precision)
    if config.model:
        policy, tokenizer = load_model(config.model, device)
    else:
        policy, tokenizer = make_tiny_model(config.seed, device)
    problems, worked, held_out = gather_problems(config, policy, tokenizer)
    if learned:
        steps = config.supervision == "process"
        set_seed(config.seed)  # its head is random
        settings = (config.reward_lr, config.reward_size, steps, bf16)
        reward = LearnedReward(policy, tokenizer, *settings)
    conditions = versions() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        # A chat template may add today's date.
        "prompt": tokenizer.decode(build_prompt(tokenizer, Problem("1+1", ""))),
    }
    if config.resume:
        for name, before in read_run(out, "conditions").items():
            if before != conditions.get(name):
                now = f"{name} is {conditions.get(name)!r} now, and was {before!r}"
                print(f"resuming, but not bit for bit: {now}")
    else:  # the input has been checked by now
        out.mkdir(parents=True, exist_ok=True)
        run = {"command": ["train.py", *argv], "config": vars(config), "conditions": conditions}
        lock = lock_run(out, json.dumps(run, indent=1))
    print(f"{policy.num_parameters():,} parameters on {device}; the run goes to {out}")
    print("a loss near 0 is not a bug: see grpo_loss", flush=True)
    log = partial(write_log, out=out, writer=SummaryWriter(out) if config.tensorboard else None)
    try:
        train(policy, tokenizer, problems, worked, held_out, reward, config, out, log, bf16)
        save_model(policy, tokenizer, out)
        summarise(config, out)
    except BaseException as error:
        diverged = isinstance(error, FloatingPointError)  # it would do so again
        if (out / "checkpoint.pt").exists() and not diverged:
            with contextlib.suppress(OSError):
                os.write(2, f"\nto resume: python train.py --resume {out}\n".encode())
        raise
    finally:
        lock.close()


def lock_run(out, run=""):
    """Open run.json, and keep other processes out of the folder until it is closed.

    run: the text of a new run.json. Raises InputError if another process has the folder.
    """
    create = os.O_CREAT | os.O_EXCL if run else 0
    try:
        file = os.fdopen(os.open(out / "run.json", os.O_RDWR | create, 0o666), "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError) as error:
        raise InputError(f"{out} belongs to another process, which is still running") from error
    file.write(run)
    file.flush()
    return file


def choose_folder(config):
    """Return the folder of the run: the one that is named, or the next free one."""
    if config.resume:
        return Path(config.resume)
    if config.out:
        out = Path(config.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} is a file or not empty: name another folder")
        return out
    name = f"runs/{Path(config.problems).stem}-{config.seed}"
    out = Path(name)
    number = 1
    while out.exists():
        number += 1
        out = Path(f"{name}-{number}")
    return out


def summarise(config, out):
    """Write out/summary.json; print accuracy before -> after, and what to run next."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before = rows[0]["eval"]
    after = rows[-1]["eval"]
    seconds = rows[-1]["seconds"]
    summary = {"before": before, "after": after, "seconds": seconds, "seed": config.seed}
    text = json.dumps(summary | {"config": vars(config)})
    write_whole(out / "summary.json", lambda part: part.write_text(text))
    k = config.eval_samples
    for name, measure in itertools.product(before, ("sampled", "greedy", f"maj@{k}", f"pass@{k}")):
        line = f"{name:<3} {measure:<8}"
        for arrow, scores in (("", before[name]), ("->", after[name])):
            low, high = scores[f"{measure}_interval"]
            line += f" {arrow} {scores[measure]:.3f} ({low:.3f} - {high:.3f})"
        print(line)
    print(f"{seconds:.0f} s. The model is in {out}; to evaluate it, or to ask it something:")
    print(f"  python eval.py --model {out}\n  python eval.py --model {out} --ask 7+5-4")


if __name__ == "__main__":
    run_cli(main)
