"""Problems, prompts, model loading, intervals, and eval.py as a command."""

import hashlib
import itertools
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

import eval as evaluation
import grpo
from eval import (
    CHINESE_REQUEST,
    DOWNLOADS,
    InputError,
    Problem,
    arithmetic,
    build_prompt,
    eos_token_ids,
    evaluate,
    fitting,
    interval,
    load_model,
    load_problems,
    maj_at_k,
    pad,
    pass_at_k,
    pick_device,
    read_problems,
)
from helpers import CHAT_TEMPLATE, make_chat_model
from reward import MATH_REQUEST, accuracy_reward

CPU = torch.device("cpu")


# --- Problems ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, longest, largest, most",
    [("arithmetic", 6, 12, 9), ("arithmetic-7-15", 7, 15, 11), ("arithmetic-29-99", 29, 99, 74)],
)
def test_built_in_problems_have_right_answers_and_stay_in_range(name, longest, largest, most):
    """The default, and harder ones. Each term and each total that is allowed comes up somewhere."""
    lengths = {
        "sft": range(2, longest + 1),
        "train": (longest - 2, longest - 1),
        "in": (longest - 2, longest - 1),
        "out": (longest,),
    }
    seen = {"terms": set(), "totals": set()}
    for split in (
        ("in", "out") if longest == 29 else ("in", "out", "train", "sft")
    ):  # the others take seconds
        problems = arithmetic(name, split)
        assert len(problems) >= 1000 and problems == arithmetic.__wrapped__(
            name, split
        )  # always the same
        found = set()
        for question, answer, solution, *_ in problems[:3000]:
            terms = [int(x) for x in re.findall(r"[+-]?\d+", question)]
            totals = list(itertools.accumulate(terms))
            assert totals[-1] == int(answer) and all(0 <= x <= largest for x in totals)
            found.add(len(terms))
            seen["terms"] |= set(terms)
            seen["totals"] |= set(totals)
        assert found == set(lengths[split])
    assert seen == {"terms": {*range(-most, most + 1)} - {0}, "totals": set(range(largest + 1))}


def test_the_name_of_the_built_in_problems_says_how_hard_they_are():
    assert (
        load_problems("arithmetic", "in")
        == load_problems("arithmetic-6-12", "in")
        != load_problems("arithmetic-6-13", "in")
    )
    assert (
        load_problems("arithmetic-9-40", "out")[0].request == ""
        and load_problems("arithmetic-9-40", "out", "Go!")[0].request == "Go!"
    )
    for name in (
        "arithmetic-5-12",
        "arithmetic-30-12",
        "arithmetic-6-11",
        "arithmetic-6-100",
        "arithmetic-6",
        "arithmetic-06-12",
        "arithmetic-6-12-1",
        "arithmetic-",
        "Arithmetic",
        "my-arithmetic-6-12",
    ):
        with pytest.raises(
            InputError, match=f"no {name} in: take .* 6 to 29 terms and totals of 12 to 99"
        ):
            load_problems(name, "in")


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-6-20", "arithmetic-9-30"])
def test_no_held_out_question_is_ever_trained_on(name):
    trained = {p.question for split in ("train", "sft") for p in arithmetic(name, split)}
    held_out = {p.question for split in ("in", "out") for p in arithmetic(name, split)}
    assert not trained & held_out and len(held_out) > 1500


def test_the_corpus_has_two_habits():
    """One term at a time: always right. Two at once: a guess. Four of ten lines that could be either are careful."""
    right, careful = {1: [], 2: []}, []
    for question, answer, solution, *_ in arithmetic("arithmetic", "sft")[:3000]:
        left = len(re.findall(r"[+-]", question))
        *lines, boxed = solution.split("\n")
        for line in lines:
            first, *terms = [int(x) for x in re.findall(r"[+-]?\d+", line.split("=")[0])]
            result = int(line.split("=")[1])
            right[len(terms)].append(first + sum(terms) == result)
            if left > 1:
                careful.append(len(terms) == 1)
            left -= len(terms)
        assert left == 0 and boxed == f"\\boxed{{{result}}}"
    assert all(right[1]) and 0.1 < sum(right[2]) / len(right[2]) < 0.25
    assert 0.37 < sum(careful) / len(careful) < 0.43


