"""Train a language model on math problems with GRPO: Algorithm 1 of DeepSeekMath.

    python train.py                                        a tiny model on built-in problems; a CPU will do
    python train.py --model Qwen/Qwen2.5-0.5B-Instruct     a real model on GSM8K, on one GPU
    python train.py --resume runs/gsm8k-0                  a run that was stopped or killed goes on
"""

import collections, contextlib, copy, dataclasses, itertools, json, os, random, shutil, signal, sys, time, zlib
from pathlib import Path
from types import SimpleNamespace

import numpy, safetensors.torch, torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from eval import (SAMPLE_TOKENS, VERSIONS, Parser, build_prompt, evaluate, fitting, is_arithmetic, load_model,
                  load_problems, pad, pick_device, run_cli, sample_problems, save_model)
from grpo import (bf16_weights, grpo_loss, loss_denominator, micro_batches, outcome_advantages, process_advantages,
                  score_rows)
from reward import InputError, RewardModel, fit, load_reward, score, score_texts, step_rewards
# --- 1. Options: one dataclass, and one dict of what differs without a --model -----------------------
def opt(default, help, least=None, above=None, choices="", group=None):
    """A field of Config: its default, a line of help, its bounds; `group` starts a new group in --help."""
    return dataclasses.field(default=default, metadata=locals())

@dataclasses.dataclass
class Config:
    model: str = opt("", "folder or hub name; none: a tiny model made on the spot", group="what to train")
    size: int = opt(1, "N: the model made without --model is 64 N wide, N + 2 layers deep", choices="1 2 3 4 5 6 7 8")
    problems: str = opt("gsm8k", "gsm8k, math, a JSON-lines file, arithmetic, or harder arithmetic-LONGEST-LARGEST")
    reward: str = opt("", "FILE.py:FUNCTION; none: accuracy_rewards of reward.py; model: a network that imitates it")
    request: str = opt(None, "what follows each question (\"\": nothing); none: as usual for the problems")
    out: str = opt("", "folder of the run; none: the next free runs/<problems>-<seed>")
    resume: str = opt("", "run to go on with; only sample-tokens, micro-tokens, activation-checkpointing may change")
    save_every: int = opt(25, "steps between checkpoints, of which two are kept; 0: only if stopped", least=0)
    seed: int = opt(0, "the same seed on the same CPU gives the same numbers", least=0)
    device: str = opt("auto", "auto, cpu or cuda")
    questions: int = opt(32, "questions per step, B (paper: 16 or 1024, not clear)", least=1, group="sampling")
    group_size: int = opt(8, "completions per question, to compare with each other, G (paper: 64)", least=2)
    max_new_tokens: int = opt(512, "limit of a completion in tokens (paper: 1024; harder sums: 6 LONGEST)", least=1)
    sample_tokens: int = opt(SAMPLE_TOKENS, "tokens, prompts too, that are sampled at a time (KV cache)", least=1)
    temperature: float = opt(1.0, "of sampling and log-probs, above 0 (paper: not said)", above=0)
    iterations: int = opt(1, "renewals of reference and reward model (paper: 1, 2)", least=1, group="algorithm")
    steps: int = opt(100, "steps per iteration, M", least=0)
    mu: int = opt(1, "updates on the same samples (paper: 1)", least=1)
    kl_beta: float = opt(0.04, "weight of the KL term (paper: 0.04); 0 needs no reference", least=0)
    clip_low: float = opt(0.2, "the ratio is clipped below 1 - this (paper: not said)", least=0)
    clip_high: float = opt(0.2, "the ratio is clipped above 1 + this (paper: not said; DAPO: 0.28)", least=0)
    scale_rewards: str = opt("std", "by the group's std; Dr. GRPO: none", choices="std none")
    aggregate: str = opt("sequence", "paper: sequence, DAPO: token, else Dr. GRPO", choices="sequence token constant")
    mask_truncated: bool = opt(False, "leave completions that hit the limit out of the loss")
    supervision: str = opt("outcome", "process: of steps, too (paper: both)", choices="outcome process")
    advantage: str = opt("group", "indicator: the bare reward, for Online RFT", choices="group indicator")
    sample_from: str = opt("policy", "reference: it writes the completions, as in RFT", choices="policy reference")
    reward_lr: float = opt(2e-5, "learning rate of --reward model (paper: 2e-5)", above=0)
    reward_size: int = opt(2048, "new completions that it is fitted to before each iteration", least=1)
    lr: float = opt(1e-6, "learning rate (paper: 1e-6)", above=0, group="optimizer")
    lr_warmup: int = opt(5, "steps in which the learning rate rises", least=0)
    lr_end: float = opt(1.0, "share of the learning rate that is left at the end; it falls linearly", least=0)
    max_grad_norm: float = opt(1.0, "longer gradients are scaled down to this norm", above=0)
    micro_tokens: int = opt(16384, "tokens, with padding, per pass of policy and reference", least=1)
    activation_checkpointing: bool = opt(False, "less memory, slower update")
    sft_steps: int = opt(0, "steps on worked solutions before RL", least=0, group="supervised warm-up (SFT)")
    sft_lr: float = opt(1e-5, "peak of the learning rate, which rises for 20 steps and falls to 0", above=0)
    eval_problems: str = opt("", "held-out sets, gsm8k,mgsm_zh say; none: of --problems", group="evaluation and log")
    eval_limit: int = opt(200, "use only this many problems of each held-out set", least=1)
    eval_samples: int = opt(8, "samples per problem, beside the greedy one", least=1)
    eval_every: int = opt(50, "steps between evaluations; 0: only before and after", least=0)
    show_every: int = opt(10, "steps between transcripts; 0: none", least=0)
    tensorboard: bool = opt(False, "write the log for TensorBoard as well, into the run's folder")

