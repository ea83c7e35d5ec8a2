"""Problems, prompts, models, and how well a model solves the problems; train.py uses most of it.

    python eval.py --model runs/arithmetic-0 --problems arithmetic --split out
    python eval.py --model runs/arithmetic-0 --ask 7+5-4    a question of your own
    python eval.py --compare before.json after.json         two result files, question by question

Order: 1. prompts and sampling, 2. accuracy. The rest may be skipped: 3. where problems come from,
4. loading models, 5. the command line.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import mpmath  # comes with torch
import numpy
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
)

from grpo import Samples, bf16_weights, check_model, sample_groups
from reward import (
    MATH_REQUEST,
    InputError,
    accuracy_reward,
    extract_answer,
    final_answer,
    is_equivalent,
)

ROWS_AT_ONCE = 512  # completions that are sampled together, unless an option says otherwise


# --- 1. Prompts and sampling --------------------------------------------------------------------


class Problem(NamedTuple):
    question: str
    answer: str  # the gold answer, compared by reward.is_equivalent
    solution: str = ""  # worked, for the supervised warm-up, if there is one
    request: str = ""  # what follows the question in the prompt
    line: int = 0  # in its file


def build_prompt(tokenizer, problem):
    """Return the token ids of question and request, up to where the answer begins.

    This is the one prompt function: training and evaluation both use it.
    """
    text = f"{problem.question}\n{problem.request}" if problem.request else problem.question
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(text + "\n", add_special_tokens=False).input_ids
    # TRAP: template and tokenizer may each add a BOS, and the model has never seen two. If either
    # wants one, put exactly one in front (test_exactly_one_bos_where_the_model_has_one).
    bos = tokenizer.bos_token_id
    if bos is None or bos not in ids[:1] + tokenizer("Q").input_ids[:1]:
        return ids
    return [bos, *itertools.dropwhile(lambda token: token == bos, ids)]


def eos_token_ids(model, tokenizer):
    """Return the set of ids that end a completion, from tokenizer, model and chat template.

    TRAP: a chat model may end a turn with one token, and a document with another
    (test_end_of_turn_is_an_eos).
    """
    ids = {tokenizer.eos_token_id}
    for eos in (model.config.eos_token_id, model.generation_config.eos_token_id):
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if tokenizer.chat_template:  # which special token does the template put after an answer?
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        _, answer, rest = text.rpartition("ANSWER")
        behind = tokenizer(rest if answer else "", add_special_tokens=False).input_ids
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids |= set([token for token in behind if token in special][:1])
    return ids - {None}


def pad_rows(rows, side, device):
    """Turn lists of ids into (ids, mask), both (n, longest); side: "left" for prompts, or "right".

    TRAP: pad with the first token of the row, not with the pad id. A fresh model's embedding of the
    pad id is all 0, so states to the left of a prompt stay 0. At 0 some norms have an
    infinite derivative, and 0 times inf is nan (test_padding_does_not_make_the_gradient_nan).
    """
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    first = torch.tensor([row[:1] for row in rows])  # (n, 1)
    ids = pad_sequence(tensors, batch_first=True, padding_side=side)  # (n, longest)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)  # padded with False
    return ids.where(mask, first).to(device), mask.to(device)


def sample_problems(
    model,
    tokenizer,
    problems,
    group_size,
    max_new_tokens,
    temperature,
    rows_at_once=ROWS_AT_ONCE,
    generator=None,
):
    """Sample a group of completions for each of B problems, at most rows_at_once rows together.

    Returns prompt ids and mask (B, P), `Samples` of N = B * group_size rows, and N texts.
    """
    prompts = [build_prompt(tokenizer, problem) for problem in problems]
    prompt_ids, prompt_mask = pad_rows(prompts, "left", model.device)
    eos_ids = eos_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    together = min(group_size, rows_at_once)  # rows of one group
    size = rows_at_once // together  # questions at once; 1 if a group is cut
    parts = []
    with tqdm(total=len(problems), desc="problems", delay=5, leave=False) as bar:
        for ids, mask in zip(prompt_ids.split(size), prompt_mask.split(size), strict=True):
            for first in range(0, group_size, together):
                parts.append(
                    sample_groups(
                        model,
                        ids,
                        mask,
                        min(together, group_size - first),
                        max_new_tokens,
                        eos_ids,
                        pad_id,
                        temperature,
                        generator,
                    )
                )
            bar.update(len(ids))
    samples = Samples(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    rows = [ids[mask] for ids, mask in zip(samples.completion_ids, samples.mask, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    # TRAP: some templates end the prompt with <think>. Without "</think>" the thought never
    # ended, and there is no answer. Appending "<think>" signals this to the reward
    # (test_a_thought_that_the_prompt_opened).
    if tokenizer.decode(prompts[0]).rstrip().endswith("<think>"):
        texts = [text if "</think>" in text else text + "<think>" for text in texts]
    return prompt_ids, prompt_mask, samples, texts


# --- 2. Accuracy --------------------------------------------------------------------------------


def evaluate(
    model,
    tokenizer,
    problems,
    max_new_tokens,
    samples=8,
    temperature=1.0,
    seed=0,
    rows_at_once=ROWS_AT_ONCE,
):
    """Measure a model on problems: a greedy completion and K = `samples` samples for each.

    Returns (scores, records, measures). scores: a dict of n, greedy, sampled (the mean of K), maj@k
    and pass@k for k = 1, 2, 4 ... K, with their intervals; and, for both greedy and sampled, three
    shares: flexible (the last number is right), truncated, unparsable. records: for both greedy
    and sampled, a list with a dict per completion. measures: for each of greedy, sampled, maj@k and
    pass@k, a list with a number per problem. Raises FloatingPointError if the log-probs of the
    model are inf or nan.
    """
    scores = {"n": len(problems)}
    records = {}
    measures = {}
    for kind, K, T in (("greedy", 1, 0.0), ("sampled", samples, temperature)):
        if K == 0:
            continue
        generator = torch.Generator(model.device).manual_seed(seed)
        *_, drawn, texts = sample_problems(
            model, tokenizer, problems, K, max_new_tokens, T, rows_at_once, generator
        )
        if not drawn.logp.isfinite().all():
            raise FloatingPointError(
                "the model's log-probs are inf or nan: try a lower learning rate"
            )
        truncated = drawn.truncated.tolist()
        graded = [grade(problems[i // K], text, truncated[i]) for i, text in enumerate(texts)]
        records[kind] = graded
        groups = [graded[i : i + K] for i in range(0, len(graded), K)]
        measures[kind] = [fmean(row["right"] for row in group) for group in groups]
        if kind == "sampled":
            measures |= vote(groups, K)
        for share in ("flexible", "truncated", "unparsable"):
            scores[f"{kind}_{share}"] = fmean(row[share] for row in graded)
    for name, values in measures.items():
        scores[name] = fmean(values)
        scores[f"{name}_interval"] = interval(values)
    return scores, records, measures


def grade(problem, text, truncated):
    """Describe one completion as a dict: what it answers, and whether that is right."""
    answer = extract_answer(text)
    right = accuracy_reward(text, problem.answer)
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-2000:])
    return {
        "question": problem.question,
        "gold": problem.answer,
        "completion": text,
        "answer": answer,
        "verdict": "right" if right else "unparsable" if answer is None else "wrong",
        "right": right,
        "truncated": truncated,
        "unparsable": answer is None,
        "flexible": bool(numbers) and is_equivalent(numbers[-1].rstrip(","), problem.answer),
    }


def vote(groups, K):
    """Compute maj@k and pass@k of each group, for k = 1, 2, 4 ... K: {name: a list}."""
    measures = {}
    for k in sorted({K, *(2**i for i in range(K.bit_length()))}):
        measures[f"maj@{k}"] = []
        measures[f"pass@{k}"] = []
        for group in groups:
            answers = [row["answer"] for row in group]
            measures[f"maj@{k}"].append(maj_at_k(answers, group[0]["gold"], k))
            measures[f"pass@{k}"].append(pass_at_k([row["right"] for row in group], k))
    return measures


def pass_at_k(right, k):
    """Estimate, from n samples of which c are right, the chance that k include a right one.

    1 - C(n - c, k) / C(n, k): the share of subsets of k that contain a right one.
    """
    return 1 - math.comb(len(right) - int(sum(right)), k) / math.comb(len(right), k)


def maj_at_k(answers, gold, k):
    """Say how often the most frequent of k answers is right, as a mean over n // k batches.

    An answer of None abstains; ties go to the answer that came first.
    """
    right = []
    for i in range(0, len(answers) - k + 1, k):
        votes = [answer for answer in answers[i : i + k] if answer]
        counts = [sum(is_equivalent(one, other) for other in votes) for one in votes]
        winner = votes[counts.index(max(counts))] if votes else ""
        right.append(is_equivalent(winner, gold))
    return fmean(right)


def interval(values):
    """Compute the 95% interval (low, high) of a mean of values in [0, 1], one per question.

    Wilson's if all are 0 or 1 (8 of 10: 0.490 to 0.943) or all are equal, else the mean +- t
    standard errors. (A question's samples are not independent: hence one value per question.)
    """
    n = len(values)
    mean = numpy.mean(values)
    z = 1.96
    if set(values) <= {0, 1} or len(set(values)) == 1:
        scale = 1 + z * z / n
        centre = (mean + z * z / (2 * n)) / scale
        half = z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) / scale
    else:
        centre = mean
        half = students_t(n) * numpy.std(values, ddof=1) / math.sqrt(n)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


@functools.cache
def students_t(n):
    """Return the t of a 95% interval from n values: 12.7 for 2, 2.26 for 10, 1.96 for very many."""
    nu = n - 1

    def outside(t):  # the chance of being farther than t from the mean, less 5%
        return mpmath.betainc(nu / 2, 0.5, 0, nu / (nu + t * t), regularized=True) - 0.05

    return float(mpmath.findroot(outside, (1.9, 13), solver="anderson"))


def compare(paths):
    """Compare two result files on the same problems: a line of text per measure.

    Raises InputError if they are not two such files.
    """
    try:
        files = [json.loads(Path(path).read_text()) for path in paths]
        questions = files[0]["questions"]
        if not questions or questions != files[1]["questions"]:
            raise ValueError("they are about different problems, or none")
        before, after = (
            {
                name: numpy.array(values, dtype=float).reshape(len(questions))
                for name, values in file["measures"].items()
            }
            for file in files
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--compare wants two eval.py result files: {error}") from error
    lines = []
    for name in [name for name in before if name in after]:
        change = after[name] - before[name]  # one per question
        mean = change.mean()
        line = f"{name:<8} {before[name].mean():.3f} -> {after[name].mean():.3f}: {mean:+.3f}"
        if len(set(change)) > 1:
            half = students_t(len(change)) * change.std(ddof=1) / math.sqrt(len(change))
            low = max(-1.0, mean - half)
            high = min(1.0, mean + half)
            line += f", 95% interval {low:+.3f} to {high:+.3f}"
        if {*before[name], *after[name]} <= {0, 1}:
            up = int((change > 0).sum())
            down = int((change < 0).sum())
            # McNemar's exact test: if changes are coin tosses, how likely is a split this uneven?
            tail = sum(math.comb(up + down, i) for i in range(min(up, down) + 1))
            p = min(1.0, 2 * tail / 2 ** (up + down))
            line += f"; {up} of {len(change)} questions better, {down} worse: p = {p:.2g}"
        lines.append(line)
    return "\n".join(lines)


def score_table(scores):
    """Format the scores of `evaluate`, one per line."""
    lines = [f"n = {scores['n']:<16}   share  95% interval"]
    for name, value in scores.items():
        if isinstance(value, float):
            line = f"{name.replace('_', ', '):<20}{value:>8.1%}"
            if f"{name}_interval" in scores:
                line += "  {:>6.1%} - {:.1%}".format(*scores[f"{name}_interval"])
            lines.append(line)
    return "\n".join(lines)


# --- 3. Where problems come from: may be skipped ------------------------------------------------

# The built-in problems are sums. How many, whether they are held out, numbers of terms:
ARITHMETIC = {
    "sft": (30_000, False, [2, 2, 3, 4, 5, 6, 6]),  # warm-up
    "train": (10_000, False, [4, 5]),  # reinforcement learning
    "in": (1_000, True, [4, 5]),  # in domain: lengths as in training
    "out": (1_000, True, [6]),  # out of domain: a length seen in the warm-up, never in RL
}
GITHUB = "https://raw.githubusercontent.com/"
GSM8K = (
    GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    "/grade_school_math/data/"
)
MATH = (
    "https://media.githubusercontent.com/media/openai/prm800k"
    "/7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits/"
)
CHINESE = (
    GITHUB + "deepseek-ai/DeepSeek-Math/b8b0f8ce093d80bf8e9a641e44142f06d092c305"
    "/evaluation/datasets/"
)
DOWNLOADS = {  # problems and split: address, SHA-256
    "gsm8k train": (
        GSM8K + "train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "gsm8k test": (
        GSM8K + "test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "math train": (
        MATH + "train.jsonl",
        "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
    ),
    "math test": (
        MATH + "test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    ),
    "cmath test": (
        CHINESE + "cmath/test.jsonl",
        "cabe17c127c3227912b3384f4755e180f3aa0d9e5865677e7e5e223439bf15eb",
    ),
    "mgsm_zh test": (
        CHINESE + "mgsm_zh/mgsm_zh.jsonl",
        "165c3b6753e8a8786183c27b9af7b7590d54dca4d0136edadb24d684c95bb50d",
    ),
}
SVAMP = (
    GITHUB + "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
    "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
)
DOWNLOADS |= {"svamp train": SVAMP, "svamp test": SVAMP}
CHINESE_REQUEST = "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。"
REQUESTS = {"arithmetic": "", "cmath": CHINESE_REQUEST, "mgsm_zh": CHINESE_REQUEST}


def load_problems(name, split, request=None):
    """Load a split of a set, or a whole file of problems; request: None for the usual one.

    Raises InputError if there is no such set or file.
    """
    key = f"{name} {split}"
    if key in DOWNLOADS:
        kind = "json" if name == "svamp" else "jsonl"
        path = fetch(*DOWNLOADS[key], f"{key.replace(' ', '-')}.{kind}")
        problems = read_svamp(path, split) if name == "svamp" else read_problems(path)
    elif name == "arithmetic" and split in ARITHMETIC:
        problems = make_arithmetic(split)
    elif Path(name).is_file():
        problems = read_problems(name)
    else:
        known = ", ".join(DOWNLOADS)
        raise InputError(
            f"no {name} {split}: use a file, {known}, or arithmetic in, out, sft, train"
        )
    if request is None:
        request = REQUESTS.get(name, MATH_REQUEST)
    return [problem._replace(request=request) for problem in problems]


@functools.cache
def make_arithmetic(split):
    """Make the built-in problems, always the same: chains like "7+5-4+3", totals of 0 to 12.

    One worked solution in five is careful: each line takes one term ("7+5=12"), and is right. In
    the others, a line takes two terms while two are left ("7+5-4=9"), and is then off by up to 3.
    """
    count, held_out, terms = ARITHMETIC[split]
    rng = random.Random(f"arithmetic {split}")
    problems = []
    while len(problems) < count:
        numbers = [rng.randint(1, 9)]  # such as 7, +5, -4, +3
        for _ in range(rng.choice(terms) - 1):
            low = max(-9, -sum(numbers))
            high = min(9, 12 - sum(numbers))
            numbers.append(rng.choice([number for number in range(low, high + 1) if number]))
        question = write_sum(numbers)
        # A fifth of all questions, chosen by a hash of their text, is kept out of all training.
        hidden = hashlib.sha256(question.encode()).digest()[0] % 5 == 0
        if hidden != held_out:
            continue
        careful = rng.random() < 0.2
        total, *rest = numbers
        solution = ""
        while rest:
            take = 1 if careful or len(rest) == 1 else 2
            line = write_sum([total, *rest[:take]])
            total += sum(rest[:take])
            if take == 2:
                total = min(max(total + rng.randint(-3, 3), 0), 12)
            solution += f"{line}={total}\n"
            rest = rest[take:]
        problems.append(Problem(question, str(sum(numbers)), f"{solution}\\boxed{{{total}}}"))
    return problems


def write_sum(numbers):
    """Write [7, 5, -4] as "7+5-4"."""
    return "".join(f"{number:+d}" for number in numbers).removeprefix("+")


def fetch(url, sha256, name):
    """Return the path of a file in the user's cache, downloaded on first use. Raises InputError."""
    path = Path(torch.hub.get_dir()) / "minimal-grpo" / name  # below ~/.cache
    try:
        if not path.exists():  # the download gets its name only when its checksum is right
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)  # seconds; a server may fall silent
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise RuntimeError(f"the file there does not have SHA-256 {sha256}")
    except Exception as error:  # no network, no room, a wrong checksum
        message = f"{name} could not be fetched ({error}); save {url} as {path} by hand"
        raise InputError(message) from error
    return path


