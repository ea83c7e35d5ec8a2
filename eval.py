"""The problems, the one prompt function, and how well a model solves the problems.

    python eval.py --model runs/arithmetic-0 --problems arithmetic --split out
    python eval.py --model Qwen/Qwen2.5-0.5B-Instruct --problems gsm8k --limit 200

train.py imports from here, so that training and evaluation share their prompts, their sampler and their
grader, and "before" and "after" come from the same lines of code. Every accuracy stands beside its n and
its 95% interval: with 200 questions that is +-7 points, and many a reported gain is smaller.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import random
import re
import sys
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo import completion_mask, head_is_plain, sample_groups, token_logprobs
from reward import MATH_REQUEST, accuracy_reward, extract_answer, is_equivalent


class InputError(Exception):
    """Something that the user can mend; its text says what and how. Printed as one line, no traceback."""


# ----------------------------------------------------------------------------------------------------
# 1. Problems
# ----------------------------------------------------------------------------------------------------

class Problem(NamedTuple):
    question: str
    answer: str          # the gold answer, compared by reward.is_equivalent
    solution: str = ""   # worked text that ends in the answer, for the supervised warm-up; "" if there is none


LARGEST_TOTAL = 20       # running totals of the built-in problems stay within 0 ... 20
IN_TERMS, OUT_TERMS = 4, 5
ARITHMETIC_SPLITS = {    # terms of a problem, how many problems, held out?
    "sft": ((2, 3, 3, 4, 4, 5), 30_000, False),      # the corpus of the warm-up
    "train": ((IN_TERMS,), 10_000, False),           # reinforcement learning
    "in": ((IN_TERMS,), 1_000, True),                # held out, as long as in training
    "out": ((OUT_TERMS,), 1_000, True),              # held out, longer: in the corpus, never in RL
}


def arithmetic(split):
    """The built-in problems: chains like "7+5-4+6", made from a fixed seed. Returns a list of `Problem`.

    A worked solution goes line by line. The corpus has two habits, and chooses anew at every line:
    four times in ten it takes one term ("7+5=12") and gets it right; else it takes two at once
    ("7+5-4=9") and guesses, within 3 of the truth. So a model trained on it *can* compute but mostly
    does not: what reinforcement learning has to find out is that the careful habit is worth more.
    """
    terms, count, held_out = ARITHMETIC_SPLITS[split]
    rng = random.Random(f"arithmetic {split}")
    problems = []
    while len(problems) < count:
        numbers = [rng.randint(1, 9)]                # 7, +5, -4, +6
        for _ in range(rng.choice(terms) - 1):
            total = sum(numbers)
            numbers.append(rng.choice([d for d in range(-9, 10) if d and 0 <= total + d <= LARGEST_TOTAL]))
        question = str(numbers[0]) + "".join(f"{d:+d}" for d in numbers[1:])
        # A fifth of all questions, chosen by a hash of the text, is never trained on in any split.
        if (zlib.crc32(question.encode()) % 5 == 0) == held_out:
            problems.append(Problem(question, str(sum(numbers)), _work_out(numbers, rng)))
    return problems


def _work_out(numbers, rng):
    total, rest, lines = numbers[0], numbers[1:], []
    while rest:
        take = 1 if len(rest) == 1 or rng.random() < 0.4 else 2
        line = str(total) + "".join(f"{d:+d}" for d in rest[:take])
        total += sum(rest[:take])
        if take == 2:   # a guess, such that the next term stays possible
            after = rest[2] if len(rest) > 2 else 0
            total = rng.choice([g for g in range(total - 3, total + 4)
                                if 0 <= g <= LARGEST_TOTAL and 0 <= g + after <= LARGEST_TOTAL])
        lines.append(f"{line}={total}\n")
        rest = rest[take:]
    return "".join(lines) + f"\\boxed{{{total}}}"


GSM8K_URL = ("https://raw.githubusercontent.com/openai/grade-school-math/"
             "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/{}.jsonl")
GSM8K_SHA256 = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
                "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


def fetch(url, sha256, name):
    """Path of a file in the user's cache directory, fetched there on first use. Raises InputError."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minimal-grpo" / name
    mend = f"Fetch {url} by hand and put it there."
    if not path.exists():
        part = path.with_name(f"{name}.{os.getpid()}.part")   # renamed when whole, so never half a file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as source, open(part, "wb") as sink, \
                    tqdm(desc=name, unit="B", unit_scale=True, total=int(source.headers["Content-Length"] or 0)) as bar:
                while block := source.read(1 << 16):
                    sink.write(block)
                    bar.update(len(block))
            _check_sha256(part, sha256, f"What {url} sent")
            os.replace(part, path)
        except OSError as error:
            raise InputError(f"{path} could not be fetched ({error}). {mend}") from error
        finally:
            part.unlink(missing_ok=True)
    _check_sha256(path, sha256, f"{path}")
    return path


