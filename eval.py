"""The problems, the one prompt function, and how well a model solves the problems; train.py shares all of it.

    python eval.py --model runs/arithmetic-0 --problems arithmetic --split out
    python eval.py --model runs/arithmetic-0 --ask 7+5-4      a question of your own
    python eval.py --compare before.json after.json           two files that it wrote, question by question
"""

import argparse, contextlib, hashlib, itertools, json, math, random, re, socket, sys, time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
import torch, transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from grpo import Samples, bf16_weights, cache_gap, head_is_plain, sample_groups
from reward import MATH_REQUEST, InputError, accuracy_reward, extract_answer, final_answer, is_equivalent

SAMPLE_TOKENS = 2 ** 18   # tokens in the KV cache while sampling, in at most 1,024 rows: logits need room, too
VERSIONS = {"python": sys.version, "torch": torch.__version__, "transformers": transformers.__version__}
# --- 1. Problems ------------------------------------------------------------------------------------
class Problem(NamedTuple):
    question: str
    answer: str          # the gold answer, compared by reward.is_equivalent
    solution: str = ""   # worked text for the supervised warm-up (built-in ones are often wrong); or ""
    request: str = ""    # what follows the question in the prompt
    line: int = 0        # in its file

is_arithmetic = re.compile("arithmetic(-([6-9]|[12][0-9])-(1[2-9]|[2-9][0-9]))?").fullmatch   # -LONGEST-LARGEST
ARITHMETIC_SPLITS = {    # how many problems, held out?, terms of a problem if the longest have n
    "sft": (30_000, False, lambda n: sorted([*range(2, n), *range(3, n + 1)])),   # warm-up: 2 ... n, inner ones twice
    "train": (10_000, False, lambda n: [n - 2, n - 1]),   # reinforcement learning
    "in": (1_000, True, lambda n: [n - 2, n - 1]),        # in domain: held out, as long as in training
    "out": (1_000, True, lambda n: [n])}                  # out of domain: a length in the corpus, never in RL