def test_problems_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '\ufeff{"question": "1+1?", "answer": 2}\r\n\n{"problem": "a\u2028b", "answer": "0"}\n'
        '{"question": "q", "answer": "He has 48/2 = <<48/2=24>>24.\\n#### 1,024", "level": 3}',
        "utf-8",
    )
    assert read_problems(path) == [
        Problem("1+1?", "2", line=1),
        Problem("a\u2028b", "0", line=3),
        Problem("q", "1,024", "He has 48/2 = 24.\n\\boxed{1,024}", line=4),
    ]
    assert accuracy_reward(read_problems(path)[2].solution, "1024") == 1.0
    assert load_problems(str(path), "any split") == [
        p._replace(request=MATH_REQUEST) for p in read_problems(path)
    ]
    assert load_problems(str(path), "", "Think.")[0].request == "Think."


def test_golds_that_no_completion_can_match_are_counted(tmp_path, capsys):
    path, answers = (
        tmp_path / "golds.jsonl",
        ["1", None, "", ".", "work\n#### ", "1" * 301, "1" * 401, r"\int_0^1 f", 0],
    )
    path.write_text(
        "".join(
            json.dumps({"question": f"q{i}", "answer": answer}) + "\n"
            for i, answer in enumerate(answers)
        )
    )
    problems = read_problems(path)
    assert all(
        problem.solution == "" for problem in problems
    )  # work without an answer is nothing to learn from
    assert [problem.answer for problem in problems][:5] == ["1", "", "", ".", ""] and len(
        problems
    ) == len(answers)
    paid = [accuracy_reward(f"\\boxed{{{problem.answer}}}", problem.answer) for problem in problems]
    assert paid == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert (
        f"{path}: no reward for 6 of 9 questions, lines [2, 3, 4, 5, 6, 7]: answer unusable"
        in capsys.readouterr().out
    )