def _check_sha256(path, sha256, what):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(f"{what} is not the expected file: its SHA-256 is {found[:12]}..., not {sha256[:12]}.... "
                         f"Delete {path} if it is there, and try again.")


def read_problems(path):
    """Problems of a JSON-lines file with the fields question (or problem) and answer. Raises InputError.

    An answer that holds a line "#### 72", as in GSM8K, is a solution: the gold is what follows the mark.
    """
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}). Each line must be one JSON object.") from error
        row = row if isinstance(row, dict) else {}
        question, answer = row.get("question", row.get("problem")), row.get("answer")
        for field, value in (("question", question), ("answer", answer)):
            if value is None or not str(value).strip():
                raise InputError(f'{path}, line {number}: no "{field}". Each line needs a question and an answer, '
                                 'like {"question": "1+1?", "answer": "2"}.')
        text, mark, gold = str(answer).rpartition("#### ")
        solution = re.sub(r"<<[^<>]*>>", "", text) + f"\\boxed{{{gold.strip()}}}" if mark else ""   # <<48/2=24>>
        problems.append(Problem(str(question), gold.strip(), solution))
    if not problems:
        raise InputError(f"{path} holds no problems. Each line needs a question and an answer.")
    return problems


def load_problems(name, split):
    """The list of problems of "arithmetic", "gsm8k" or a JSON-lines file, which has no splits. Raises InputError."""
    if name == "arithmetic":
        splits, load = ARITHMETIC_SPLITS, arithmetic
    elif name == "gsm8k":
        splits = GSM8K_SHA256
        load = lambda s: read_problems(fetch(GSM8K_URL.format(s), GSM8K_SHA256[s], f"gsm8k-{s}.jsonl"))
    elif Path(name).is_file():
        return read_problems(name)
    else:
        raise InputError(f'"{name}" is neither a problem set (arithmetic, gsm8k) nor a JSON-lines file.')
    if split not in splits:
        raise InputError(f'{name} has no split "{split}"; it has {", ".join(splits)}.')
    return load(split)


# ----------------------------------------------------------------------------------------------------
# 2. Models and prompts
# ----------------------------------------------------------------------------------------------------

def pick_device(name):
    """torch.device of "auto", "cpu" or "cuda", and whether to use bf16 on it. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise InputError(f'--device "{name}" cannot be used here: choose cpu, or cuda with a GPU (MPS is not supported).')
    bf16 = name == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if name == "cuda" and not bf16:
        print("This GPU is older than sm80 and has no bf16: everything runs in float32.")
    return torch.device(name), bf16


def load_model(name, device):
    """(model in float32, tokenizer) of a folder or a hub name. Raises InputError for one that cannot be trained."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        for part in [config] + [value for value in vars(config).values() if hasattr(value, "to_dict")]:
            for key, value in vars(part).items():   # TRAP: with dropout, train() and eval() are two policies
                if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                    setattr(part, key, 0.0)
        # TRAP: without dtype= a bf16 checkpoint stays bf16, where a step of 1e-6 moves 2% of the weights.
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f'--model "{name}" cannot be loaded: {reason[0]}') from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f'--model "{name}": its tokenizer has no EOS token, so no completion could ever end.')
        tokenizer.pad_token = tokenizer.eos_token   # only fills up; masks go by position, not by value
    model = model.to(device).eval()
    check_model(model, name)
    return model, tokenizer


def check_model(model, name):
    """Sample a few tokens and score them again: an architecture where the two differ cannot be trained."""
    prompt_ids = torch.arange(1, 11, device=model.device).view(2, 5) % model.get_input_embeddings().num_embeddings
    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=model.device)
    try:
        s = sample_groups(model, prompt_ids, prompt_mask, 2, 4, eos_ids=[], pad_id=0, temperature=0)
        with torch.no_grad():
            logp, _ = token_logprobs(model, prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0),
                                     s.completion_ids, s.mask, temperature=1.0)
        gap = (logp - s.logp).abs().max().item()
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, IndexError) as error:
        raise InputError(f'--model "{name}" ({type(model).__name__}) cannot be sampled with a dynamic KV cache '
                         f"({type(error).__name__}: {error}). Take a decoder like Llama or Qwen.") from error
    if not gap < 1e-2:
        raise InputError(f'--model "{name}" ({type(model).__name__}) gives other log-probs with its KV cache than '
                         f"without (gap {gap:.3g}). Take a causal decoder like Llama or Qwen.")
    if not head_is_plain(model):
        print(f"{type(model).__name__} changes its logits behind the vocabulary head: "
              "log-probs are computed without chunks, which takes more memory.")