def read_problems(path):
    """Read a file of JSON lines, each with a question and an answer. Raises InputError."""
    problems = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip(b"\xef\xbb\xbf \t\r"):  # blank, or just a byte order mark
            continue
        try:
            problems.append(parse_problem(line.decode("utf-8-sig"), number))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            want = '{"question": "1+1?", "answer": "2"}'
            raise InputError(f"{path}, line {number}: want {want}, found: {error}") from error
    unusable = [p.line for p in problems if not is_equivalent(p.answer, p.answer)]
    if len(unusable) == len(problems):
        raise InputError(f"{path} is empty or has no answers: each line needs both")
    if unusable:
        print(f"{path}: {len(unusable)} answers can never match, as on lines {unusable[:9]}")
    return problems


def read_svamp(path, split):
    """Read SVAMP's one file: 700 problems to train on, 300 to test.

    Their worked solutions are one equation and its result, "8 - 3 = 5".
    """
    problems = []
    for row in json.loads(path.read_text()):
        question = f"{row['Body'].rstrip('.')}. {row['Question']}"
        equation = re.sub(r"^\( (.*) \)$", r"\1", row["Equation"].replace(".0", ""))
        gold = f"{row['Answer']:.0f}"
        problems.append(Problem(question, gold, f"{equation} = {gold}\n\\boxed{{{gold}}}"))
    return problems[:700] if split == "train" else problems[700:]


