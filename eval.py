"""The problems, the one prompt function, and how well a model solves the problems.

    python eval.py --model runs/arithmetic-0 --problems arithmetic --split out
    python eval.py --model Qwen/Qwen2.5-0.5B-Instruct --problems gsm8k --limit 200

train.py imports from here, so training and evaluation share prompts, sampler and grader. In the table every
accuracy has its n and 95% interval: with 200 questions, up to 7 points either way.
"""

import argparse
import hashlib
import json
import math
import random
import re
import socket
import sys
import time
from http.client import HTTPException
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo import Samples, bf16_weights, head_is_plain, sample_groups, token_logprobs
from reward import (MATH_REQUEST, InputError, accuracy_reward, extract_answer, final_answer, is_equivalent,
                    last_number, majority)

SAMPLE_TOKENS = 2 ** 18   # tokens in the KV cache while sampling, in at most 1,024 rows: logits need room, too
VERSIONS = {"python": sys.version, "torch": torch.__version__, "transformers": transformers.__version__}

# --- 1. Problems ------------------------------------------------------------------------------------
class Problem(NamedTuple):
    question: str
    answer: str          # the gold answer, compared by reward.is_equivalent
    solution: str = ""   # worked text for the supervised warm-up (built-in ones are often wrong); or ""
    request: str = ""    # what follows the question in the prompt
    line: int = 0        # in its file