def eos_token_ids(model, tokenizer):
    """The set of ids that end a completion: the tokenizer's, the model's, and the template's end of turn.

    TRAP: chat models end a turn with another token than a document. Whoever knows only one of the two
    cuts nothing off, and every completion runs to the limit (test_end_of_turn_is_an_eos).
    """
    ids = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if tokenizer.chat_template:   # what does the template put behind an answer?
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        first = tokenizer(behind, add_special_tokens=False).input_ids[:1]
        ids |= set(first) & (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))
    return ids - {None}


def default_request(problems):
    """What follows each question of a problem set, unless the user says otherwise."""
    return "" if problems == "arithmetic" else MATH_REQUEST


def build_prompt(tokenizer, question, request):
    """The one prompt function: token ids of question and request, up to where the answer begins."""
    text = f"{question}\n{request}" if request else question
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            tokenize=True, return_dict=False)
    else:
        ids = tokenizer(text + "\n", add_special_tokens=False).input_ids
    # TRAP: a template's BOS and the tokenizer's BOS make two, which the model has never seen.
    bos = tokenizer.bos_token_id
    wants_bos = bos is not None and bos in (ids[:1] + tokenizer("Q").input_ids[:1])
    while wants_bos and ids[:1] == [bos]:
        ids = ids[1:]
    return [bos] * wants_bos + ids


def pad_prompts(prompts, pad_id, device):
    """Lists of ids -> (B, P) ids and mask, padded on the left so that all completions start at column P."""
    P = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad_id] * (P - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def decode(tokenizer, samples):
    """The N completions of a `Samples` as text, without special tokens."""
    return [tokenizer.decode(ids[keep], skip_special_tokens=True)
            for ids, keep in zip(samples.completion_ids.cpu(), samples.mask.cpu())]


# ----------------------------------------------------------------------------------------------------
# 3. Accuracy
# ----------------------------------------------------------------------------------------------------

def interval(scores):
    """95% interval of the mean of one score in [0, 1] per question, as (low, high).

    Wilson's for scores of 0 and 1 (8 of 10: 0.490 to 0.943), else mean +- 1.96 standard errors. The K
    samples of a question are not independent, so they are averaged first: n counts questions.
    """
    n, mean, z = len(scores), sum(scores) / len(scores), 1.96
    if all(score in (0, 1) for score in scores):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    else:
        variance = sum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 1.0
        centre, half = mean, z * math.sqrt(variance / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def majority(answers, gold):
    """maj@K of one question: 1 if the most frequent answer is right, 0 if not; ties share. None is no vote."""
    groups = []   # lists of equivalent answers
    for answer in answers:
        if answer is not None:
            group = next((g for g in groups if is_equivalent(answer, g[0])), None)
            groups.append([answer]) if group is None else group.append(answer)
    top = [g for g in groups if len(g) == max(map(len, groups))]
    return sum(is_equivalent(g[0], gold) for g in top) / len(top) if top else 0.0


def last_number(text):
    """The last number in a text, marked or not: what lm-evaluation-harness calls flexible-extract."""
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-2000:])
    return numbers[-1].rstrip(",") if numbers else None