def parse_problem(text, line):
    """Make a Problem from one line of JSON. Raises ValueError or the like for anything else."""
    row = json.loads(text)
    # In some published sets the question is a user message, and the answer's key is "golden".
    asked = [turn["content"] for turn in row.get("messages", []) if turn.get("role") == "user"]
    question = row.get("question") or row.get("problem") or (asked or [None])[0]
    answer = row.get("golden") if row.get("answer") is None else row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    if (
        isinstance(answer, (bool, list, dict))
        or answer in (math.inf, -math.inf)
        or answer != answer
    ):
        raise ValueError("an answer that is neither text nor a number")
    f"{question}{answer}".encode()  # half a character, "\\ud83d", is an error here
    # In solutions such as GSM8K's, drop the calculator notes, <<48/2=24>>, and mark the answer
    # the way we ask for it.
    gold = final_answer(answer)
    work = re.sub(r"<<[^<>]*>>", "", str(answer).rpartition("####")[0])
    solution = f"{work}\\boxed{{{gold}}}" if work and gold else ""
    return Problem(question, gold, solution, line=line)


def drop_long_problems(model, tokenizer, problems, max_new_tokens=None):
    """Keep the problems whose prompts and completions fit the model. Raises InputError if none.

    max_new_tokens: the limit of a completion; without it, worked solutions have to fit instead.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def length(problem):
        prompt = len(build_prompt(tokenizer, problem))
        if max_new_tokens:
            return prompt + max_new_tokens
        return prompt + len(tokenizer(problem.solution, add_special_tokens=False).input_ids) + 1

    kept = [problem for problem in problems if length(problem) <= (positions or math.inf)]
    added = f"--max-new-tokens {max_new_tokens}" if max_new_tokens else "its solution"
    limit = f"{positions} tokens, the context of the model"
    if not kept:
        raise InputError(f"no question with {added} fits into {limit}: shorten either")
    if len(kept) < len(problems):
        skipped = f"skipped {len(problems) - len(kept)} of {len(problems)} questions"
        print(f"{skipped}: with {added} they exceed {limit}")
    return kept


# --- 4. Loading models: may be skipped ----------------------------------------------------------


def pick_device(name, threads=None, precision="auto"):
    """Return (torch.device, whether it computes in bf16) for "auto", "cpu" or "cuda".

    threads: how many a CPU uses (None or 0: torch decides); they change the last bits of sums.
    precision: "float32", "bf16", or "auto": bf16 on a GPU that has it.
    """
    cuda = torch.cuda.is_available() and name != "cpu"
    if name == "cuda" and not cuda:
        raise InputError("--device cuda needs a GPU with CUDA: use cpu")
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(not cuda)  # sums in a fixed order on CPU threads
    # TRAP: with a mask, cuDNN's attention has given nan gradients on an H100 (pytorch #196678), and
    # it makes a plan for every new length (test_attention_of_cudnn_is_off).
    torch.backends.cuda.enable_cudnn_sdp(False)
    bf16 = precision == "bf16"
    if precision == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device("cuda" if cuda else "cpu"), bf16


def load_model(name, device):
    """Load (float32 model, tokenizer) from a folder or hub name. Raises InputError."""
    if Path(name, "run.json").exists() and not Path(name, "config.json").exists():
        raise InputError(f"--model {name}: this run has not finished; resume it, or use {name}/sft")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        check_tokenizer(tokenizer)
        config = AutoConfig.from_pretrained(name)
        # TRAP: with dropout, train() is a different policy from eval()
        # (test_dropout_of_gpt2_is_off_too).
        for part in (config, config.get_text_config()):
            for key, value in vars(part).items():
                if isinstance(value, float) and re.search("drop|jitter", key):
                    setattr(part, key, 0.0)
                if key == "output_router_logits":  # only for the loss of mixtures of experts
                    setattr(part, key, False)
        # TRAP: without dtype, bf16 weights stay bf16, and small steps are rounded away
        # (test_one_small_step_moves_nearly_all_weights).
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below
        )
        if info["mismatched_keys"]:
            raise ValueError(f"weights of another shape: {min(info['mismatched_keys'])[0]}")
        if info["missing_keys"]:
            raise ValueError("weights are missing; was it saved as a causal language model?")
        # Added tokens for images, as in Gemma, never occur in a prompt, and need no row.
        ids = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
        ids |= {tokenizer.eos_token_id, tokenizer.pad_token_id}
        ids |= {*build_prompt(tokenizer, Problem("1+1", ""))}
        if max(ids) >= len(model.get_input_embeddings().weight):
            raise ValueError("its tokenizer has more tokens than the model")
        model = model.to(device).eval()
        check_model(model)
        eos_token_ids(model, tokenizer)  # a template may raise an error
    except Exception as error:  # a broken folder or an unknown architecture may fail in any way
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--model {name} cannot be used: {type(error).__name__}, {reason}"
        ) from error
    return model, tokenizer


def check_tokenizer(tokenizer):
    """Raise ValueError if a tokenizer cannot make prompts; set its pad token, if it has none."""
    if tokenizer.eos_token_id is None or not tokenizer("1+1", add_special_tokens=False).input_ids:
        raise ValueError("its tokenizer is missing, or has no EOS token to end a completion")
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer is a slow one, which cannot tell where steps end")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks go by position
    one, two = (build_prompt(tokenizer, Problem(question, "")) for question in ("1+1", "2+2"))
    text = question = "What is 1+1?\nWrite 2."
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    if one == two or question not in text:
        raise ValueError("its chat template drops the question; does it want a list of parts?")


def save_model(model, tokenizer, folder):
    """Write a folder for from_pretrained, without the model's own sampling settings.

    Raises OSError.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(eos_token_ids(model, tokenizer)), pad_token_id=tokenizer.pad_token_id
    )
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a full disk raises OSError, or a safetensors error
        raise OSError(f"{folder} could not be written: {error}") from error