# A line of each set as it is published, in words of our own.
PUBLISHED = {
    "gsm8k": ({"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 6"}, "How many?", "6"),
    "math": ({"problem": "Compute $1+1$.", "answer": "2", "level": 1}, "Compute $1+1$.", "2"),
    "math500": ({"problem": "Compute $1+1$.", "answer": "2", "level": 1}, "Compute $1+1$.", "2"),
    "cmath": (
        {"grade": 1, "question": "一加一？", "golden": "2", "reasoning_step": 1},
        "一加一？",
        "2",
    ),
    "mgsm_zh": (
        {
            "dataset": "mgsm-zh",
            "messages": [
                {"role": "user", "content": "一加二？"},
                {"role": "assistant", "content": ""},
            ],
            "answer": "3",
        },
        "一加二？",
        "3",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sets_come_through_the_download(name, tmp_path, monkeypatch):
    row, question, answer = PUBLISHED[name]
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path / "cache")
    key = "math" if name == "math500" else name  # MATH-500 is the test set of MATH
    monkeypatch.setitem(DOWNLOADS, f"{key} test", (source.as_uri(), sha256))
    for _ in "ab":  # the second time it comes from the cache
        (problem,) = load_problems(name, "test")
        assert (problem.question, problem.answer, problem.line) == (question, answer, 1)
        assert ("逐步推理" in problem.request) == (
            name in ("cmath", "mgsm_zh")
        ) and "\\boxed{}" in problem.request
        source.unlink(missing_ok=True)
    assert (tmp_path / "cache" / "minimal-grpo" / f"{key}-test.jsonl").exists()
    assert load_problems(name, "test", "Think.")[0].request == "Think."


def test_addresses_and_checksums_of_downloads():
    """A fixed commit in each address, and no two files are the same."""
    assert set(DOWNLOADS) == {
        "gsm8k train",
        "gsm8k test",
        "math train",
        "math test",
        "cmath test",
        "mgsm_zh test",
    }
    assert len(set(DOWNLOADS.values())) == 6
    for url, sha256 in DOWNLOADS.values():
        assert re.fullmatch(
            r"https://(raw|media)\.githubusercontent\.com/[^ ]*/[0-9a-f]{40}/[^ ]*\.jsonl", url
        )
        assert re.fullmatch("[0-9a-f]{64}", sha256)


# --- Prompts and models -----------------------------------------------------------------------------


def test_prompt_goes_through_the_chat_template(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    text = tokenizer.decode(build_prompt(tokenizer, Problem("1+1?", "2", request=MATH_REQUEST)))
    assert (
        text == f"<|im_start|>user\n1+1?\n{MATH_REQUEST}<|im_end|>\n<|im_start|>assistant\n"
    )  # no BOS: it has none
    assert "user\n1+1?<|im_end|>" in tokenizer.decode(build_prompt(tokenizer, Problem("1+1?", "2")))


def test_prompt_without_a_template_is_plain(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.chat_template = None
    assert (
        tokenizer.decode(build_prompt(tokenizer, Problem("1+1?", "2", request="Think.")))
        == "1+1?\nThink.\n"
    )


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_where_the_model_has_one(chat_folder, template, adds_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    tokenizer.chat_template = template
    ids = build_prompt(tokenizer, Problem("1+1?", "2", request="Think."))
    wanted = adds_bos or (template is not None and "bos_token" in template)
    assert ids.count(bos) == wanted and (not wanted or ids[0] == bos)


def test_prompts_are_padded_on_the_left(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    rows = [
        build_prompt(tokenizer, Problem(text, "2"))
        for text in ("1+1?", "How many pens has Ada now?")
    ]
    ids, mask = pad(tokenizer, rows, "left", CPU)
    assert mask[1].all() and not mask[0].all() and mask[0].tolist() == sorted(mask[0].tolist())
    assert [ids[i][mask[i].bool()].tolist() for i in (0, 1)] == rows
    ids, mask = pad(tokenizer, rows, "right", CPU)
    assert ids[0, : len(rows[0])].tolist() == rows[0] and mask[0].sum() == len(rows[0])


def test_end_of_turn_is_an_eos(chat_folder):
    model, tokenizer = load_model(str(chat_folder), CPU)
    im_end, endoftext = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert (
        tokenizer.eos_token_id == endoftext
    )  # the tokenizer alone would not know the end of a turn
    assert eos_token_ids(model, tokenizer) == {im_end, endoftext}
    model.generation_config.eos_token_id = [endoftext, 7]
    assert eos_token_ids(model, tokenizer) == {im_end, endoftext, 7}


def test_a_missing_pad_token_is_filled_in_and_dropout_is_off(tmp_path):
    folder = make_chat_model(tmp_path / "model", attention_dropout=0.5)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(str(folder), CPU)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = torch.arange(10)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_dropout_of_gpt2_is_off_too(tmp_path, chat_folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5)
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), CPU)
    ids = torch.arange(10)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_bf16_checkpoints_become_float32(tmp_path):
    folder = make_chat_model(tmp_path / "model")
    model, tokenizer = load_model(str(folder), CPU)
    model.bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load_model(str(folder), CPU)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertLMHeadModel(
            BertConfig(
                vocab_size=400,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
            )
        ),
        lambda: MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)),
    ],
    ids=["not causal", "no KV cache"],
)
def test_architectures_that_cannot_be_sampled_are_refused(tmp_path, chat_folder, model):
    model().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not run here"):
        load_model(str(tmp_path), CPU)


def test_the_sampler_is_checked_against_a_pass_without_a_cache(chat_folder, monkeypatch):
    """A model that forgets its padding behind a cache agrees with itself; only the other way gives it away."""

    def forgetful(model, ids, attention_mask, cache=None, original=grpo.forward, **options):
        return original(
            model,
            ids,
            torch.ones_like(attention_mask) if cache else attention_mask,
            cache,
            **options,
        )

    monkeypatch.setattr(grpo, "forward", forgetful)
    with pytest.raises(InputError, match="with and without KV cache differ"):
        load_model(str(chat_folder), CPU)


