"""Problems, prompts, loading of models, accuracy, and eval.py as a command."""

import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
from statistics import fmean, stdev
from unittest.mock import Mock

import pytest
import torch
import transformers
from helpers import CHAT_TEMPLATE, SIZE, make_chat_model
from tokenizers.processors import TemplateProcessing

import eval as evaluation
import train
from eval import Problem, load_model, load_problems
from reward import MATH_REQUEST, InputError, extract_answer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A model that answers eight sums: half of the time right, else wrong or without a box."""
    model, tokenizer = train.make_tiny_model(0, CPU)
    worked = []
    for problem in load_problems("arithmetic", "in")[:8]:
        right = f"\\boxed{{{problem.answer}}}"
        for solution in (right, right, f"\\boxed{{{problem.answer}+1}}", problem.answer):
            worked.append(problem._replace(solution=solution))
    folder = tmp_path_factory.mktemp("eval")
    config = train.Config(sft_steps=40, sft_lr=4e-3)
    train.warm_up(model, tokenizer, worked, config, folder, contextlib.nullcontext())
    return folder / "sft"


def integers(text):
    return [int(number) for number in re.findall(r"[+-]?\d+", text)]


def test_built_in_problems_have_right_answers_and_no_held_out_question_is_trained_on():
    counts = {"sft": 30_000, "train": 10_000, "in": 1_000, "out": 1_000}
    lengths = {"sft": {2, 3, 4, 5, 6}, "train": {4, 5}, "in": {4, 5}, "out": {6}}
    questions = {}
    for split, count in counts.items():
        problems = load_problems("arithmetic", split)
        questions[split] = {problem.question for problem in problems}
        rows = [integers(question) for question in questions[split]]
        assert len(problems) == count
        assert {len(terms) for terms in rows} == lengths[split]
        assert set(itertools.chain(*rows)) == {*range(-9, 10)} - {0}
        assert set(itertools.chain(*map(itertools.accumulate, rows))) == {*range(13)}
        assert all(sum(integers(problem.question)) == int(problem.answer) for problem in problems)
    assert not (questions["in"] | questions["out"]) & (questions["train"] | questions["sft"])
    assert evaluation.make_arithmetic.__wrapped__("in") == load_problems("arithmetic", "in")


def test_the_corpus_has_two_habits():
    """One term is right, two are a guess. One solution in five, of each length, takes ones."""
    right = {1: [], 2: []}
    careful = {3: [], 4: [], 5: [], 6: []}  # by the number of terms
    for problem in load_problems("arithmetic", "sft")[:9000]:
        terms = integers(problem.question)
        *lines, boxed = problem.solution.split("\n")
        taken = []
        for line in lines:
            *numbers, result = integers(line.replace("=", " "))
            taken.append(len(numbers) - 1)
            right[taken[-1]].append(sum(numbers) == result)
        left = len(terms) - 1
        ones = [1] * left
        twos = [2] * (left // 2) + [1] * (left % 2)
        assert taken in (ones, twos)
        assert boxed == f"\\boxed{{{result}}}"
        if left > 1:
            careful[len(terms)].append(taken == ones)
    assert all(right[1])
    assert 0.1 < fmean(right[2]) < 0.25
    assert all(0.16 < fmean(share) < 0.24 for share in careful.values())


def test_problems_files_of_every_accepted_form(tmp_path, capsys):
    users = '{"role": "user", "content": "d"}, {"role": "user", "content": "x"}'
    lines = {  # a byte order mark, both ends of lines, blank lines; and what is read of each line
        '\ufeff{"question": "a", "answer": 2}\r': ("a", "2", "", 1),
        '\n{"problem": "b\u2028", "answer": 0.5, "level": null}\n \t': ("b\u2028", "0.5", "", 3),
        '{"question": "c", "answer": null, "golden": "3"}': ("c", "3", "", 5),
        f'{{"messages": [{{"role": "system"}}, {users}], "answer": "4"}}': ("d", "4", "", 6),
        '{"question": "e", "answer": "2 <<2>>d\\n#### 9"}': ("e", "9", "2 d\n\\boxed{9}", 7),
        '{"question": "é", "answer": 0, "golden": "7"}': ("é", "0", "", 8),
        '{"question": "f"}': ("f", "", "", 9),  # no completion can match this and the next ones
        '{"question": "g", "answer": "work\\n#### "}': ("g", "", "", 10),
        f'{{"question": "h", "answer": "{"1" * 401}"}}': ("h", "1" * 401, "", 11),
    }
    path = tmp_path / "forms.jsonl"
    path.write_bytes("\n".join(lines).encode())
    problems = load_problems(str(path), "any split")
    assert [(p.question, p.answer, p.solution, p.line) for p in problems] == [*lines.values()]
    assert problems[0].request == MATH_REQUEST
    assert load_problems(str(path), "", "Think.")[0].request == "Think."
    assert "3 answers can never match, as on lines [9, 10, 11]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gsm8k", "math", "cmath", "mgsm_zh"])
def test_published_sets_come_through_the_download(name, tmp_path, monkeypatch):
    source = tmp_path / "source.jsonl"
    source.write_text('{"question": "How many?", "answer": "3"}')
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    monkeypatch.setitem(evaluation.DOWNLOADS, f"{name} test", (source.as_uri(), sha256))
    request = evaluation.CHINESE_REQUEST if name in ("cmath", "mgsm_zh") else MATH_REQUEST
    for _ in range(2):  # the second time it comes from the cache
        assert load_problems(name, "test") == [Problem("How many?", "3", "", request, 1)]
        source.unlink(missing_ok=True)


def test_svamp_has_one_file_for_both_splits(tmp_path, monkeypatch):
    row = {"Body": "A pack has 8 pens. 3 are lost", "Question": "How many are left?"}
    row |= {"Equation": "( 8.0 - ( 2.0 + 1.0 ) )", "Answer": 5.0, "ID": "chal-1"}
    other = {"Body": "There is one.", "Question": "How many?", "Equation": "1.0", "Answer": 1.0}
    source = tmp_path / "SVAMP.json"
    source.write_text(json.dumps([row] * 700 + [other] * 300))
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    for split in ("train", "test"):
        monkeypatch.setitem(evaluation.DOWNLOADS, f"svamp {split}", (source.as_uri(), sha256))
    solution = "8 - ( 2 + 1 ) = 5\n\\boxed{5}"
    expected = Problem("A pack has 8 pens. 3 are lost. How many are left?", "5", solution)
    assert load_problems("svamp", "train", "") == [expected] * 700
    expected = Problem("There is one. How many?", "1", "1 = 1\n\\boxed{1}")
    assert load_problems("svamp", "test", "") == [expected] * 300


def test_each_address_of_a_download_names_a_commit():
    keys = "gsm8k train, gsm8k test, math train, math test, cmath test, mgsm_zh test, svamp train, "
    keys += "svamp test"
    assert ", ".join(evaluation.DOWNLOADS) == keys
    assert len({sha256 for _, sha256 in evaluation.DOWNLOADS.values()}) == 7
    for url, sha256 in evaluation.DOWNLOADS.values():
        assert re.fullmatch(
            r"https://\w+\.githubusercontent\.com/\S*/[0-9a-f]{40}/\S*\.jsonl?", url
        )
        assert re.fullmatch("[0-9a-f]{64}", sha256)


TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # a prompt by CHAT_TEMPLATE
TEMPLATES = [(None, "{}\n"), (CHAT_TEMPLATE, TURNS), ("{{ bos_token }}" + CHAT_TEMPLATE, TURNS)]


@pytest.mark.parametrize("template, turns", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_where_the_model_has_one(chat_folder, template, turns, adds_bos):
    """And prompts go through the chat template, if there is one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_folder, bos_token="<s>")
    if adds_bos:
        post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = post
    tokenizer.chat_template = template
    bos = "<s>" if adds_bos or "bos_token" in (template or "") else ""
    for request, text in (("Think.", "1+1?\nThink."), ("", "1+1?")):
        ids = evaluation.build_prompt(tokenizer, Problem("1+1?", "2", request=request))
        assert tokenizer.decode(ids) == bos + turns.format(text)