LARGEST_TOTAL = 12       # the true running totals of the built-in problems stay within 0 ... 12
ARITHMETIC_SPLITS = {    # terms of a problem, how many problems, held out?
    "sft": ((2, 3, 3, 4, 4, 5, 5, 6), 30_000, False),   # the corpus of the warm-up
    "train": ((4, 5), 10_000, False),   # reinforcement learning
    "in": ((4, 5), 1_000, True),        # in domain: held out, as long as in training
    "out": ((6,), 1_000, True),         # out of domain: a length that is in the corpus, never in RL
}
GITHUB, LFS = "https://raw.githubusercontent.com/", "https://media.githubusercontent.com/media/"
GSM8K = GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
MATH = LFS + "openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits/"
CHINESE = GITHUB + "deepseek-ai/DeepSeek-Math/b8b0f8ce093d80bf8e9a641e44142f06d092c305/evaluation/datasets/"
DOWNLOADS = {   # problems and split: address, SHA-256; the last two get the Chinese request
    "gsm8k train": (GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k test": (GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "math train": (MATH + "train.jsonl", "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076"),
    "math test": (MATH + "test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    "math500 test": (MATH + "test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    "cmath test": (CHINESE + "cmath/test.jsonl", "cabe17c127c3227912b3384f4755e180f3aa0d9e5865677e7e5e223439bf15eb"),
    "mgsm_zh test": (CHINESE + "mgsm_zh/mgsm_zh.jsonl",
                     "165c3b6753e8a8786183c27b9af7b7590d54dca4d0136edadb24d684c95bb50d")}
CHINESE_REQUEST = "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。"

def arithmetic(split):
    """The built-in problems: chains like "7+5-4+3", always the same ones. Returns a list of `Problem`.

    A worked solution has two habits, and chooses where both can be: four times in ten it takes one term ("7+5=12")
    and gets it right, else it takes two ("7+5-4=9") and guesses, within 3 of the truth. RL finds out what pays.
    """
    terms, count, held_out = ARITHMETIC_SPLITS[split]
    rng, problems = random.Random(f"arithmetic {split}"), []
    while len(problems) < count:
        numbers = [rng.randint(1, 9)]   # such as 7, +5, -4, +3
        for _ in range(rng.choice(terms) - 1):
            numbers.append(rng.choice([d for d in range(-9, 10) if d and 0 <= sum(numbers) + d <= LARGEST_TOTAL]))
        question = str(numbers[0]) + "".join(f"{d:+d}" for d in numbers[1:])
        # A fifth of all questions, by a hash of their text, is held out from training in every split.
        if (hashlib.sha256(question.encode()).digest()[0] % 5 == 0) != held_out:
            continue
        total, rest, solution = numbers[0], numbers[1:], ""
        while rest:
            take = 1 if len(rest) == 1 or rng.random() < 0.4 else 2
            line, total = str(total) + "".join(f"{d:+d}" for d in rest[:take]), total + sum(rest[:take])
            total = total if take == 1 else min(max(total + rng.randint(-3, 3), 0), LARGEST_TOTAL)
            solution, rest = f"{solution}{line}={total}\n", rest[take:]
        problems.append(Problem(question, str(sum(numbers)), f"{solution}\\boxed{{{total}}}"))
    return problems

def fetch(url, sha256, name):
    """Path of a file in the user's cache directory, downloaded on first use. Raises InputError."""
    path = Path(torch.hub.get_dir()) / "minimal-grpo" / name   # below ~/.cache
    try:
        if not path.exists():   # the download gets its name only when its checksum is right
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)   # seconds; else a server that falls silent would hold us for ever
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise RuntimeError(f"the file there does not have SHA-256 {sha256}")
    except (OSError, RuntimeError, HTTPException) as error:   # RuntimeError: a wrong checksum
        raise InputError(f"{name} could not be fetched ({error}); put {url} at {path} by hand")
    return path

def read_problems(path):
    """Problems of a file of JSON lines: question (or problem), answer ("2", or "work #### 2"). Or InputError."""
    problems = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            if not line.strip(b"\xef\xbb\xbf \t\r"):   # blank, but perhaps for a byte order mark
                continue
            pairs = json.loads(line.decode("utf-8-sig"), object_pairs_hook=list)   # a dict loses doubles
            if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
                raise ValueError("no JSON object")
            row = dict(pairs)
            # In the published sets the question may also be messages[0].content, the answer "golden".
            question = row.get("question") or row.get("problem") or dict(row.get("messages", [{}])[0]).get("content")
            answer = row.get("answer", row.get("golden"))
            if len(row) < len(pairs):
                raise ValueError("a key that stands there twice")
            if not isinstance(question, str) or not question.strip():
                raise ValueError("no question")
            if isinstance(answer, (bool, list)):
                raise ValueError("an answer that is neither text nor a number")
            f"{question}{answer}".encode()   # half a character, "\\ud83d", is an error here
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise InputError(f'{path}, line {number}: want {{"question": "1+1?", "answer": "2"}}, found: {error}')
        # Of worked text as in GSM8K drop the calculator notes, <<48/2=24>>, and mark the answer as we ask for it.
        gold, work = final_answer(answer), re.sub(r"<<[^<>]*>>", "", str(answer).rpartition("#### ")[0])
        problems.append(Problem(question, gold, f"{work}\\boxed{{{gold}}}" if work and gold else "", line=number))
    unpaid = [problem.line for problem in problems if not is_equivalent(problem.answer, problem.answer)]
    if len(unpaid) == len(problems):
        raise InputError(f"{path} is empty or has no answers; each of its lines should hold a question and an answer")
    if unpaid:
        print(f"{path}: no reward for {len(unpaid)} of {len(problems)} questions: no answer, or too long, first in "
              f"lines {unpaid[:9]}")
    return problems

def load_problems(name, split, request=None):
    """The problems of a split of a known set, or all of a file; request: None for the usual one. Or InputError."""
    known = [f"arithmetic {one}" for one in ARITHMETIC_SPLITS] + list(DOWNLOADS)
    if f"{name} {split}" in DOWNLOADS:
        problems = read_problems(fetch(*DOWNLOADS[f"{name} {split}"], f"{name}-{split}.jsonl"))
    elif name == "arithmetic" and split in ARITHMETIC_SPLITS:
        problems = arithmetic(split)
    elif Path(name).is_file():
        problems = read_problems(name)
    else:
        raise InputError(f"no problems {name} {split}: take {', '.join(known)} or the path of a JSON-lines file")
    if request is None:
        request = {"arithmetic": "", "cmath": CHINESE_REQUEST, "mgsm_zh": CHINESE_REQUEST}.get(name, MATH_REQUEST)
    return [problem._replace(request=request) for problem in problems]

# --- 2. Models and prompts --------------------------------------------------------------------------
def pick_device(name):
    """(torch.device, whether to use bf16 on it) for "auto", "cpu" or "cuda". Raises InputError."""
    cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not cuda):
        raise InputError(f"--device {name} cannot be used here; take cpu, or cuda with a GPU (no MPS)")
    if name == "cpu" or not cuda:
        return torch.device("cpu"), False
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    print("sampling with bf16 weights" if bf16 else "this GPU has no bf16: float32 everywhere")
    return torch.device("cuda"), bf16