def test_scaled_heads_are_announced(tmp_path, chat_folder, capsys):
    from helpers import CONFIGS
    from transformers import AutoModelForCausalLM

    config = CONFIGS["cohere"]()
    config.vocab_size = 400
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(tmp_path)
    load_model(str(tmp_path), CPU)
    assert "log-probs not computed in chunks" in capsys.readouterr().out


def test_a_template_that_ends_the_turn_on_a_new_line(chat_folder):
    model, tokenizer = load_model(str(chat_folder), CPU)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "\n <|im_end|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in eos_token_ids(model, tokenizer)


def test_mps_is_refused():
    with pytest.raises(InputError, match="MPS"):
        pick_device("mps")
    assert pick_device("cpu") == (CPU, False)


# --- Accuracy ---------------------------------------------------------------------------------------


def test_known_counts_give_the_known_interval():
    close = lambda a, b: a == pytest.approx(b, abs=5e-4)
    assert close(interval([1.0] * 8 + [0.0] * 2), (0.490, 0.943))  # Wilson
    assert close(interval([0.0] * 10), (0.0, 0.278)) and close(interval([1.0] * 10), (0.722, 1.0))
    assert all(
        interval([0.0] * n)[0] >= 0 and interval([1.0] * n)[1] <= 1 for n in range(1, 300)
    )  # not -0.0%
    low, high = interval([1.0] * 660 + [0.0] * 659)  # GSM8K's test set: +-2.7 points
    assert close((high - low) / 2, 0.027)
    # means of several samples: sd of (0.25, 0.75, 0.5, 0.5) is 0.2041, standard error 0.1021
    assert close(interval([0.25, 0.75, 0.5, 0.5]), (0.5 - 0.2, 0.5 + 0.2))
    assert (
        interval([0.5])[0] < 0.2
        and interval([0.5, 0.5])[1] > 0.8
        and interval([0.01, 0.99])[0] >= 0
    )


@pytest.mark.parametrize(
    "answers, score",
    [
        (["18", "18", "17"], 1.0),
        (["17", "17", "18"], 0.0),
        (["17", "18", "18.0"], 1.0),
        ([None, None, "18"], 1.0),
        ([None], 0.0),
        (["1", "18"], 0.0),
        (["18", "1"], 1.0),
        (["18", "1,000", "1000"], 0.0),
    ],
)
def test_majority(answers, score):
    assert maj_at_k(answers, "18", len(answers)) == score


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            right = [1.0] * c + [0.0] * (n - c)
            for k in range(1, n + 1):
                subsets = [max(subset) for subset in itertools.combinations(right, k)]
                assert pass_at_k(right, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    "answers", [["18", "18.0", "17", None, "16", "17"], ["17", "17", "18", "18"], [None] * 3]
)
def test_maj_at_k_is_without_bias(answers):
    """Its mean over all orders of the samples is the mean of the vote over all draws of k of them."""
    orders = list(itertools.permutations(answers))
    for k in range(1, len(answers) + 1):
        votes = []
        for draw in itertools.permutations(answers, k):
            counts = Counter({"18.0": "18"}.get(answer, answer) for answer in draw if answer)
            votes.append(bool(counts) and counts.most_common(1)[0][0] == "18")
        mean = sum(maj_at_k(list(order), "18", k) for order in orders) / len(orders)
        assert mean == pytest.approx(sum(votes) / len(votes), abs=1e-9)


def test_maj_at_k_uses_every_whole_batch():
    answers = ["18", "18", "17", "17", "18", "17", "18"]
    assert maj_at_k(answers, "18", 2) == pytest.approx(2 / 3) and maj_at_k(answers, "18", 3) == 0.5
    assert maj_at_k(answers, "18", 7) == 1.0 and maj_at_k(answers, "18", 1) == pytest.approx(4 / 7)


def evaluation_file(path, **measures):
    path.write_text(
        json.dumps(
            {"questions": [f"q{i}" for i in range(len(measures["greedy"]))], "measures": measures}
        )
    )
    return str(path)