def complete(model, tokenizer, problems, request, group_size, max_new_tokens, temperature, generator, rows=256):
    """Sample a group for each problem, `rows` completions at a time. Returns a dict of lists per problem."""
    eos, pad = eos_token_ids(model, tokenizer), tokenizer.pad_token_id
    at_once, records = max(1, rows // group_size), []
    for start in tqdm(range(0, len(problems), at_once), desc="evaluating", delay=5, leave=False):
        batch = problems[start:start + at_once]
        prompts = [build_prompt(tokenizer, p.question, request) for p in batch]
        samples = sample_groups(model, *pad_prompts(prompts, pad, model.device), group_size, max_new_tokens,
                                eos, pad, temperature, generator)
        texts, truncated = decode(tokenizer, samples), samples.truncated.tolist()
        for i, problem in enumerate(batch):
            group = slice(i * group_size, (i + 1) * group_size)
            records.append({"question": problem.question, "gold": problem.answer, "completions": texts[group],
                            "truncated": truncated[group], "answers": [extract_answer(t) for t in texts[group]],
                            "rewards": [accuracy_reward(t, problem.answer) for t in texts[group]]})
    return records


def evaluate(model, tokenizer, problems, request, max_new_tokens, samples=8, temperature=1.0, seed=0):
    """Greedy accuracy, and that of `samples` samples each. Returns (scores, records), both fit for JSON.

    scores: n, and for each measure its value and its interval: greedy, sampled (mean over the samples),
    maj@K, pass@K (K = samples; the last three only if samples > 0); and beside them, for greedy and
    sampled each, flexible (the last number in the text counts), truncated and unparsable shares.
    """
    scores, records = {"n": len(problems), "samples": samples, "temperature": temperature}, {}
    for kind, group_size, heat in (("greedy", 1, 0.0), ("sampled", samples, temperature)):
        if group_size == 0:
            continue
        generator = torch.Generator(model.device).manual_seed(seed)   # the same draw before and after
        rows = records[kind] = complete(model, tokenizer, problems, request, group_size, max_new_tokens,
                                        heat, generator)
        measures = {kind: [sum(r["rewards"]) / group_size for r in rows]}
        if kind == "sampled":
            measures[f"maj@{samples}"] = [majority(r["answers"], r["gold"]) for r in rows]
            measures[f"pass@{samples}"] = [max(r["rewards"]) for r in rows]
        for name, values in measures.items():
            scores[name], scores[f"{name}_interval"] = sum(values) / len(values), interval(values)
        every = len(rows) * group_size
        scores[f"{kind}_flexible"] = sum(
            is_equivalent(last_number(t) or "", r["gold"]) for r in rows for t in r["completions"]) / every
        scores[f"{kind}_truncated"] = sum(sum(r["truncated"]) for r in rows) / every
        scores[f"{kind}_unparsable"] = sum(a is None for r in rows for a in r["answers"]) / every
    return scores, records


def score_table(scores):
    """The scores of `evaluate` as lines of text."""
    lines = [f"{'n = ' + str(scores['n']):<12}{'accuracy':>9}  {'95% interval':<15}{'flexible':>9}{'truncated':>11}{'unparsable':>12}"]
    for name in [key[:-len("_interval")] for key in scores if key.endswith("_interval")]:
        low, high = scores[f"{name}_interval"]
        shares = "".join(f"{scores[f'{name}_{share}']:>{width}.1%}" if f"{name}_{share}" in scores else " " * width
                         for share, width in (("flexible", 9), ("truncated", 11), ("unparsable", 12)))
        lines.append(f"{name:<12}{scores[name]:>9.1%}  {f'{low:.1%} - {high:.1%}':<15}{shares}".rstrip())
    return "\n".join(lines)


def transcripts(records):
    """One right, one wrong and one unparsable completion as text, as far as there are any."""
    chosen = {}
    for row in (row for rows in records.values() for row in rows):
        for text, answer, reward in zip(row["completions"], row["answers"], row["rewards"]):
            chosen.setdefault("unparsable" if answer is None else "right" if reward else "wrong", (row, text))
    return "\n".join(f"--- {kind}: {row['question']}   (gold: {row['gold']})\n{text}"
                     for kind, (row, text) in sorted(chosen.items()))


# ----------------------------------------------------------------------------------------------------
# 4. Command line
# ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option gets one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def free_path(path):
    """`path` if nothing is there, else the first free one of path-2, path-3, ...: nothing is overwritten."""
    path, number = Path(path), 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def versions():
    """What a run depends on besides its options."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}


def run_cli(main):
    """Run a main function; an InputError becomes one line on stderr and exit status 1."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")


def main(argv):
    parser = Parser(prog="eval.py", description="Measure how well a model solves problems.")
    parser.add_argument("--model", required=True, help="folder (a run of train.py, say) or hub name")
    parser.add_argument("--problems", required=True, help="arithmetic, gsm8k, or a JSON-lines file")
    parser.add_argument("--split", help="in (default), out, train, sft for arithmetic; test (default), train for gsm8k")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many problems (default: all)")
    parser.add_argument("--samples", type=int, default=8, help="samples per problem beside the greedy one (default: 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: 1.0)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="limit of a completion (default: 512)")
    parser.add_argument("--request", help="what follows each question (default: as in training)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="JSON file to write (default: the next free runs/eval-<problems>.json)")
    args = parser.parse_args(argv)
    if args.limit < 0 or args.samples < 0 or args.max_new_tokens < 1 or not args.temperature > 0:
        raise InputError("--limit and --samples must be at least 0, --max-new-tokens at least 1, --temperature above 0")
    out = Path(args.out) if args.out else free_path(f"runs/eval-{Path(args.problems).stem}.json")
    if out.exists():
        raise InputError(f"--out {out} exists already, and nothing is overwritten: name another file")
    split = args.split or {"arithmetic": "in"}.get(args.problems, "test")
    request = default_request(args.problems) if args.request is None else args.request
    problems = load_problems(args.problems, split)[:args.limit or None]
    device, bf16 = pick_device(args.device)
    model, tokenizer = load_model(args.model, device)
    model = model.to(torch.bfloat16) if bf16 else model

    scores, records = evaluate(model, tokenizer, problems, request, args.max_new_tokens, args.samples,
                               args.temperature, args.seed)
    print(f"{args.model} on {args.problems}\n{score_table(scores)}\n{transcripts(records)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"arguments": vars(args), "versions": versions(), "scores": scores,
                               "records": records}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    run_cli(main)