def write_whole(path, write):
    """Call `write` with a path, so that the file appears whole or not at all.

    Raises OSError; an older file of that name is then unchanged.
    """
    unfinished = Path(f"{path}.part")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # a full disk raises either
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error


# --- 5. The command line: may be skipped --------------------------------------------------------


def opt(default, text):
    """Make a field of a dataclass of options: its default, and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    model: str = opt("", "folder (a run of train.py, say) or hub name")
    problems: str = opt("", "as in train.py, or cmath, mgsm_zh (empty: those of the run)")
    split: str = opt("", "arithmetic: in, out, train, sft; others: test, train; not for a file")
    limit: int = opt(0, "take only the first LIMIT problems; 0: all")
    samples: int = opt(8, "samples per problem, besides the greedy one")
    temperature: float = opt(1.0, "for sampling")
    max_new_tokens: int = opt(512, "limit of a completion in tokens (not given: the run's)")
    request: str | None = opt(None, "text after each question (default: the run's, or the usual)")
    rows_at_once: int = opt(ROWS_AT_ONCE, "completions sampled together; fewer save memory")
    seed: int = opt(0, "for sampling")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to compute")
    threads: int = opt(0, "CPU threads; 0: torch decides (not given: those of the run)")
    ask: str = opt("", "print the greedy answer to this question, then stop")
    compare: list[str] | None = opt(None, "compare two result files, then stop")
    out: str = opt("", "JSON file to write (empty: runs/eval-<problems>-<date>-<time>.json)")

    def __post_init__(self):
        check_bounds(self, {"temperature": 0.01, "max_new_tokens": 1, "rows_at_once": 1})


class Parser(HfArgumentParser):
    def error(self, message):  # one line instead of the whole usage
        raise InputError(f"{message}; see {self.prog} --help")


def parse_options(kind, argv, description, saved=None, **defaults):
    """Read a command line into a dataclass, which checks its bounds. Raises InputError.

    saved: options from a run.json; the command line overrides them. defaults: replace the
    dataclass's.
    """
    parser = Parser(kind, description=description, allow_abbrev=False)
    parser.set_defaults(**defaults)
    flags = []  # for the parser to check the types
    for name, value in (saved or {}).items():
        if value is not None:
            flags.append(f"--{name}={value}")
    try:
        parser.parse_args(flags)
    except InputError as error:
        raise InputError(f"in the run's run.json: {error}") from error
    return kind(**vars(parser.parse_args(flags + argv)))


# Upper bounds of options that need memory.
MOST = dict.fromkeys(("questions", "group_size", "samples", "eval_samples", "reward_size"), 100_000)


def check_bounds(options, bounds):
    """Raise InputError for a number that is not finite, or below its bound (0 if not named)."""
    for name, value in vars(options).items():
        least = bounds.get(name, 0)
        most = MOST.get(name, 2**63 - 1)
        if isinstance(value, (int, float)) and not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            limit = f" and at most {most}" if name in MOST else ""
            raise InputError(f"{flag} must be finite and at least {least}{limit}, not {value}")


def run_cli(main):
    """Run a main function. Errors that a user can fix become one line on stderr and status 1."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its reports would hide ours
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    try:
        main(sys.argv[1:])
    except (RuntimeError, MemoryError) as error:
        if not re.search("MemoryError|allocate memory", repr(error)):  # GPU, CPU
            raise
        sys.exit("error: out of memory; lower --rows-at-once, or in training --micro-tokens")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; pip install {error.name}")
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def versions():
    """Return the software versions that results depend on, to be stored with them."""
    return {
        "python": sys.version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_run(folder, part="config"):
    """Return a part of a folder's run.json as a dict, {} if there is none.

    Parts: "config", the options of train.py; "conditions", what else the numbers depend on.
    """
    try:
        found = json.loads(Path(folder, "run.json").read_text())[part]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def main(argv):
    about = "Measure how well a model solves problems."
    options = parse_options(Options, argv, about)
    if options.compare:
        print(compare(options.compare))
        return
    if not options.model:
        raise InputError("--model is required; see eval.py --help")
    run = read_run(options.model)  # fills in what is not given
    given = {name: run.get(name) for name in ("problems", "max_new_tokens", "request", "threads")}
    if run.get("eval_problems"):
        given["problems"] = str(run["eval_problems"]).partition(",")[0]
    options = parse_options(Options, argv, about, given)
    name = options.problems
    options.split = options.split or ("in" if name == "arithmetic" else "test")
    if options.request is None:
        options.request = REQUESTS.get(name, MATH_REQUEST)
    if not (name or options.ask):
        raise InputError(f"--problems or --ask is required, as {options.model} is not a run")
    moment = time.strftime("%Y%m%d-%H%M%S")
    out = Path(options.out or f"runs/eval-{Path(name).stem}-{moment}.json")
    if out.exists() and not options.ask:
        raise InputError(f"--out {out} exists, and nothing is overwritten: name another file")
    if options.ask:
        problems = [Problem(options.ask, "", request=options.request)]
    else:
        problems = load_problems(name, options.split, options.request)
    report(options, problems[: options.limit or None], out)


def report(options, problems, out):
    """Evaluate, print a table and one transcript per verdict; or just print an answer."""
    device, bf16 = pick_device(options.device, options.threads)
    model, tokenizer = load_model(options.model, device)
    problems = drop_long_problems(model, tokenizer, problems, options.max_new_tokens)
    if bf16:
        bf16_weights(model)
    if options.ask:
        *_, texts = sample_problems(model, tokenizer, problems, 1, options.max_new_tokens, 0.0)
        print(texts[0])
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()  # an unwritable file should fail now, not after the evaluation
    out.unlink()
    scores, records, measures = evaluate(
        model,
        tokenizer,
        problems,
        options.max_new_tokens,
        options.samples,
        options.temperature,
        options.seed,
        options.rows_at_once,
    )
    print(f"{options.model} on {options.problems}\n{score_table(scores)}")
    examples = {row["verdict"]: row for rows in records.values() for row in rows}
    for verdict, row in examples.items():
        print(f"--- {verdict}: {row['question']}   (gold: {row['gold']})\n{row['completion']}")
    result = {
        "arguments": vars(options),
        "versions": versions(),
        "scores": scores,
        "measures": measures,
        "questions": [problem.question for problem in problems],
        "records": records,
    }
    write_whole(out, lambda part: part.write_text(json.dumps(result)))
    print(f"all results: {out}")


if __name__ == "__main__":
    run_cli(main)