def test_two_evaluations_are_compared_question_by_question(tmp_path):
    before = evaluation_file(
        tmp_path / "a.json", greedy=[0, 0, 0, 0, 0, 0, 1, 1, 1, 0], sampled=[0.5] * 10, old=[1] * 10
    )
    after = evaluation_file(
        tmp_path / "b.json", greedy=[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], sampled=[0.5] * 9 + [0.75]
    )
    first, second = evaluation.compare([before, after]).splitlines()
    # 6 better, 1 worse of 7 that changed: P(X <= 1) = (1 + 7) / 128, on both sides 0.125.
    assert (
        "0.300 -> 0.800: +0.500" in first and "6 of 10 questions better, 1 worse: p = 0.12" in first
    )
    half = 1.96 * (sum((c - 0.5) ** 2 for c in [1] * 6 + [0, 0, -1, 0]) / 9 / 10) ** 0.5
    assert f"{0.5 - half:+.3f} to {0.5 + half:+.3f}" in first
    # Of means there is no p: most of them may rise while their mean falls.
    assert second.startswith("sampled  0.500 -> 0.525: +0.025") and "p =" not in second
    assert evaluation.compare([before, before]).splitlines()[0].endswith("p = 1")


def test_the_p_value_is_that_of_the_exact_test(tmp_path):
    """By brute force: all outcomes of the coins of the questions that changed."""
    for up, down in ((3, 0), (0, 4), (5, 2), (4, 4), (9, 1)):
        before = evaluation_file(tmp_path / "a.json", greedy=[0] * up + [1] * down + [1, 0])
        after = evaluation_file(tmp_path / "b.json", greedy=[1] * up + [0] * down + [1, 0])
        outcomes = [
            abs(sum(coins) * 2 - up - down) for coins in itertools.product((0, 1), repeat=up + down)
        ]
        p = sum(outcome >= abs(up - down) for outcome in outcomes) / len(outcomes)
        assert evaluation.compare([before, after]).endswith(f"p = {p:.2g}")


def test_only_evaluations_of_the_same_problems_are_compared(tmp_path):
    before, other = (
        evaluation_file(tmp_path / "a.json", greedy=[0, 1]),
        evaluation_file(tmp_path / "b.json", greedy=[0, 1, 1]),
    )
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(InputError, match="they are about different problems"):
        evaluation.compare([before, other])
    for name in "cde":
        with pytest.raises(InputError, match="--compare wants two JSON files that eval.py wrote"):
            evaluation.compare([before, str(tmp_path / f"{name}.json")])


def test_scores_add_up(llama, chat_folder):
    """evaluate() on a scripted sampler: 2 problems, greedy right and wrong, samples known."""
    model, tokenizer = load_model(str(chat_folder), CPU)
    script = iter(
        [
            ["\\boxed{2}", "it is 4"],
            ["\\boxed{2}", "\\boxed{2}", "\\boxed{9}", "2", "\\boxed{5}", "5", "x", "\\boxed{4}"],
        ]
    )

    def sample_problems(model, tokenizer, problems, K, *_):
        texts = next(script)
        assert len(texts) == K * len(problems)
        return (
            None,
            None,
            type("S", (), {"truncated": torch.tensor([t == "x" for t in texts])}),
            texts,
        )

    original, evaluation.sample_problems = evaluation.sample_problems, sample_problems
    try:
        scores, records, measures = evaluate(
            model, tokenizer, [Problem("1+1", "2"), Problem("2+2", "4")], 8, samples=4
        )
    finally:
        evaluation.sample_problems = original
    expected = {
        "n": 2,
        "greedy": 0.5,
        "sampled": (2 / 4 + 1 / 4) / 2,
        "maj@4": (1 + 0) / 2,
        "pass@4": 1.0,
        "maj@1": 3 / 8,
        "pass@1": 3 / 8,
        "pass@2": (1 - 1 / 6 + 1 / 2) / 2,
        "maj@2": 1 / 2,
        "greedy_flexible": 1.0,
        "greedy_truncated": 0,
        "greedy_unparsable": 0.5,
        "sampled_flexible": 4 / 8,
        "sampled_truncated": 1 / 8,
        "sampled_unparsable": 3 / 8,
    }
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert [r["right"] for r in records["sampled"]] == [1, 1, 0, 0, 0, 0, 0, 1]
    assert (
        measures["greedy"] == [1, 0]
        and measures["sampled"] == [0.5, 0.25]
        and measures["maj@2"] == [0.5, 0.5]
    )