def load_model(name, device):
    """(model in float32, tokenizer) of a folder or hub name. Raises InputError if GRPO cannot train it."""
    try:
        wrong = "no folder or hub name to load"   # what an exception from here on means
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        # TRAP: with dropout, train() is another policy than eval() (test_dropout_of_gpt2_is_off_too).
        for part in (config, config.get_text_config()):
            for key, value in vars(part).items():
                if isinstance(value, float) and ("drop" in key or "jitter" in key):
                    setattr(part, key, 0.0)
        # TRAP: without dtype= bf16 weights stay bf16 and hardly move (test_one_small_step_moves_nearly_all_weights).
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True)
        sizes = 1 + max(tokenizer.get_vocab().values(), default=-1), len(model.get_input_embeddings().weight)
        for wrong, found in (
                ("its tokenizer is missing, or has no EOS token to end a completion",
                 tokenizer.eos_token_id is None or not tokenizer("1+1", add_special_tokens=False).input_ids),
                ("its tokenizer has more tokens than the model", sizes if sizes[0] > sizes[1] else None),
                ("weights are missing; was it saved as a causal language model?", sorted(info["missing_keys"])[:1])):
            if found:
                raise ValueError(found)
        wrong = "its chat template fails"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token   # only fills up: masks go by position
        eos_token_ids(model, tokenizer), build_prompt(tokenizer, Problem("1+1?", "2"))
        wrong = "does not run here; take a decoder with a KV cache, like Qwen, that fits into memory"
        # Sample groups that end early, and score them again without a cache: the two must agree.
        model = model.to(device).eval()
        ids = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]], device=device)
        samples = sample_groups(model, ids, ids > 0, 2, 8, eos_ids=range(0, 10**6, 4), pad_id=0)   # one in 4
        with torch.no_grad():
            logp, _ = token_logprobs(model, *(x.repeat_interleave(2, 0) for x in (ids, ids > 0)), *samples[:2], 1.0)
        if not torch.allclose(logp, samples.logp, rtol=0, atol=1e-2):
            raise ValueError(f"log-probs with and without KV cache differ by {(logp - samples.logp).abs().max():.2g}")
    except Exception as error:   # a broken folder or an unknown architecture may fail in any way
        raise InputError(f"--model {name}: {wrong} ({' '.join(repr(error).split())[:200]})")
    if not head_is_plain(model):
        print(f"{name} changes its logits behind the head: log-probs not computed in chunks, more memory")
    return model, tokenizer

def save_model(model, tokenizer, folder):
    """Write a folder for from_pretrained, without its sampling settings: save_pretrained refuses some."""
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(eos_token_ids(model, tokenizer)), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def eos_token_ids(model, tokenizer):
    """The set of ids that end a completion: the tokenizer's, the model's, and the template's end of turn.
    TRAP: a chat model ends a turn with another token than a document. Whoever knows only one of them lets every
    completion run to the limit (test_end_of_turn_is_an_eos).
    """
    ids = {tokenizer.eos_token_id}
    for eos in (model.config.eos_token_id, model.generation_config.eos_token_id):
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if tokenizer.chat_template:   # which special token does the template put behind an answer?
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids |= set([i for i in tokenizer(behind, add_special_tokens=False).input_ids if i in special][:1])
    return ids - {None}

def build_prompt(tokenizer, problem):
    """The one prompt function: the token ids of question and request, up to where the answer begins."""
    text = f"{problem.question}\n{problem.request}" if problem.request else problem.question
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            tokenize=True, return_dict=False)
    else:
        ids = tokenizer(text + "\n", add_special_tokens=False).input_ids
    # TRAP: a BOS of the template and one of the tokenizer make two, which the model has never seen. So
    # if either wants one, put exactly one in front (test_exactly_one_bos_where_the_model_has_one).
    bos = tokenizer.bos_token_id
    wanted = bos is not None and bos in ids[:1] + tokenizer("Q").input_ids[:1]
    while wanted and ids[:1] == [bos]:
        ids = ids[1:]
    return [bos] * wanted + ids