GITHUB, LFS = "https://raw.githubusercontent.com/", "https://media.githubusercontent.com/media/"
GSM8K = GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
MATH = LFS + "openai/prm800k/7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits/"
ZH = GITHUB + "deepseek-ai/DeepSeek-Math/b8b0f8ce093d80bf8e9a641e44142f06d092c305/evaluation/datasets/"
DOWNLOADS = {   # problems and split: address, SHA-256; the last two get the Chinese request
    "gsm8k train": (GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k test": (GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "math train": (MATH + "train.jsonl", "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076"),
    "math test": (MATH + "test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
    "cmath test": (ZH + "cmath/test.jsonl", "cabe17c127c3227912b3384f4755e180f3aa0d9e5865677e7e5e223439bf15eb"),
    "mgsm_zh test": (ZH +"mgsm_zh/mgsm_zh.jsonl", "165c3b6753e8a8786183c27b9af7b7590d54dca4d0136edadb24d684c95bb50d")}
CHINESE_REQUEST = "请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。"

def arithmetic(name, split):
    """The built-in problems: chains like "7+5-4+3", always the same. Where two or more terms are left, a line of the
    solution takes one ("7+5=12") four times in ten, and is right, else two ("7+5-4=9"), and is off by up to 3.
    """
    longest, largest = map(int, f"{name}-6-12".split("-")[1:3])   # 6-12 if not named: terms; largest true total
    count, held_out, terms = ARITHMETIC_SPLITS[split]
    rng, problems, most = random.Random(f"arithmetic {split}"), [], largest * 3 // 4   # most: the largest term
    while len(problems) < count:
        numbers = [rng.randint(1, most)]   # such as 7, +5, -4, +3
        for _ in range(rng.choice(terms(longest)) - 1):
            low, high = max(-most, -sum(numbers)), min(most, largest - sum(numbers))
            numbers.append(rng.choice([d for d in range(low, high + 1) if d]))
        question = str(numbers[0]) + "".join(f"{d:+d}" for d in numbers[1:])
        # A fifth of all questions, by a hash of their text, is held out from training in every split.
        if (hashlib.sha256(question.encode()).digest()[0] % 5 == 0) != held_out:
            continue
        total, rest, solution = numbers[0], numbers[1:], ""
        while rest:
            take = 1 if len(rest) == 1 or rng.random() < 0.4 else 2
            line, total = str(total) + "".join(f"{d:+d}" for d in rest[:take]), total + sum(rest[:take])
            total = total if take == 1 else min(max(total + rng.randint(-3, 3), 0), largest)
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
    except Exception as error:   # no network, no room, a wrong checksum
        raise InputError(f"{name} could not be fetched ({error}); put {url} at {path} by hand")
    return path

def read_problems(path):
    """Problems of a file of JSON lines: question (or problem), answer ("2", or "work #### 2"). Or InputError."""
    problems = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            if not line.strip(b"\xef\xbb\xbf \t\r"):   # blank, but perhaps for a byte order mark
                continue
            row = json.loads(line.decode("utf-8-sig"))
            # In the published sets the question may also be messages[0].content, the answer "golden".
            question = row.get("question") or row.get("problem") or row.get("messages", [{}])[0].get("content")
            answer = row.get("answer", row.get("golden"))
            if not isinstance(question, str) or not question.strip() or isinstance(answer, (bool, list)):
                raise ValueError("no question, or an answer that is neither text nor a number")
            f"{question}{answer}".encode()   # half a character, "\\ud83d", is an error here
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise InputError(f'{path}, line {number}: want {{"question": "1+1?", "answer": "2"}}, found: {error}')
        # Of worked text as in GSM8K drop the calculator notes, <<48/2=24>>, and mark the answer as we ask for it.
        gold, work = final_answer(answer), re.sub(r"<<[^<>]*>>", "", str(answer).rpartition("#### ")[0])
        problems.append(Problem(question, gold, f"{work}\\boxed{{{gold}}}" if work and gold else "", line=number))
    lines = [problem.line for problem in problems if not is_equivalent(problem.answer, problem.answer)]
    if len(lines) == len(problems):
        raise InputError(f"{path} is empty or has no answers; each of its lines should hold a question and an answer")
    if lines:
        print(f"{path}: no reward for {len(lines)} of {len(problems)} questions, lines {lines[:9]}: answer unusable")
    return problems

def load_problems(name, split, request=None, ask=""):
    """Problems of a split of a set, all of a file, or only `ask`; request: None for the usual one. Or InputError."""
    if ask:
        problems = [Problem(ask, "")]
    elif (key := f"{name} {split}".replace("math500", "math")) in DOWNLOADS:   # math500 is the test set of math
        problems = read_problems(fetch(*DOWNLOADS[key], f"{key.replace(' ', '-')}.jsonl"))
    elif is_arithmetic(name) and split in ARITHMETIC_SPLITS:
        problems = arithmetic(name, split)
    elif Path(name).is_file():
        problems = read_problems(name)
    else:
        raise InputError(f"no {name} {split}: take a file, {', '.join(DOWNLOADS)}, or in, out, sft, train of "
                         "arithmetic or arithmetic-LONGEST-LARGEST, 6 to 29 terms and totals of 12 to 99")
    usual = "" if is_arithmetic(name) else CHINESE_REQUEST if name in ("cmath", "mgsm_zh") else MATH_REQUEST
    return [problem._replace(request=usual if request is None else request) for problem in problems]
# --- 2. Models and prompts --------------------------------------------------------------------------
def pick_device(name):
    """(torch.device, whether to use bf16 on it) for "auto", "cpu" or "cuda". Raises InputError."""
    cuda = torch.cuda.is_available() and name != "cpu"
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not cuda):
        raise InputError(f"--device {name} cannot be used here; take cpu, or cuda with a GPU (no MPS)")
    torch.use_deterministic_algorithms(not cuda)   # else threads of a CPU add up gradients in any order
    return torch.device("cuda" if cuda else "cpu"), cuda and torch.cuda.get_device_capability() >= (8, 0)

def load_model(name, device):
    """(model in float32, tokenizer) of a folder or hub name. Raises InputError if GRPO cannot train it."""
    try:
        wrong = "no folder or hub name to load"   # what an exception from here on means
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        # TRAP: with dropout, train() is another policy than eval() (test_dropout_of_gpt2_is_off_too).
        for settings in map(vars, (config, config.get_text_config())):
            settings |= {k: 0.0 for k, x in settings.items() if isinstance(x, float) and re.search("drop|jitter", k)}
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
        model = model.to(device).eval()
        if not cache_gap(model) < 1e-2:
            raise ValueError(f"log-probs with and without KV cache differ by {cache_gap(model):.2g}")
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
    TRAP: a chat model ends a turn with another token than a document (test_end_of_turn_is_an_eos).
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
    return [bos, *itertools.dropwhile(lambda token: token == bos, ids)] if wanted else ids

def fitting(model, tokenizer, problems, max_new_tokens):
    """The problems whose prompts and completions fit into the model's positions. Raises InputError if none does."""
    room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf) - max_new_tokens
    fits = [len(build_prompt(tokenizer, problem)) <= room for problem in problems]
    lines = [problem.line for problem, fit in zip(problems, fits) if not fit]
    limit = f"the {room} tokens that --max-new-tokens {max_new_tokens} leaves of the model's context"
    if len(lines) == len(problems):
        raise InputError(f"no prompt fits into {limit}: lower it")
    if lines:
        print(f"skipped {len(lines)} of {len(problems)} questions, longer than {limit}, first in lines {lines[:9]}")
    return [problem for problem, fit in zip(problems, fits) if fit]