BUILTIN = dict(problems="arithmetic", questions=16, max_new_tokens=40, steps=60, lr=3e-4, lr_end=0.1, sft_steps=1000,
               sft_lr=4e-3, reward_lr=1e-3, eval_every=20, show_every=20)   # small models want large learning rates

def parse_config(argv):
    """Config of a command line: what is given, else that of the resumed run, BUILTIN, the default. Or InputError."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        meta, flag = field.metadata, "--" + field.name.replace("_", "-")
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        text = f"{meta['help']} [{'none' if field.default in ('', None) else field.default}"
        text += f"; built-in: {BUILTIN[field.name]}]" if field.name in BUILTIN else "]"
        choices = [field.type(choice) for choice in meta["choices"].split()] or None
        how = dict(type=field.type, choices=choices, metavar=None if choices else "X")
        group.add_argument(flag, help=text, default=None, **dict(action="store_true") if field.type is bool else how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    defaults, run = ({} if given.get("model") else BUILTIN), given.get("resume")
    if run is not None:
        try:
            defaults = dataclasses.asdict(Config(**json.loads(Path(run, "run.json").read_text())["config"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--resume {run}: no run to go on with, for it has no run.json of ours ({error})")
        fixed = given.keys() - {"resume", "sample_tokens", "micro_tokens", "activation_checkpointing"}
        for name in [name for name in sorted(fixed) if given[name] != defaults[name]]:
            raise InputError(f"--{name.replace('_', '-')} {given[name]} contradicts the run's {defaults[name]}: "
                             "leave it out, or start another run")
        given["out"] = run
    elif given.get("model") and "size" in given:
        raise InputError("--size is that of the model made without --model: leave out one of them")
    elif not given.get("model"):
        if not (match := is_arithmetic(given.get("problems", "arithmetic"))):
            raise InputError(f"--problems {given['problems']} needs a --model; without one: arithmetic, or "
                             "arithmetic-LONGEST-LARGEST, of 6 to 29 terms and totals of 12 to 99")
        defaults = BUILTIN | {"max_new_tokens": max(40, 6 * int(match[2] or 6))}   # a line of a solution has 6 tokens
    config = Config(**{**defaults, **given})
    if (config.supervision, config.advantage) == ("process", "indicator"):
        raise InputError("--advantage indicator knows no steps: leave it out, or --supervision process")
    for field in dataclasses.fields(Config):
        flag, value, meta = "--" + field.name.replace("_", "-"), getattr(config, field.name), field.metadata
        bound, low = ("at least", meta["least"]) if meta["above"] is None else ("above", meta["above"])
        if low is not None and (not low <= value < 2 ** 63 or value == meta["above"]):
            raise InputError(f"{flag} must be finite and {bound} {low}, not {value} ({meta['help']})")
    return config
# --- 2. The model and the problems ------------------------------------------------------------------
def make_tiny_model(config, device):
    """(model, tokenizer): a Llama that knows numbers, signs and \\boxed{}; size 1: 210,000 random parameters."""
    words = [*"<pad> <end> <unk> <user> <assistant> \\boxed{ }".split(), "\n", *"+-=", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[0-9]{1,2}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()   # joins tokens without spaces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                        unk_token="<unk>", additional_special_tokens=["<user>", "<assistant>"])
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=64 * config.size, intermediate_size=256 * config.size, bos_token_id=None,
        num_hidden_layers=config.size + 2, num_attention_heads=max(4, config.size), max_position_embeddings=1024,
        initializer_range=0.08 / config.size ** 0.5, eos_token_id=1, pad_token_id=0)).to(device), tokenizer

def gather_problems(config, model, tokenizer):
    """(training problems, those with solutions for the warm-up, held-out ones: a dict of "in", "out" or names)."""
    load = lambda name, s: fitting(model, tokenizer, load_problems(name, s, config.request), config.max_new_tokens)
    problems = load(config.problems, "train")
    worked = load_problems(config.problems, "sft", config.request) if is_arithmetic(config.problems) else problems
    held_out = {}
    for name in config.eval_problems.split(",") if config.eval_problems else [config.problems]:
        if is_arithmetic(name):
            held_out |= {f"{name} {s}" if config.eval_problems else s: load(name, s) for s in ("in", "out")}
        elif config.eval_problems or not Path(name).is_file():
            held_out[name if config.eval_problems else "in"] = load(name, "test")
    if not held_out:   # a user's own file: a tenth of it is never trained on, the same tenth for every seed
        held_out = {"in": random.Random(0).sample(problems, min(-(-len(problems) // 10), config.eval_limit))}
        questions = {problem.question for problem in held_out["in"]}
        problems = worked = [problem for problem in problems if problem.question not in questions]
    worked = [problem for problem in worked if problem.solution]
    if not problems:
        raise InputError(f"{config.problems} is too small to hold some out: add some, or give --eval-problems")
    if config.sft_steps and not worked:
        raise InputError(f"--sft-steps needs worked solutions; {config.problems} has none, so leave it out")
    return problems, worked, {split: rows[:config.eval_limit] for split, rows in held_out.items()}
# --- 3. One step of GRPO, and of the supervised warm-up ---------------------------------------------
def learning_rate(step, steps, peak, warmup, end):
    """That of step 0, 1, ...: up linearly to `peak` in `warmup` steps, then down linearly to `end * peak`."""
    down = 1 - (1 - end) * max(0, step - warmup) / max(1, steps - 1 - warmup)
    return peak * min(down, (step + 1) / max(1, warmup))

def demand_finite(run, values, rows):
    """Raises FloatingPointError, and saves the texts, if values, (n, t), of these rows of run.rows are not finite."""
    bad = [run.rows[row] for row, finite in zip(rows, values.isfinite().all(dim=-1).tolist()) if not finite]
    if bad:
        (run.out / "not-finite.json").write_text(json.dumps({"phase": run.phase, "completions": bad}, indent=1))
        raise FloatingPointError(f"inf or nan in the {run.phase}, first with question {bad[0][0]!r}; see "
                                 f"{run.out / 'not-finite.json'}; a lower --lr or --reward-lr may do better")

# prompt_ids, prompt_mask (B, P); the four of `Samples`, of N = B * G rows; rewards (B, G), of the final answers;
# advantages (N, T); N texts; N examples, labelled by the rule; t_reward in seconds. The first four go to score_rows.
Batch = collections.namedtuple("Batch", "prompt_ids prompt_mask completion_ids mask logp_sampler truncated rewards "
                                        "advantages texts examples t_reward")

def step_ends(tokenizer, ids, text, ends):
    """For each end, in characters, the first place in ids up to which the decoded tokens hold text[:end]."""
    parts = [tokenizer.decode(ids[:n + 1], skip_special_tokens=True) for n in range(len(ids) if ends else 0)]
    return [next(n for n, part in enumerate(parts) if part[:end] == text[:end]) for end in ends]

def sample_and_score(run, problems, config):
    """G completions for each of B problems, their rewards and their advantages. Returns a `Batch`."""
    G, sampler = config.group_size, (run.reference if config.sample_from == "reference" else run.sampler)
    prompt_ids, prompt_mask, samples, texts = sample_problems(
        sampler, run.tokenizer, problems, G, config.max_new_tokens, config.temperature, config.sample_tokens)
    start = time.perf_counter()   # the texts are there, so a GPU has finished
    rows = [problem for problem in problems for _ in range(G)]   # question-major, as the texts are
    outcomes, examples, ends = score_texts(load_reward(config.reward), rows, texts), [], []
    for i, text in enumerate(texts):
        prompt = prompt_ids[i // G][prompt_mask[i // G]].tolist()
        ids = samples.completion_ids[i][samples.mask[i]].tolist()
        steps = step_rewards(text) if config.supervision == "process" else []
        # PAPER: a model judges steps; here the rule does, or labels examples for one. The answer is the last step.
        ends.append([*step_ends(run.tokenizer, ids, text, [end for end, _ in steps]), len(ids) - 1])
        examples.append((prompt + ids, [len(prompt) + end for end in ends[i]], [r for _, r in steps] + [outcomes[i]]))
    rewards = score(run.reward_model, examples) if config.reward == "model" else [labels for _, _, labels in examples]
    outcome = torch.tensor([row[-1] for row in rewards]).view(-1, G)                                  # (B, G)
    if config.supervision == "process":
        rewards, ends = (torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, x)], True, -1) for x in (rewards, ends))
        advantages = process_advantages(rewards, ends, samples.mask.cpu(), G, config.scale_rewards)
    else:
        advantages = outcome if config.advantage == "indicator" else outcome_advantages(outcome, config.scale_rewards)
        advantages = advantages.view(-1, 1).expand(samples.mask.shape)                                # (N, T)
    return Batch(prompt_ids, prompt_mask, *samples, outcome, advantages.to(prompt_ids.device), texts, examples,
                 time.perf_counter() - start)

def renew_reward_model(run, problems, config):
    """Fit the reward model to the newest completions of an iteration, and a ninth as many old ones (10% "replay")."""
    run.phase = "fit of the reward model"
    if not run.replay:   # before step 1: it starts with the policy's weights, and the policy writes its examples
        run.reward_model.load_state_dict(RewardModel(run.policy).state_dict())
        rule, n = dataclasses.replace(config, reward="", sample_from="policy"), min(len(problems), config.questions)
        while len(run.fresh) < config.reward_size:
            run.fresh += sample_and_score(run, random.sample(problems, n), rule).examples
    new = run.fresh[-config.reward_size:]
    old = random.sample(run.replay, min(len(run.replay), len(new) // 9))
    print(f"the reward model is fitted to {len(new)} new and {len(old)} old completions", flush=True)
    fit(run.reward_model, new + old, config.reward_lr, size=max(1, min(8, config.micro_tokens // 2048)))
    run.replay, run.fresh = run.replay + new, []

def update(run, batch, cuts, logp_ref, config, lr, autocast):
    """mu optimizer steps on one batch, cut into micro-batches, `cuts`; logp_ref: the reference's of each, or None.
    Returns gap (mean, 99.9%, maximum of |logp - the sampler's|), entropy of pass 0; kl, clip_share of tokens in_loss.
    """
    in_loss = batch.mask & ~batch.truncated[:, None] if config.mask_truncated else batch.mask   # (N, T)
    denominator = loss_denominator(in_loss, config.aggregate, config.max_new_tokens)
    tokens, tokens_in_loss = batch.mask[sum(cuts, [])].sum().item(), max(1, in_loss.sum().item())
    means = dict.fromkeys(("loss", "kl", "clip_share", "entropy", "grad_norm"), 0.0)
    logp_old, gaps = [None] * len(cuts), []
    run.policy.train()   # activation checkpointing works only in train(); load_model has set every dropout to 0
    for pass_number in range(config.mu):
        for i, rows in enumerate(tqdm(cuts, desc="update", delay=5, leave=False)):
            with autocast():
                logp, entropy, mask = score_rows(run.policy, rows, *batch[:4], config.temperature)   # (n, t)
            demand_finite(run, logp, rows)
            if pass_number == 0 or config.sample_from == "reference":   # RFT: no ratio; the gap means nothing there
                # PAPER: pi_old is what the trainer computes for the sampled tokens while the weights are those that
                # sampled them, not what the sampler said. The two differ by rounding, in bf16 visibly: the gap.
                logp_old[i] = logp.detach()
            if pass_number == 0:
                gaps.append((logp_old[i] - batch.logp_sampler[rows, :mask.shape[1]])[mask].abs())
                means["entropy"] += entropy.sum().item() / tokens
            loss_mask = in_loss[rows, :mask.shape[1]]
            loss, diagnostics = grpo_loss(
                logp, logp_old[i], logp_ref[i], batch.advantages[rows, :mask.shape[1]], loss_mask, config.clip_low,
                config.clip_high, config.kl_beta, config.aggregate, config.max_new_tokens, denominator)
            loss.backward()
            means["loss"] += loss.item() / config.mu
            for name, value in diagnostics.items():
                means[name] += value.item() * loss_mask.sum().item() / tokens_in_loss / config.mu
        norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), config.max_grad_norm)
        demand_finite(run, norm.expand(len(run.rows), 1), range(len(run.rows)))   # nobody knows which row
        run.optimizer.param_groups[0]["lr"] = lr
        run.optimizer.step()
        run.optimizer.zero_grad()
        means["grad_norm"] += norm.item() / config.mu
    run.policy.eval()
    gap = torch.cat(gaps).sort().values
    return means | {"gap": gap.mean().item(), "gap_999": gap[int(0.999 * len(gap))].item(), "gap_max": gap[-1].item()}

def warm_up(run, problems, config, autocast):
    """Supervised fine-tuning on worked solutions: the same update, with a gradient coefficient of 1 (table 10)."""
    config = dataclasses.replace(config, mu=1, kl_beta=0.0, aggregate="token", mask_truncated=False, temperature=1.0)
    rng, tokenizer, device, optimizer = random.Random(config.seed), run.tokenizer, run.policy.device, run.optimizer
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in (bar := tqdm(range(config.sft_steps), desc="supervised warm-up")):
        rows = rng.sample(problems, min(32, len(problems)))
        run.phase, run.rows = f"step {step + 1} of the warm-up", [(p.question, p.solution) for p in rows]
        prompts = pad(tokenizer, [build_prompt(tokenizer, p) for p in rows], "left", device)
        solutions = tokenizer([p.solution for p in rows], add_special_tokens=False).input_ids
        completion_ids, mask = pad(tokenizer, [ids + [tokenizer.eos_token_id] for ids in solutions], "right", device)
        zeros = torch.zeros(mask.shape, device=device)   # for the sampler's log-probs: so the gap is the mean -logp
        batch = Batch(*prompts, completion_ids, mask, zeros, None, None, zeros + 1, None, None, 0.0)
        cuts = micro_batches(range(len(mask)), batch.prompt_mask, mask, config.micro_tokens)
        lr = learning_rate(step, config.sft_steps, config.sft_lr, 20, 0.0)
        loss = update(run, batch, cuts, [None] * len(cuts), config, lr, autocast)["gap"]
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    run.optimizer = optimizer
# --- 4. The log -------------------------------------------------------------------------------------
COLUMNS = dict(step="d", reward=".3f", right=".3f", agree=".3f", zero_var=".2f", length=".1f", truncated=".2f",
               loss=".4f", kl=".4f", clip_share=".3f", entropy=".3f", gap=".0e", grad_norm=".3f", lr=".1e",
               tok_s=".0f", t_sample=".2f", t_reward=".2f", t_ref=".2f", t_update=".2f", mem_gb=".2f")

def print_metrics(metrics, heading):
    """One line of columns (README, "Read the log"), with or without a heading; a warning if most hit the limit."""
    names = [name for name in COLUMNS if name in metrics]
    cells = [format(metrics[name], COLUMNS[name]) for name in names]
    for line in [names, cells] if heading else [cells]:
        print(*(f"{cell:>{max(7, len(name))}}" for name, cell in zip(names, line)), flush=True)
    if metrics["truncated"] > 0.5:
        print(f"{metrics['truncated']:.0%} of the completions hit the limit: raise --max-new-tokens?")
# --- 5. Checkpoints and signals ---------------------------------------------------------------------
STOP = {"signal": 0, "at once": True}   # the signal that came; may it end the run at once, or only after the step?

def on_signal(number, frame):
    """Ctrl-C and SIGTERM end a run: at once, or after the step if weights and log do not fit together now."""
    signal.signal(number, signal.SIG_DFL)   # the second one ends the process
    STOP["signal"] = number
    sys.stdout = open(os.devnull, "w")   # its reader, tee say, may have been ended by the same Ctrl-C
    with contextlib.suppress(OSError):
        os.write(2, b"\nstopping; again: at once, without saving\n")   # print is not safe here
    if STOP["at once"]:
        sys.exit(128 + number)

def checkpoints(run):
    """The folders of its whole checkpoints, from the oldest to the newest."""
    return sorted((p for p in (run.out / "checkpoints").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))

def save_checkpoint(run):
    """Write out/checkpoints/<step>, whole or not at all, and keep the last two. Raises OSError."""
    folder, unfinished = (run.out / "checkpoints" / name for name in (str(run.step), "unfinished"))
    if folder.exists():
        return
    try:
        shutil.rmtree(unfinished, ignore_errors=True)   # left by a process that was killed in here
        unfinished.mkdir(parents=True)
        for name, model in run.models.items():
            safetensors.torch.save_model(model, unfinished / f"{name}.safetensors")
        torch.save(dict(optimizer=run.optimizer.state_dict(), step=run.step, scores=run.scores, fresh=run.fresh,
                        replay=run.replay, seconds=time.time() - run.started), unfinished / "state.pt")
        unfinished.rename(folder)
        for old in checkpoints(run)[:-2]:
            shutil.rmtree(old.rename(unfinished))   # so that a half-deleted one never looks whole
    except Exception as error:   # OSError, RuntimeError or SafetensorError, if the disk is full
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"the checkpoint of step {run.step} could not be written: {error}")

def load_checkpoint(run):
    """Put the newest whole checkpoint, if there is one yet, into a run, and cut its log back. Raises InputError."""
    for folder in checkpoints(run)[-1:]:
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for name, model in run.models.items():
                safetensors.torch.load_model(model, folder / f"{name}.safetensors")
        except Exception as error:   # a broken file may fail in any way, and so does a model that has changed
            raise InputError(f"{folder} is damaged, or not of this model: delete it to go on with the one before "
                             f"({' '.join(str(error).split())[:200]})")
        run.optimizer.load_state_dict(state.pop("optimizer"))
        run.sampler.load_state_dict(run.policy.state_dict())
        vars(run).update(state, started=run.started - state.pop("seconds"))
    log = run.out / "metrics.jsonl"   # a line for each step, from 0 on; those of later steps will be written again
    if log.exists():
        os.truncate(log, len(b"".join(log.read_bytes().splitlines(keepends=True)[:run.step + 1])))
# --- 6. Algorithm 1, and the run --------------------------------------------------------------------
def train(run, problems, held_out, config, autocast):
    """Iterations, and steps in them, as one loop, which a resumed run enters at its step. Writes metrics.jsonl."""
    sampler, total = run.sampler, config.iterations * config.steps
    restart = lambda part: set_seed(zlib.crc32(f"{config.seed} {part}".encode()))   # the same in a resumed run
    def finish_step(row):
        """End step row["step"] (0: the start): renew pi_old and, if due, the reward model; evaluate, log, save."""
        done = row["step"]
        sampler.load_state_dict(run.policy.state_dict())
        if config.reward == "model" and done < total and done % config.steps == 0:   # before each iteration
            restart(f"fit {done}")
            renew_reward_model(run, problems, config)
        if done in (0, total) or config.eval_every and done % config.eval_every == 0:
            run.phase = f"evaluation after step {done}"
            row["eval"] = {split: evaluate(
                sampler, run.tokenizer, rows, config.max_new_tokens, config.eval_samples, config.temperature,
                config.seed, config.sample_tokens)[0] for split, rows in held_out.items()}
            run.scores = {"before": row["eval"], **run.scores, "after": row["eval"]}   # "before" stays the first one
            for split, s in row["eval"].items():
                print(f"held out, {split} ({s['n']}): greedy {s['greedy']:.3f}, sampled {s['sampled']:.3f}")
        if run.writer:
            curves = row | {f"{split}/{k}": x for split, s in row.get("eval", {}).items() for k, x in s.items()}
            for name, value in [item for item in curves.items() if isinstance(item[1], float)]:
                run.writer.add_scalar(name, value, done)
            run.writer.flush()
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        run.step, STOP["at once"] = done, True
        if STOP["signal"]:
            sys.exit(128 + STOP["signal"])   # main saves
        if done == 0 or config.save_every and (done % config.save_every == 0 or done == total):
            save_checkpoint(run)
    if run.step < 0:
        finish_step({"step": 0})
    # Every problem once, then all once more in another order, and so on; without those of the steps that are done.
    deck = (problem for epoch in itertools.count()
            for problem in random.Random(f"{config.seed} {epoch}").sample(problems, len(problems)))
    deck = itertools.islice(deck, run.step * config.questions, None)
    for step in (steps := range(run.step, total)):
        restart(step)
        if step % config.steps == 0 and "reference" in run.models:   # an iteration begins: pi_ref <- pi_theta
            run.reference.load_state_dict(sampler.state_dict())
        start = time.perf_counter()
        questions = list(itertools.islice(deck, config.questions))
        # pi_old is the sampler: G completions of each question, their rewards and advantages
        run.phase = f"sampling of step {step + 1}"
        batch = sample_and_score(run, questions, config)
        run.rows = [(questions[i // config.group_size].question, text) for i, text in enumerate(batch.texts)]
        demand_finite(run, batch.logp_sampler + batch.advantages, range(len(run.rows)))
        sampled = time.perf_counter()
        # log-probs of pi_ref; without a KL term a row of advantage 0 has no gradient, and is left out (but not all)
        run.phase = f"reference pass of step {step + 1}"
        rows = [i for i, a in enumerate(batch.advantages.any(dim=1).tolist()) if a or config.kl_beta] or [0]
        cuts = micro_batches(rows, batch.prompt_mask, batch.mask, config.micro_tokens)
        logp_ref = [None] * len(cuts)
        for i, cut in enumerate(cuts if config.kl_beta else []):
            with torch.no_grad():
                logp_ref[i], _, _ = score_rows(run.reference, cut, *batch[:4], config.temperature)
            demand_finite(run, logp_ref[i], cut)
        referred = time.perf_counter()
        if STOP["signal"]:   # a reward has caught the exception
            sys.exit(128 + STOP["signal"])
        # mu updates of pi_theta
        run.phase, STOP["at once"] = f"update of step {step + 1}", False   # from here on a signal waits
        lr = learning_rate(step, total, config.lr, config.lr_warmup, config.lr_end)
        metrics = update(run, batch, cuts, logp_ref, config, lr, autocast)
        lengths, t_sample = batch.mask.sum(dim=1).float(), sampled - start - batch.t_reward
        metrics.update(step=step + 1, iteration=step // config.steps, reward=batch.rewards.mean().item(), lr=lr,
                       zero_var=(batch.advantages == 0).view(len(questions), -1).all(dim=1).float().mean().item(),
                       left_out=1 - len(rows) / len(lengths), length=lengths.mean().item(),
                       truncated=batch.truncated.float().mean().item(), tok_s=lengths.sum().item() / t_sample,
                       t_sample=t_sample, t_reward=batch.t_reward, t_ref=referred - sampled,
                       t_update=time.perf_counter() - referred, mem_gb=torch.cuda.max_memory_allocated() / 1e9)
        if config.reward == "model":   # its verdicts on completions that it was not fitted to, against the rule's
            right = torch.tensor([labels[-1] for _, _, labels in batch.examples]).view_as(batch.rewards)
            metrics |= {"right": right.mean().item(), "agree": (right == batch.rewards.round()).float().mean().item()}
            run.fresh = (run.fresh + batch.examples)[-config.reward_size:]
        print_metrics(metrics, heading=step % 20 == 0 or step == steps[0])
        if config.show_every and (step + 1) % config.show_every == 0:
            print(f"--- {questions[0].question}   (gold: {questions[0].answer})\n{batch.texts[0]}\n"
                  f"--- reward {batch.rewards[0, 0]:g}, advantage {batch.advantages[0, 0]:+.2f}", flush=True)
        finish_step(metrics)

def main(argv):
    started, config = time.time(), parse_config(argv)
    name = f"runs/{Path(config.problems).stem}-{config.seed}"
    names = itertools.chain([config.out or name], (f"{name}-{number}" for number in itertools.count(2)))
    out = next(path for path in map(Path, names) if config.out or not path.exists())
    if config.resume and (out / "summary.json").exists():
        return print(f"{out} has finished, and there is nothing to go on with")
    if not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is a file or not empty, and nothing is overwritten: name another folder")
    load_reward(config.reward)   # what is wrong with it shows now, and not after the warm-up
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    device, bf16 = pick_device(config.device)
    policy, tokenizer = load_model(config.model, device) if config.model else make_tiny_model(config, device)
    problems, worked, held_out = gather_problems(config, policy, tokenizer)
    checksum = zlib.crc32(repr((problems, worked, held_out, tokenizer.chat_template, len(tokenizer))).encode())
    if config.resume and json.loads((out / "run.json").read_text()).get("data") != checksum:
        raise InputError(f"--resume {out}: its problems or its model have changed, so start another run")
    # The optimizer moves float32 weights. On a GPU the samples come from a bf16 copy, renewed at each step.
    sampler = bf16_weights(copy.deepcopy(policy)) if bf16 else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    # step: how many are done, -1 before the first evaluation; phase, rows: (question, completion), to say what failed
    # fresh, replay: examples for the reward model, not yet and already used; models: those that a checkpoint holds
    models = {"policy": policy}
    models |= {"reference": copy.deepcopy(sampler)} if config.kl_beta or config.sample_from == "reference" else {}
    models |= {"reward_model": RewardModel(policy)} if config.reward == "model" else {}
    run = SimpleNamespace(
        **models, models=models, sampler=sampler, optimizer=optimizer, tokenizer=tokenizer, out=out, started=started,
        step=-1, scores={}, phase="", rows=[], fresh=[], replay=[])
    chosen = dataclasses.asdict(config) | {"out": str(out)}
    if config.resume:
        load_checkpoint(run)
    else:
        out.mkdir(parents=True, exist_ok=bool(config.out))   # what is wrong with the input has been found out before
        (out / "run.json").write_text(json.dumps({
            "command": ["train.py", *argv], "config": chosen, "data": checksum, "versions": VERSIONS,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}, indent=1))
    run.writer = SummaryWriter(out, purge_step=run.step + 1) if config.tensorboard else None
    print(f"{policy.num_parameters():,} parameters on {device}, sampling in {sampler.dtype}; "
          f"from step {max(0, run.step)}, the run goes to {out}\nthat the loss is near 0 is no bug", flush=True)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if config.activation_checkpointing:   # until transformers 5.22 it has the second name
        getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)()
    try:
        if config.sft_steps and run.step < 0:
            warm_up(run, worked, config, autocast)
            save_model(policy, tokenizer, out / "sft")
        train(run, problems, held_out, config, autocast)
        save_model(policy, tokenizer, out)
    except BaseException as error:
        with contextlib.suppress(OSError):
            print(f"\nstopped; to go on: python train.py --resume {out}", file=sys.stderr)
        if STOP["at once"] and run.step >= 0 and not isinstance(error, FloatingPointError):
            save_checkpoint(run)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            raise InputError(f"out of memory in the {run.phase}, peak {peak}: lower --sample-tokens, --micro-tokens, "
                             "or in a new run --group-size, or give --activation-checkpointing") from None
        raise
    scores, seconds = run.scores, time.time() - run.started
    (out / "summary.json").write_text(json.dumps(dict(**scores, seconds=seconds, seed=config.seed, config=chosen)))
    measures = "sampled", "greedy", f"maj@{config.eval_samples}", f"pass@{config.eval_samples}"
    for split, key in itertools.product(scores["before"], measures):   # mean (95% interval), before -> after
        print(f"{split:<3} {key:<8}", " -> ".join("{:.3f} ({:.3f} - {:.3f})".format(
            scores[when][split][key], *scores[when][split][f"{key}_interval"]) for when in ("before", "after")))
    rewards = [json.loads(line)["reward"] for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    means = [part.mean() for part in numpy.array_split(rewards, 60) if len(part)]   # of at most 60 stretches of steps
    blocks = [chr(0x2581 + int(7.99 * (x - min(means)) / (max(means) - min(means) or 1))) for x in means]   # 8 sizes
    print(f"reward {''.join(blocks)}  lowest {min(means, default=0):.3f}, highest {max(means, default=0):.3f}")
    flags = [f"--{k} {chosen[k]!r}" for k in ("problems", "lr", "request", "reward") if chosen[k] != vars(Config)[k]]
    print(f"{seconds:.0f} s. The model is in {out}; to evaluate it, to ask it something, to train it further:\n"
          f"  python eval.py --model {out}\n  python eval.py --model {out} --ask 7+5-4\n"
          f"  python train.py --model {out} --max-new-tokens {config.max_new_tokens} {' '.join(flags)}")

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    run_cli(main)