def fitting(model, tokenizer, problems, max_new_tokens):
    """The problems whose prompts and completions fit into the model's positions. Raises InputError if none does."""
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf) - max_new_tokens
    fits = [len(build_prompt(tokenizer, problem)) <= room for problem in problems]
    limit = f"the {room} positions that --max-new-tokens {max_new_tokens} leaves of the model's"
    if not any(fits):
        raise InputError(f"no prompt fits into {limit}: lower it")
    if not all(fits):
        lines = [problem.line for problem, fit in zip(problems, fits) if not fit]
        print(f"skipped {len(lines)} of {len(problems)} questions, longer than {limit}, first in lines {lines[:9]}")
    return [problem for problem, fit in zip(problems, fits) if fit]

def pad(tokenizer, rows, side, device):
    """Lists of token ids as tensors: ids and mask, both (n, longest). Prompts are padded on the left."""
    padded = tokenizer.pad({"input_ids": rows}, padding_side=side, return_attention_mask=True, return_tensors="pt")
    return padded.input_ids.to(device), padded.attention_mask.to(device)

def sample_problems(model, tokenizer, problems, group_size, max_new_tokens, temperature,
                    sample_tokens=SAMPLE_TOKENS, generator=None):
    """Sample a group for each of B problems. Returns prompt ids and mask (B, P), `Samples`, and N texts."""
    prompt_ids, prompt_mask = pad(tokenizer, [build_prompt(tokenizer, p) for p in problems], "left", model.device)
    eos_ids, pad_id = eos_token_ids(model, tokenizer), tokenizer.pad_token_id
    at_once = max(1, min(1024, sample_tokens // (prompt_ids.shape[1] + max_new_tokens)) // group_size)
    batches = list(zip(prompt_ids.split(at_once), prompt_mask.split(at_once)))
    parts = [sample_groups(model, *batch, group_size, max_new_tokens, eos_ids, pad_id, temperature, generator)
             for batch in tqdm(batches, desc="sampling", delay=5, leave=False)]
    samples = Samples(*map(torch.cat, zip(*parts)))
    rows = [ids[mask] for ids, mask in zip(samples.completion_ids, samples.mask)]
    return prompt_ids, prompt_mask, samples, tokenizer.batch_decode(rows, skip_special_tokens=True)

# --- 3. Accuracy ------------------------------------------------------------------------------------
def interval(scores):
    """95% interval of the mean of one score in [0, 1] per question, as (low, high).
    Wilson's if all are 0 or 1 (8 of 10: 0.490 to 0.943) or alike, else mean +- 1.96 standard errors.
    The K samples of a question depend on each other, so their mean is one score: n counts questions.
    """
    n, mean, z = len(scores), fmean(scores), 1.96
    if set(scores) <= {0, 1} or len(set(scores)) == 1:
        centre, scale = mean + z * z / (2 * n), 1 + z * z / n
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    half = z * math.sqrt(fmean((score - mean) ** 2 for score in scores) / max(1, n - 1))
    return max(0.0, mean - half), min(1.0, mean + half)

def evaluate(model, tokenizer, problems, max_new_tokens, samples=8, temperature=1.0, seed=0,
             sample_tokens=SAMPLE_TOKENS):
    """Accuracy, greedy and of K = `samples` samples each, which are the same draws before and after training.
    Returns scores: n; greedy, sampled (mean of K), maj@K and pass@K, each with its interval; shares of
    flexible (last number right), truncated, unparsable. And records: kind -> a dict per completion, in order.
    """
    scores, records = {"n": len(problems)}, {}
    for kind, K, T in [("greedy", 1, 0.0)] + ([("sampled", samples, temperature)] if samples else []):
        *_, drawn, texts = sample_problems(model, tokenizer, problems, K, max_new_tokens, T, sample_tokens,
                                           torch.Generator(model.device).manual_seed(seed))
        graded = records.setdefault(kind, [])
        for i, text in enumerate(texts):
            (question, gold, *_), answer = problems[i // K], extract_answer(text)
            right = accuracy_reward(text, gold)
            graded.append({"question": question, "gold": gold, "completion": text, "answer": answer,
                           "verdict": "right" if right else "unparsable" if answer is None else "wrong",
                           "right": right, "truncated": drawn.truncated[i].item(),
                           "flexible": is_equivalent(last_number(text), gold)})
        groups = [graded[i:i + K] for i in range(0, len(graded), K)]
        measures = {kind: [fmean(row["right"] for row in g) for g in groups]}
        if kind == "sampled":
            measures[f"maj@{K}"] = [majority([row["answer"] for row in g], g[0]["gold"]) for g in groups]
            measures[f"pass@{K}"] = [max(row["right"] for row in g) for g in groups]
        for name, values in measures.items():
            scores[name], scores[f"{name}_interval"] = fmean(values), interval(values)
        for share in ("flexible", "truncated", "unparsable"):   # the last one is a verdict
            scores[f"{kind}_{share}"] = fmean(row.get(share, row["verdict"] == share) for row in graded)
    return scores, records

def score_table(scores):
    """The scores of `evaluate` as lines of text."""
    lines = [f"n = {scores['n']:<8}accuracy  95% interval      flexible  truncated unparsable"]
    for name in [key.removesuffix("_interval") for key in scores if key.endswith("_interval")]:
        shares = [scores.get(f"{name}_{share}") for share in ("flexible", "truncated", "unparsable")]
        lines.append("{:<12}{:>8.1%}  {:>6.1%} - {:<6.1%}".format(name, scores[name], *scores[f"{name}_interval"])
                     + "".join(f"{share:>11.1%}" for share in shares if share is not None))
    return "\n".join(lines)

# --- 4. Command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):   # one line instead of the whole usage
        raise InputError(f"{message}; see {self.prog} --help")

def run_cli(main):
    """Run a main function; what the user can mend becomes one line on stderr and exit status 1."""
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")   # a terminal that cannot show a character must not end a run
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory: lower --sample-tokens or --max-new-tokens")
    except (InputError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

def main(argv):
    parser = Parser(prog="eval.py", description="Measure how well a model solves problems.")
    add = parser.add_argument
    add("--model", required=True, help="folder (a run of train.py, say) or hub name")
    add("--problems", required=True, help="arithmetic, gsm8k, math, math500, cmath, mgsm_zh, or a JSON-lines file")
    add("--split", help="arithmetic: in (default), out, train, sft; others: test (default), train; a file: all")
    add("--limit", type=int, default=0, help="only the first so many problems (default: all)")
    add("--samples", type=int, default=8, help="samples per problem beside the greedy one (default: 8)")
    add("--temperature", type=float, default=1.0, help="of the samples (default: 1.0)")
    add("--max-new-tokens", type=int, default=512, help="limit of a completion in tokens (default: 512)")
    add("--request", help="what follows each question, as in training (default: as usual for the problems)")
    add("--sample-tokens", type=int, default=SAMPLE_TOKENS, help="tokens in the KV cache (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--out", help="JSON file to write (default: runs/eval-<problems>-<date>-<time>.json)")
    args = parser.parse_args(argv)
    if min(args.limit, args.samples, args.max_new_tokens - 1) < 0 or not 0 < args.temperature < math.inf:
        raise InputError("--limit, --samples must be at least 0, --max-new-tokens 1, --temperature above 0")
    out = Path(args.out or f"runs/eval-{Path(args.problems).stem}-" + time.strftime("%Y%m%d-%H%M%S.json"))
    if out.exists():
        raise InputError(f"--out {out} exists, and nothing is overwritten: name another file")
    split = args.split or ("in" if args.problems == "arithmetic" else "test")
    problems = load_problems(args.problems, split, args.request)[:args.limit or None]
    device, bf16 = pick_device(args.device)
    model, tokenizer = load_model(args.model, device)
    problems = fitting(model, tokenizer, problems, args.max_new_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    scores, records = evaluate(bf16_weights(model) if bf16 else model, tokenizer, problems, args.max_new_tokens,
                               args.samples, args.temperature, args.seed, args.sample_tokens)
    print(f"{args.model} on {args.problems}\n{score_table(scores)}")
    for verdict in ("right", "wrong", "unparsable"):
        for row in [row for rows in records.values() for row in rows if row["verdict"] == verdict][:1]:
            print(f"--- {verdict}: {row['question']}   (gold: {row['gold']})\n{row['completion']}")
    out.write_text(json.dumps(dict(arguments=vars(args), versions=VERSIONS, scores=scores, records=records)))
    print(f"all of it has been written to {out}")

if __name__ == "__main__":
    run_cli(main)