@pytest.mark.parametrize(
    "sample_tokens, batches", [(10**6, [5]), (2 * 4 * 70, [2, 2, 1]), (1, [1] * 5)]
)
def test_as_many_groups_at_a_time_as_the_kv_cache_may_hold(
    sample_tokens, batches, chat_folder, story_file, monkeypatch
):
    model, tokenizer = load_model(str(chat_folder), CPU)
    problems, sizes, original = read_problems(story_file)[:5], [], evaluation.sample_groups

    def spy(model, prompt_ids, *rest):
        sizes.append(len(prompt_ids))
        return original(model, prompt_ids, *rest)

    monkeypatch.setattr(evaluation, "sample_groups", spy)
    sample = lambda temperature: evaluation.sample_problems(
        model,
        tokenizer,
        problems,
        4,
        8,
        temperature,
        sample_tokens,
        torch.Generator().manual_seed(0),
    )
    ids, mask, samples, texts = sample(1.0)
    assert (
        4 * 2 * (ids.shape[1] + 8) <= 2 * 4 * 70 < 4 * 3 * (ids.shape[1] + 8)
    )  # the second case holds two groups
    assert sizes == batches and samples.completion_ids.shape == (20, 8) and len(texts) == 20
    # whatever the batches: each completion belongs to its prompt
    logp, _ = grpo.token_logprobs(model, ids, mask, samples.completion_ids, samples.mask, 1.0)
    torch.testing.assert_close(logp, samples.logp, rtol=0, atol=1e-4)


def test_no_more_than_1024_rows_at_a_time(chat_folder, story_file, monkeypatch):
    """Whatever the KV cache may hold: each row has V logits."""
    (model, tokenizer), sizes, original = (
        load_model(str(chat_folder), CPU),
        [],
        evaluation.sample_groups,
    )
    monkeypatch.setattr(
        evaluation,
        "sample_groups",
        lambda model, ids, *rest: (sizes.append(len(ids)), original(model, ids, *rest))[1],
    )
    evaluation.sample_problems(model, tokenizer, read_problems(story_file)[:5], 500, 1, 1.0, 10**9)
    assert sizes == [2, 2, 1]


def test_evaluation_repeats_itself(chat_folder, story_file):
    model, tokenizer = load_model(str(chat_folder), CPU)
    first, second = (
        evaluate(model, tokenizer, read_problems(story_file)[:3], 6, samples=4) for _ in "ab"
    )
    assert first == second


def test_eval_prints_a_table_and_writes_json(
    chat_folder, story_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model",
        str(chat_folder),
        "--problems",
        str(story_file),
        "--limit",
        "5",
        "--samples",
        "2",
        "--max-new-tokens",
        "8",
    ]
    evaluation.main(arguments)
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in (
            "n = 5",
            "greedy",
            "sampled",
            "maj@2",
            "pass@2",
            "95% interval",
            "flexible",
            "truncated",
            "unparsable",
            "--- unparsable:",
        )
    )
    (path,) = (tmp_path / "runs").glob("eval-stories-*.json")
    written = json.loads(path.read_text())
    assert written["scores"]["n"] == 5 and len(written["records"]["sampled"]) == 10
    assert {"torch", "transformers", "python"} <= set(written["versions"]) and written["arguments"][
        "seed"
    ] == 0
    with pytest.raises(InputError, match="nothing is overwritten"):
        evaluation.main([*arguments, "--out", str(path)])