def pad(tokenizer, rows, side, device):
    """Lists of token ids as tensors (n, longest): ids, and mask, a bool; side: "left" for prompts, else "right"."""
    padded = tokenizer.pad({"input_ids": rows}, padding_side=side, return_attention_mask=True, return_tensors="pt")
    return padded.input_ids.to(device), padded.attention_mask.bool().to(device)

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
    """95% interval (low, high) of a mean; scores: one in [0, 1] per question, as samples of one are not independent.
    Wilson's if all are 0 or 1 (8 of 10: 0.490 to 0.943) or all are equal, else mean +- 1.96 standard errors.
    """
    n, mean, z = len(scores), fmean(scores), 1.96
    if set(scores) <= {0, 1} or len(set(scores)) == 1:
        centre, scale, square = mean + z * z / (2 * n), 1 + z * z / n, mean * (1 - mean) / n + (z / (2 * n)) ** 2
    else:
        centre, scale, square = mean, 1, fmean((score - mean) ** 2 for score in scores) / (n - 1)
    return max(0.0, (centre - z * math.sqrt(square)) / scale), min(1.0, (centre + z * math.sqrt(square)) / scale)

def pass_at_k(right, k):
    """Unbiased estimate, from n samples of which c are right, that one of k is: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(len(right) - int(sum(right)), k) / math.comb(len(right), k)

def maj_at_k(answers, gold, k):
    """How often the most frequent of k answers (None abstains; of a tie, the first) is right, over n // k batches."""
    batches = [[vote for vote in answers[i:i + k] if vote] for i in range(0, len(answers) - k + 1, k)]
    winners = [max(votes, key=lambda one: sum(is_equivalent(one, other) for other in votes), default="")
               for votes in batches]
    return fmean(is_equivalent(winner, gold) for winner in winners)