def test_end_of_turn_is_an_eos(chat_folder, tmp_path):
    """Here that of the tokenizer ends a document. A saved model names all its EOS."""
    model, tokenizer = load_model(str(chat_folder), CPU)
    end, document = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for template in (CHAT_TEMPLATE, CHAT_TEMPLATE.replace("<|im_end|>", "\n <|im_end|>")):
        tokenizer.chat_template = template
        assert evaluation.eos_token_ids(model, tokenizer) == {end, document}
    # A template that changes the answer does not tell what stands behind it.
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m.content", "m.content | lower")
    assert evaluation.eos_token_ids(model, tokenizer) == {document}
    tokenizer.chat_template = CHAT_TEMPLATE
    model.config.eos_token_id = 8
    model.generation_config = transformers.GenerationConfig(eos_token_id=[7, 9], top_k=5)
    assert evaluation.eos_token_ids(model, tokenizer) == {end, document, 7, 8, 9}
    evaluation.save_model(model, tokenizer, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == sorted({end, document, 7, 8, 9})
    assert "top_k" not in saved


def test_padding_is_the_first_token_of_its_row():
    for side, padded in (("left", [5, 5, 5, 6]), ("right", [5, 6, 5, 5])):
        ids, mask = evaluation.pad_rows([[5, 6], [7, 8, 9, 10]], side, CPU)
        assert ids.tolist() == [padded, [7, 8, 9, 10]]
        assert ids[mask].tolist() == [5, 6, 7, 8, 9, 10]


def test_dropout_of_gpt2_is_off_too(tmp_path, chat_folder):
    """And a tokenizer that has no pad token gets one."""
    config = transformers.GPT2Config(
        vocab_size=400, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = torch.arange(10)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


INTERVALS = [
    ([1.0] * 8 + [0.0] * 2, 0.490, 0.943),  # Wilson's
    ([0.0] * 10, 0.0, 0.278),
    ([1.0] * 660 + [0.0] * 659, 0.473, 0.527),  # GSM8K: 2.7 points up and down
    # Of these the standard deviation is sqrt(0.125 / 3) = 0.204, half of it is the standard error,
    # and Student's t, for 3 degrees of freedom, is 3.182.
    ([0.25, 0.75, 0.5, 0.5], 0.175, 0.825),
    ([0.5, 0.5], 0.095, 0.905),  # all equal, which is no reason to be sure
    ([0.01, 0.99], 0.0, 1.0),
]


def test_known_values_give_the_known_interval():
    for values, low, high in INTERVALS:
        assert evaluation.interval(values) == pytest.approx((low, high), abs=6e-4)


# t for n - 1 degrees of freedom and 97.5%, from a printed table.
STUDENTS_T = {2: 12.706, 3: 4.303, 5: 2.776, 6: 2.571, 9: 2.306, 10: 2.262, 12: 2.201, 31: 2.042}


def test_students_t_is_that_of_the_tables():
    for n, t in STUDENTS_T.items():
        assert evaluation.students_t(n) == pytest.approx(t, abs=6e-4)
    assert evaluation.students_t(10**6) == pytest.approx(1.960, abs=6e-4)


def test_a_mean_of_few_values_is_in_its_interval_as_often_as_is_said():
    """Shares of 8 samples, of questions that are easy or hard: 95% of the intervals hold 1/2."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        chances = [rng.betavariate(2, 2) for _ in range(5)]
        low, high = evaluation.interval(
            [sum(rng.random() < p for _ in range(8)) / 8 for p in chances]
        )
        held += low <= 0.5 <= high
    assert held / 2000 > 0.93


VOTES = [
    (["18", "18", "17"], 3, 1.0),
    (["17", "18", "18.0"], 3, 1.0),  # equivalent answers vote together
    ([None, None, "18"], 3, 1.0),  # None abstains
    ([None], 1, 0.0),
    (["1", "18"], 2, 0.0),  # of equally frequent ones the first counts
    (["18", "18", "17", "17", "18", "17", "18"], 2, 2 / 3),  # the last one is left out
    (["18", "18", "17", "17", "18", "17", "18"], 3, 1 / 2),
]


def test_the_most_frequent_answer_wins():
    for answers, k, score in VOTES:
        assert evaluation.maj_at_k(answers, "18", k) == pytest.approx(score)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for c, k in itertools.product(range(7), range(1, 7)):
        right = [1.0] * c + [0.0] * (6 - c)
        share = fmean(max(subset) for subset in itertools.combinations(right, k))
        assert evaluation.pass_at_k(right, k) == pytest.approx(share)


def test_scores_of_known_texts():
    """Two problems, four samples of each; the shares by hand."""
    texts = ["\\boxed{2}", "\\boxed{2}", "\\boxed{9}", "2", "\\boxed{5}", "=5,", "x", "\\boxed{4}"]
    problems = [Problem("1+1", "2")] * 4 + [Problem("2+2", "4")] * 4
    rows = [*map(evaluation.grade, problems, texts, [False] * 6 + [True, False])]
    verdicts = "right right wrong unparsable wrong unparsable unparsable right"
    assert " ".join(row["verdict"] for row in rows) == verdicts
    assert [row["flexible"] for row in rows] == [True, True, False, True] + [False] * 3 + [True]
    assert [row["truncated"] for row in rows].index(True) == 6
    measures = evaluation.vote([rows[:4], rows[4:]], 4)
    # Of the six pairs of the first four samples one has no right one; of the second four, three.
    expected = {"maj@1": [2 / 4, 1 / 4], "maj@2": [1 / 2, 1 / 2], "maj@4": [1, 0]}
    expected |= {"pass@1": [2 / 4, 1 / 4], "pass@2": [1 - 1 / 6, 1 - 3 / 6], "pass@4": [1, 1]}
    assert measures == expected
    assert [*evaluation.vote([rows[:3]], 3)][::2] == ["maj@1", "maj@2", "maj@3"]
    assert evaluation.grade(Problem("q", "-1024.5"), "3, -1,024.5, done", False)["flexible"]


def test_two_evaluations_are_compared_question_by_question(tmp_path, capsys):
    """The p-value by brute force: all outcomes of the coins of the questions that changed."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for up, down in ((3, 0), (0, 4), (5, 2), (4, 4), (9, 1), (0, 0)):
        before = [0] * up + [1] * down + [1, 0]
        after = [1] * up + [0] * down + [1, 0]
        n = up + down + 2
        for path, greedy, sampled in zip(paths, (before, after), (0.5, 0.75), strict=True):
            measures = {"sampled": [sampled] * n, "greedy": greedy}
            path.write_text(json.dumps({"questions": [*range(n)], "measures": measures}))
        evaluation.main(["--compare", *map(str, paths)])
        sampled, greedy = capsys.readouterr().out.splitlines()
        assert sampled == "sampled  0.500 -> 0.750: +0.250"  # all alike: no interval, no p
        mean = (up - down) / n
        half = STUDENTS_T[n] * stdev([1] * up + [-1] * down + [0, 0]) / n**0.5
        tosses = itertools.product((0, 1), repeat=up + down)
        p = fmean(abs(sum(toss) * 2 - up - down) >= abs(up - down) for toss in tosses)
        expected = f": {mean:+.3f}"
        if up + down:
            expected += f", 95% interval {max(-1, mean - half):+.3f} to {min(1, mean + half):+.3f}"
        expected += f"; {up} of {n} questions better, {down} worse: p = {p:.2g}"
        assert greedy == f"greedy   {fmean(before):.3f} -> {fmean(after):.3f}{expected}"


def test_rows_at_once_cuts_the_work_and_changes_no_greedy_completion(sums):
    model, tokenizer = load_model(str(sums), CPU)
    problems = load_problems("arithmetic", "in")[:5]
    shapes = []

    def note(module, args, options):
        shapes.append(options["input_ids"].shape)

    model.register_forward_pre_hook(note, with_kwargs=True)
    expected = None
    for limit, prompts in ((512, [5]), (8, [2, 2, 1]), (3, [1] * 10), (1, [1] * 20)):
        shapes.clear()  # 4 rows per problem: of 3 and 1, if they must be 3
        *_, texts = evaluation.sample_problems(model, tokenizer, problems, 4, 5, 0.0, limit)
        assert [n for n, length in shapes if length > 1] == prompts
        assert max(n for n, _ in shapes) <= limit
        expected = expected or texts
        assert texts == expected


def run_eval(model, folder, *flags):
    """Evaluate a model on eight sums, three samples of each, and return what was written."""
    out = folder / f"{len([*folder.iterdir()])}.json"
    usual = f"--model {model} --out {out} --problems arithmetic --limit 8 --samples 3 --device cpu"
    evaluation.main([*usual.split(), "--max-new-tokens", "5", *flags])
    return json.loads(out.read_text())


def test_eval_prints_a_table_and_transcripts_and_writes_json(sums, tmp_path, capsys):
    result = run_eval(sums, tmp_path)
    printed = capsys.readouterr().out
    scores = result["scores"]
    assert scores["n"] == len(result["questions"]) == 8
    for name, values in result["measures"].items():
        assert scores[name] == pytest.approx(fmean(values))
        assert f"\n{name:<20}{scores[name]:>8.1%}  " in printed
    for kind, count in (("greedy", 1), ("sampled", 3)):
        rows = result["records"][kind]
        assert len(rows) == 8 * count
        assert [row["question"] for row in rows[::count]] == result["questions"]
        assert scores[kind] == pytest.approx(fmean(row["right"] for row in rows))
        for share in ("flexible", "truncated", "unparsable"):
            assert scores[f"{kind}_{share}"] == pytest.approx(fmean(row[share] for row in rows))
    for text in ("\nsampled, flexible  ", "\n--- right: ", "\n--- wrong: ", "\n--- unparsable: "):
        assert text in printed
    assert run_eval(sums, tmp_path)["records"] == result["records"]  # it repeats itself
    with pytest.raises(InputError, match="exists, and nothing is overwritten"):
        run_eval(sums, tmp_path, "--out", str(tmp_path / "0.json"))


def test_a_run_is_evaluated_as_it_was_trained(sums, story_file, tmp_path, monkeypatch, capsys):
    """What run.json says fills in what is not given: held-out problems rather than its own."""
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(sums, tmp_path / "run")
    config = {"problems": "arithmetic", "eval_problems": f"{story_file},gsm8k", "threads": 1}
    config |= {"request": "7+5=12", "max_new_tokens": 6}
    (run / "run.json").write_text(json.dumps({"config": config}))
    torch.set_num_threads(2)
    evaluation.main(f"--model {run} --limit 2 --samples 1 --device cpu".split())
    assert torch.get_num_threads() == 1
    (path,) = (tmp_path / "runs").glob("eval-stories-*.json")
    arguments = json.loads(path.read_text())["arguments"]
    expected = {"problems": str(story_file), "split": "test", "request": "7+5=12"}
    assert arguments == arguments | expected | {"max_new_tokens": 6}
    evaluation.main(f"--model {run} --ask 7+5-4 --device cpu".split())
    asked = [Problem("7+5-4", "", request="7+5=12")]
    *_, texts = evaluation.sample_problems(*load_model(str(run), CPU), asked, 1, 6, 0.0)
    assert capsys.readouterr().out.endswith(f"/{path.name}\n{texts[0]}\n")
    assert [*(tmp_path / "runs").iterdir()] == [path]  # a question writes nothing


def test_questions_that_are_too_long_are_skipped_and_counted(chat_folder, capsys):
    model, tokenizer = load_model(str(chat_folder), CPU)  # with a context of 1024 tokens
    problems = [Problem("pens " * n, "1") for n in (2, 9000, 3, 9000)]
    assert evaluation.drop_long_problems(model, tokenizer, problems, 100) == problems[::2]
    assert "skipped 2 of 4 questions: with --max-new-tokens" in capsys.readouterr().out
    longest = len(evaluation.build_prompt(tokenizer, problems[2]))
    for limit, count in ((1024 - longest, 2), (1025 - longest, 1)):
        assert len(evaluation.drop_long_problems(model, tokenizer, problems, limit)) == count


def test_a_place_that_cannot_be_written_is_found_before_the_work(sums, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=AssertionError))
    flags = f"--model {sums} --problems arithmetic --limit 2 --out"
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x.json")
    for name in ("file/x.json", "link"):
        with pytest.raises(OSError, match=name.partition("/")[0]):
            evaluation.main([*flags.split(), str(tmp_path / name)])


def test_a_model_that_has_diverged_is_not_scored(sums):
    model, tokenizer = load_model(str(sums), CPU)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="log-probs are inf or nan"):
        evaluation.evaluate(model, tokenizer, load_problems("arithmetic", "in")[:2], 3, 0)