@pytest.mark.parametrize(
    "config, flags, expected",
    [
        (None, "", ("1+1", MATH_REQUEST, 512)),
        (None, "--request Now. --max-new-tokens 9", ("1+1", "Now.", 9)),
        (
            dict(problems="arithmetic", eval_problems="", request=None, max_new_tokens=7),
            "",
            ("1+1", "", 7),
        ),  # as in the run
        (
            dict(problems="arithmetic-9-40", eval_problems="", request=None, max_new_tokens=7),
            "",
            ("1+1", "", 7),
        ),
        (
            dict(problems="gsm8k", eval_problems="", request="Go!", max_new_tokens=7),
            "--max-new-tokens 8",
            ("1+1", "Go!", 8),
        ),
        (
            dict(problems="gsm8k", eval_problems="", request=None, max_new_tokens=7),
            "--problems cmath",
            ("1+1", CHINESE_REQUEST, 7),
        ),
    ],
)
def test_a_question_of_ones_own_is_asked_as_in_the_run(
    config, flags, expected, chat_folder, tmp_path, monkeypatch, capsys
):
    run, asked = shutil.copytree(chat_folder, tmp_path / "run"), []
    if config:
        (run / "run.json").write_text(json.dumps({"config": config}))
    monkeypatch.setattr(
        evaluation,
        "sample_problems",
        lambda model, tokenizer, problems, group, limit, temperature: (
            asked.append((problems[0].question, problems[0].request, limit)),
            (len(problems), group, temperature),
            ["the answer"],
        ),
    )
    evaluation.main(["--model", str(run), "--ask", "1+1", "--device", "cpu", *flags.split()])
    assert asked == [expected] and capsys.readouterr().out.endswith("the answer\n")


def test_a_question_of_ones_own_is_answered(chat_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation.main(f"--model {chat_folder} --ask 1+1 --max-new-tokens 5 --device cpu".split())
    *_, texts = evaluation.sample_problems(
        *load_model(str(chat_folder), CPU), [Problem("1+1", "", request=MATH_REQUEST)], 1, 5, 0.0
    )
    assert capsys.readouterr().out == texts[0] + "\n" and not list(
        tmp_path.iterdir()
    )  # nothing is written


def test_a_run_is_evaluated_as_it_was_trained(chat_folder, story_file, tmp_path, capsys):
    run = shutil.copytree(chat_folder, tmp_path / "run")
    for held_out, problems in (
        ("", str(story_file)),
        ("arithmetic,gsm8k", "arithmetic"),
    ):  # rather what was held out
        (run / "run.json").write_text(
            json.dumps(
                {
                    "config": dict(
                        problems=str(story_file),
                        eval_problems=held_out,
                        request="Go!",
                        max_new_tokens=6,
                    )
                }
            )
        )
        out = tmp_path / f"{problems == 'arithmetic'}.json"
        evaluation.main(f"--model {run} --limit 2 --samples 1 --out {out} --device cpu".split())
        arguments = json.loads(out.read_text())["arguments"]
        assert (arguments["problems"], arguments["request"], arguments["max_new_tokens"]) == (
            problems,
            "Go!",
            6,
        )
        assert arguments["split"] == ("in" if problems == "arithmetic" else "test")
    for broken in (
        "{",
        "[]",
        "{}",
        '{"config": {"problems": "gsm8k"}}',
    ):  # a run.json of somebody else's
        (run / "run.json").write_text(broken)
        with pytest.raises(InputError, match="--problems or --ask is required"):
            evaluation.main(["--model", str(run)])


def test_questions_that_are_too_long_are_skipped_and_counted(chat_folder, capsys):
    model, tokenizer = load_model(str(chat_folder), CPU)
    problems = [
        Problem("pens " * n, "1", line=line) for line, n in ((1, 2), (2, 9000), (4, 3), (5, 9000))
    ]
    assert fitting(model, tokenizer, problems, 100) == [problems[0], problems[2]]
    assert "skipped 2 of 4 questions, longer than the 924 tokens" in (
        printed := capsys.readouterr().out
    )
    assert (
        "that --max-new-tokens 100 leaves of the model's context, first in lines [2, 5]" in printed
    )
    longest = len(build_prompt(tokenizer, problems[2]))
    assert (
        len(fitting(model, tokenizer, problems, 1024 - longest)) == 2
        and len(fitting(model, tokenizer, problems, 1025 - longest)) == 1
    )