def compare(paths):
    """Two files that this script wrote about the same problems: a line of text for each measure. Or InputError."""
    try:
        files = [json.loads(Path(path).read_text()) for path in paths]
        questions, (before, after) = [file["questions"] for file in files], [file["measures"] for file in files]
        if questions[0] != questions[1]:
            raise ValueError("they are about different problems")
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"--compare wants two JSON files that eval.py wrote: {error}")
    lines = []
    for name in [name for name in before if name in after]:
        change = [b - a for a, b in zip(before[name], after[name])]
        n, mean, up, down = len(change), fmean(change), sum(c > 0 for c in change), sum(c < 0 for c in change)
        half = 1.96 * math.sqrt(fmean((c - mean) ** 2 for c in change) / max(1, n - 1))
        # McNemar's exact test, right or wrong: how likely a split at least as uneven is, if changes are coin tosses.
        p = min(1.0, 2 * sum(math.comb(up + down, i) for i in range(min(up, down) + 1)) / 2 ** (up + down))
        lines.append(f"{name:<8} {fmean(before[name]):.3f} -> {fmean(after[name]):.3f}: {mean:+.3f}, 95% interval "
                     f"{mean - half:+.3f} to {mean + half:+.3f}")
        if {*before[name], *after[name]} <= {0, 1}:
            lines[-1] += f"; {up} of {n} questions better, {down} worse: p = {p:.2g}"
    return "\n".join(lines)

def evaluate(model, tokenizer, problems, max_new_tokens, samples=8, temperature=1.0, seed=0,
             sample_tokens=SAMPLE_TOKENS):
    """Accuracy of a greedy completion and K = `samples` samples a problem, from the same random numbers each time.
    Returns scores: n; greedy, sampled (mean of K), maj@k and pass@k (k = 1, 2, 4 ... K), with their intervals; shares
    of flexible (last number right), truncated, unparsable. Records: a dict a completion. Measures: one a question.
    """
    scores, records, measures = {"n": len(problems)}, {}, {}
    for kind, K, T in [("greedy", 1, 0.0)] + ([("sampled", samples, temperature)] if samples else []):
        *_, drawn, texts = sample_problems(model, tokenizer, problems, K, max_new_tokens, T, sample_tokens,
                                           torch.Generator(model.device).manual_seed(seed))
        graded = records.setdefault(kind, [])
        for i, text in enumerate(texts):
            (question, gold, *_), answer = problems[i // K], extract_answer(text)
            right, numbers = accuracy_reward(text, gold), re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-2000:])
            graded.append({"question": question, "gold": gold, "completion": text, "answer": answer,
                           "verdict": "right" if right else "unparsable" if answer is None else "wrong",
                           "right": right, "truncated": drawn.truncated[i].item(), "unparsable": answer is None,
                           "flexible": is_equivalent(numbers[-1].rstrip(","), gold) if numbers else False})
        groups = [graded[i:i + K] for i in range(0, len(graded), K)]
        measures[kind] = [fmean(row["right"] for row in g) for g in groups]
        if kind == "sampled":
            for k in sorted({K, *(2 ** i for i in range(K.bit_length()))}):
                measures[f"maj@{k}"] = [maj_at_k([row["answer"] for row in g], g[0]["gold"], k) for g in groups]
                measures[f"pass@{k}"] = [pass_at_k([row["right"] for row in g], k) for g in groups]
        for share in ("flexible", "truncated", "unparsable"):
            scores[f"{kind}_{share}"] = fmean(row[share] for row in graded)
    for name, values in measures.items():
        scores[name], scores[f"{name}_interval"] = fmean(values), interval(values)
    return scores, records, measures