def test_solutions_that_are_too_long_are_skipped_and_counted(chat_folder, capsys):
    model, tokenizer = load_model(str(chat_folder), CPU)
    room = model.config.max_position_embeddings - len(
        evaluation.build_prompt(tokenizer, Problem("1+1?", "2"))
    )
    one = tokenizer("7", add_special_tokens=False).input_ids
    assert len(tokenizer("7" * 9, add_special_tokens=False).input_ids) == 9 * len(one)
    fits, exceeds = (Problem("1+1?", "2", "7" * (room - less)) for less in (1, 0))  # and the EOS
    assert evaluation.drop_long_problems(model, tokenizer, [exceeds, fits]) == [fits]
    assert "skipped 1 of 2 questions" in capsys.readouterr().out


def test_losses_of_routers_are_off(tmp_path, chat_folder):
    """A mixture of experts that returns router logits cannot do so beside a cache."""
    folder = shutil.copytree(chat_folder, tmp_path / "mixture")
    config = transformers.MixtralConfig(
        **SIZE | {"vocab_size": 400}, num_local_experts=4, output_router_logits=True
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, _ = load_model(str(folder), CPU)
    assert model.config.output_router_logits is False


def test_a_thought_that_the_prompt_opened(tmp_path):
    """A completion that does not close it says so; where the prompt opens none, nothing changes."""
    for opened in ("", "<think>\n"):
        template = CHAT_TEMPLATE + opened
        path = make_chat_model(tmp_path / f"model{len(opened)}", chat_template=template)
        model, tokenizer = load_model(str(path), CPU)
        asked = [Problem("1+1?", "2")]
        *_, texts = evaluation.sample_problems(model, tokenizer, asked, 2, 6, 0.0)
        assert all(text.endswith("<think>") == bool(opened) for text in texts)
    assert extract_answer(r"\boxed{2} and so<think>") is None


def test_attention_of_cudnn_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    evaluation.pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    try:
        assert evaluation.pick_device("auto") == (torch.device("cuda"), False)
        assert evaluation.pick_device("auto", precision="bf16") == (torch.device("cuda"), True)
    finally:
        evaluation.pick_device("cpu")  # sums in a fixed order again


def test_a_slow_tokenizer_is_refused():
    tokenizer = Mock(is_fast=False, eos_token_id=1)
    tokenizer.return_value.input_ids = [2]
    with pytest.raises(ValueError, match="a slow one"):
        evaluation.check_tokenizer(tokenizer)