def score_table(scores):
    """The scores of `evaluate`, a line each: first the shares without an interval, then the accuracies."""
    lines = [f"n = {scores['n']:<16}   share  95% interval"]
    for key in [key for key, value in scores.items() if isinstance(value, float)]:
        span = "  {:>6.1%} - {:.1%}".format(*scores[f"{key}_interval"]) if f"{key}_interval" in scores else ""
        lines.append(f"{key.replace('_', ', '):<20}{scores[key]:>8.1%}{span}")
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
    except (InputError, ModuleNotFoundError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}" + (f"; pip install {error.name}" if hasattr(error, "name") else ""))
    except KeyboardInterrupt:
        sys.exit(130)

def main(argv):
    parser = Parser(prog="eval.py", description="Measure how well a model solves problems.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required="--compare" not in argv, help="folder (a run of train.py, say) or hub name")
    add("--problems", default="", help="as in train.py, or math500, cmath, mgsm_zh (default: a run's own)")
    add("--split", help="arithmetic: in, out, train, sft; others: test, train (default: first); file: all, even seen")
    add("--limit", type=int, default=0, help="take only the first LIMIT problems (default: all)")
    add("--samples", type=int, default=8, help="samples per problem beside the greedy one (default: 8)")
    add("--temperature", type=float, default=1.0, help="of the samples (default: 1.0)")
    add("--max-new-tokens", type=int, default=512, help="limit of a completion in tokens (default: a run's own; 512)")
    add("--request", help="what follows each question (default: a run's own; as usual for the problems)")
    add("--sample-tokens", type=int, default=SAMPLE_TOKENS, help="tokens in the KV cache; fewer need less memory")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--ask", metavar="QUESTION", help="print the greedy answer to this question, then stop")
    add("--compare", nargs=2, metavar="FILE", help="compare two files that eval.py wrote, then stop")
    add("--out", help="JSON file to write (default: runs/eval-<problems>-<date>-<time>.json)")
    args = parser.parse_args(argv)
    if args.compare:
        return print(compare(args.compare))
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):   # most models are no run of train.py
        run = json.loads(Path(args.model, "run.json").read_text())["config"]
        args = parser.parse_args(argv, argparse.Namespace(max_new_tokens=run["max_new_tokens"],
            request=run["request"], problems=run["eval_problems"].partition(",")[0] or run["problems"]))
    if not (args.problems or args.ask):
        parser.error(f"--problems or --ask is required: {args.model} has no run.json of train.py to take them from")
    if min(args.limit, args.samples, args.max_new_tokens - 1) < 0 or not 0 < args.temperature < math.inf:
        raise InputError("--limit, --samples must be at least 0, --max-new-tokens 1, --temperature above 0")
    out = Path(args.out or f"runs/eval-{Path(args.problems).stem}-" + time.strftime("%Y%m%d-%H%M%S.json"))
    if out.exists():
        raise InputError(f"--out {out} exists, and nothing is overwritten: name another file")
    args.split = args.split or ("in" if is_arithmetic(args.problems) else "test")
    todo = load_problems(args.problems, args.split, args.request, args.ask)
    device, bf16 = pick_device(args.device)
    model, tokenizer = load_model(args.model, device)
    problems = fitting(model, tokenizer, todo[:args.limit or None], args.max_new_tokens)
    model = bf16_weights(model) if bf16 else model
    if args.ask:
        return print(*sample_problems(model, tokenizer, problems, 1, args.max_new_tokens, 0.0)[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    scores, records, measures = evaluate(model, tokenizer, problems, args.max_new_tokens, args.samples,
                                         args.temperature, args.seed, args.sample_tokens)
    print(f"{args.model} on {args.problems}\n{score_table(scores)}")
    for verdict, row in {row["verdict"]: row for rows in records.values() for row in rows}.items():   # one of each
        print(f"--- {verdict}: {row['question']}   (gold: {row['gold']})\n{row['completion']}")
    out.write_text(json.dumps(dict(arguments=vars(args), versions=VERSIONS, scores=scores, measures=measures,
                                   questions=[problem.question for problem in problems], records=records)))
    print(f"all of it has been written to {out}")

if __name__ == "__main__":
    run_cli(main)
