"""Rewards of steps, the learned reward model of Algorithm 1, and the other methods of the unified view."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import train
from adapters import (
    RewardModel,
    Samples,
    completion_mask,
    fit,
    outcome_advantages,
    process_advantages,
    score,
)
from eval import Problem, load_model
from helpers import make_chat_model, tiny_model
from train import Config, sample_and_score, step_ends

CPU = torch.device("cpu")
TINY = [
    "--questions",
    "3",
    "--eval-limit",
    "3",
    "--eval-samples",
    "1",
    "--show-every",
    "0",
    "--eval-every",
    "0",
]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- From characters to tokens ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One whose tokens hold several characters ("= 12.\n"), or a part of one (the bytes of a sign it has never seen)."""
    texts = ["3 * 4 = 12.\nThen 12 + 5 = 17.\n"] * 20
    return load_model(str(make_chat_model(tmp_path_factory.mktemp("bytes") / "model", texts)), CPU)[
        1
    ]


@pytest.mark.parametrize(
    "text",
    [
        "3 * 4 = 12.\nThen 12 + 5 = 17.\n\\boxed{17}",
        "一共3+4=7个。2+2=4。 é½…",
        "1+1=2",
        "2+2=4🙂。3+3=6",
        "3 * 4 = 12.\n\nThen 12 + 5 = 17.",
    ],
)
def test_a_step_ends_in_the_token_that_holds_its_last_character(text, byte_tokenizer):
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    lengths = [
        len(byte_tokenizer.decode(ids[:n]).rstrip("\ufffd")) for n in range(1, len(ids) + 1)
    ]  # whole characters
    for end in range(1, len(text) + 1):
        (place,) = step_ends(byte_tokenizer, ids, text, [end])
        assert place == next(n for n, length in enumerate(lengths) if length >= end)
    assert len(ids) != len(text) or text == "1+1=2"  # not one token a character


def test_bytes_that_hide_what_stands_before_them_do_not_move_the_end():
    """Llama 2's kind of tokenizer shows a run of bytes as nothing but U+FFFD until the last character of it is whole."""
    text = "2+2=4。很漂亮的孩子们学会了加法"
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"0123456789+=\n"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text and "4" not in tokenizer.decode(ids[5:-1])
    assert step_ends(tokenizer, ids, text, [5, 6, len(text)]) == [4, 7, len(ids) - 1]


def test_special_tokens_within_a_completion_do_not_shift_the_ends(byte_tokenizer):
    ids = byte_tokenizer("1+1=2", add_special_tokens=False).input_ids
    end = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    with_special = [end, *ids, end]
    text = byte_tokenizer.decode(with_special, skip_special_tokens=True)
    assert text == "1+1=2" and step_ends(byte_tokenizer, with_special, text, [5]) == [len(ids)]


# --- What a step earns ------------------------------------------------------------------------------

TEXTS = [
    "7+5=12\n12-4=8\n\\boxed{8}",
    "7+5=13\n13-4=9\n\\boxed{9}",
    "\\boxed{8}",
    "7+5-4=9\n\\boxed{9}",
]


def scripted(monkeypatch, config, texts=TEXTS, reward_model=None):
    """sample_and_score on completions of our own. Returns the batch and, for each completion, its pieces of text."""
    policy, tokenizer = train.make_tiny_model(train.Config(), CPU)
    rows = [tokenizer(text, add_special_tokens=False).input_ids + [1] for text in texts]
    ids = torch.tensor([row + [0] * (30 - len(row)) for row in rows])
    mask = completion_mask(ids, {1})
    prompt = tokenizer("<user>7+5-4<assistant>", add_special_tokens=False).input_ids
    problems = [Problem("7+5-4", "8")] * (len(texts) // config.group_size)
    prompt_ids = torch.tensor([[0, 0, *prompt]] * len(problems))
    monkeypatch.setattr(
        train,
        "sample_problems",
        lambda *_: (
            prompt_ids,
            prompt_ids > 0,
            Samples(ids, mask, torch.zeros(ids.shape), ~mask[:, -1]),
            texts,
        ),
    )
    run = SimpleNamespace(
        sampler=policy, reference=policy, tokenizer=tokenizer, reward_model=reward_model
    )
    return sample_and_score(run, problems, config), [
        [tokenizer.decode(i) for i in row] for row in rows
    ]


def test_process_supervision_rewards_each_step_up_to_its_end(monkeypatch):
    batch, pieces = scripted(monkeypatch, Config(group_size=4, supervision="process"))
    # Of the 8 entries 7+5=12, 12-4=8, boxed | 7+5=13, 13-4=9, boxed | boxed | 7+5-4=9, boxed these earn 1: 1 1 1 | 0 1 0 | 1 | 0 0
    earned, ends = [[1, 1, 1], [0, 1, 0], [1], [0, 0]], [[4, 10, 15], [4, 10, 15], [3], [6, 11]]
    for row, places in zip(pieces, ends):
        texts = ["".join(row[: place + 1]) for place in places]
        assert texts[-1].endswith("<end>") and all(
            text.endswith(("2", "3", "8", "9")) for text in texts[:-1]
        )
    flat = torch.tensor(sum(earned, []), dtype=torch.float32)
    normal = [((r - flat.mean()) / (flat.std() + 1e-4)).tolist() for r in map(torch.tensor, earned)]
    for i in range(4):
        expected = [sum(r for end, r in zip(ends[i], normal[i]) if end >= t) for t in range(30)]
        torch.testing.assert_close(batch.advantages[i], torch.tensor(expected), rtol=0, atol=1e-5)
    assert batch.rewards.tolist() == [[1, 0, 1, 0]]  # what is logged is the final answer


def test_outcome_supervision_and_the_indicator(monkeypatch):
    for config, expected in (
        (
            Config(group_size=2),
            outcome_advantages(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).flatten(),
        ),
        (Config(group_size=2, advantage="indicator"), torch.tensor([1.0, 0.0, 1.0, 0.0])),
        (Config(group_size=2, scale_rewards="none"), torch.tensor([0.5, -0.5, 0.5, -0.5])),
    ):
        batch, _ = scripted(monkeypatch, config)
        assert batch.advantages.shape == batch.mask.shape and torch.equal(
            batch.advantages, expected[:, None].expand(4, 30)
        )
    monkeypatch.setattr(
        train,
        "process_advantages",
        lambda *given: given[-1] == "none" and process_advantages(*given),
    )
    assert scripted(monkeypatch, Config(group_size=2, supervision="process", scale_rewards="none"))[
        0
    ].advantages.any()


def test_examples_hold_prompt_and_completion_and_the_verdict_of_the_rule(monkeypatch):
    for supervision, ends, labels in (
        ("outcome", [[15], [15], [3], [11]], [[1], [0], [1], [0]]),
        ("process", [[4, 10, 15], [4, 10, 15], [3], [6, 11]], [[1, 1, 1], [0, 1, 0], [1], [0, 0]]),
    ):
        model = RewardModel(train.make_tiny_model(train.Config(), CPU)[0])
        batch, pieces = scripted(
            monkeypatch,
            Config(group_size=4, supervision=supervision, reward="model"),
            reward_model=model,
        )
        for i, (ids, at, verdicts) in enumerate(batch.examples):
            prompt = batch.prompt_ids[0, 2:].tolist()  # without the padding
            assert ids == prompt + batch.completion_ids[i, : len(pieces[i])].tolist()
            assert [place - len(prompt) for place in at] == ends[i] and verdicts == labels[i]
        # Its probabilities stand in for the rule's verdicts.
        probabilities = score(model, batch.examples)
        assert batch.rewards.flatten().tolist() == pytest.approx([p[-1] for p in probabilities])
        assert len({len(p) for p in probabilities}) == (3 if supervision == "process" else 1)
        if supervision == "outcome":
            expected = outcome_advantages(batch.rewards).view(4, 1).expand(4, 30)
        else:
            padded = torch.tensor([p + [0.0] * (3 - len(p)) for p in probabilities])
            expected = process_advantages(
                padded, torch.tensor([e + [-1] * (3 - len(e)) for e in ends]), batch.mask, 4
            )
        torch.testing.assert_close(batch.advantages, expected)


# --- The reward model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "gemma2"])
def test_scores_do_not_depend_on_what_else_is_scored(name):
    model = RewardModel(tiny_model(name))
    examples = [
        ([5, 6, 7], [2], [1.0]),
        ([8, 9, 10, 11, 12, 13, 14], [3, 6], [0.0, 1.0]),
        ([20, 21], [0, 1], [1.0, 1.0]),
    ]
    together = score(model, examples)
    assert [len(p) for p in together] == [1, 2, 2] and all(
        0 < p < 1 for row in together for p in row
    )
    for example, expected in zip(examples, together):
        assert score(model, [example])[0] == pytest.approx(expected, abs=1e-5)
        assert score(model, [(*example[:2], [])])[0] == pytest.approx(
            expected, abs=1e-5
        )  # labels are not looked at
    for row, expected in zip(score(model, examples, size=2), together):
        assert row == pytest.approx(expected, abs=1e-5)
    ids, ends, _ = examples[1]  # a score knows nothing of what comes behind
    assert score(model, [(ids[:4], [3], [])])[0][0] == pytest.approx(together[1][0], abs=1e-5)


def test_the_reward_model_starts_as_the_policy_and_leaves_it_alone(llama):
    before = [p.detach().clone() for p in llama.parameters()]
    model = RewardModel(llama)
    assert all(
        torch.equal(a, b) for a, b in zip(model.body.parameters(), llama.base_model.parameters())
    )
    fit(model, [([5, 6, 7], [2], [1.0])] * 8, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters()))
    assert not torch.equal(next(model.body.parameters()), before[0])


def test_the_head_is_as_wide_as_the_states():
    """In OPT-350m they are narrower than config.hidden_size."""
    policy = OPTForCausalLM(
        OPTConfig(
            vocab_size=50,
            hidden_size=32,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    ).eval()
    assert len(score(RewardModel(policy), [([5, 6, 7], [0, 2], [])])[0]) == 2


def test_fit_learns_to_judge(llama):
    """Right is what holds token 7 up to there: something that generalises to sequences it has not seen."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def examples(n):
        rows = torch.randint(3, 12, (n, 9), generator=generator).tolist()
        return [(row, [4, 8], [float(7 in row[:5]), float(7 in row)]) for row in rows]

    model, unseen = RewardModel(llama), examples(200)
    agreement = lambda: (
        sum(
            (p > 0.5) == (label > 0.5)
            for probabilities, (_, _, labels) in zip(score(model, unseen), unseen)
            for p, label in zip(probabilities, labels)
        )
        / 400
    )
    before = agreement()
    fit(model, examples(400), lr=3e-3)
    assert before < 0.75 and agreement() > 0.9


def test_fit_uses_each_example_once_an_epoch(llama, monkeypatch):
    seen, original = [], RewardModel.forward
    monkeypatch.setattr(
        RewardModel,
        "forward",
        lambda self, batch: (seen.append([ids[0] for ids, _, _ in batch]), original(self, batch))[
            1
        ],
    )
    fit(RewardModel(llama), [([i, 4], [1], [1.0]) for i in range(10)], lr=1e-3, epochs=3, size=4)
    flat = sum(seen, [])
    assert [len(batch) for batch in seen] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert (
        all(sorted(flat[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
        and flat[:10] != flat[10:20]
    )


# --- Algorithm 1 with a reward model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def model_run(tmp_path_factory):
    """Two iterations, with what `fit` and `score` were given, and the state of the reward model around them."""
    out, calls = tmp_path_factory.mktemp("model") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train,
            "fit",
            lambda model, examples, lr, size, original=train.fit: (
                calls.append(
                    (
                        "fit",
                        list(examples),
                        (lr, size),
                        next(model.body.parameters()).detach().clone(),
                    )
                ),
                original(model, examples, lr, size=size),
            )[1],
        )
        patch.setattr(
            train,
            "score",
            lambda model, examples, original=train.score: (
                calls.append(("score", list(examples))),
                original(model, examples),
            )[1],
        )
        train.main(
            [
                *TINY,
                "--sft-steps",
                "60",
                "--steps",
                "4",
                "--iterations",
                "3",
                "--reward",
                "model",
                "--supervision",
                "process",
                "--reward-size",
                "60",
                "--group-size",
                "4",
                "--micro-tokens",
                "4096",
                "--out",
                str(out),
            ]
        )
    return out, calls


def test_the_reward_model_is_fitted_before_and_after_each_iteration_but_the_last(model_run):
    _, calls = model_run
    assert [kind for kind, *_ in calls] == ["fit"] + ["score"] * 4 + ["fit"] + ["score"] * 4 + [
        "fit"
    ] + ["score"] * 4
    assert {rest[1] for kind, *rest in calls if kind == "fit"} == {
        (1e-3, 2)
    }  # --micro-tokens 4096 is 2 x 2048


def test_one_in_ten_of_the_examples_of_a_retraining_is_old(model_run):
    out, calls = model_run
    state = torch.load(out / "checkpoints" / "12" / "state.pt", weights_only=True)
    assert (
        len(state["replay"]) == 60 + 48 + 48 and len(state["fresh"]) == 48
    )  # history goes back to the start
    fits = [examples for kind, examples, *_ in calls if kind == "fit"]
    sampled = [
        [
            example
            for kind, examples, *_ in calls[start : start + 5]
            if kind == "score"
            for example in examples
        ]
        for start in (1, 6)
    ]
    assert len(fits[0]) == 60  # the completions of the SFT model alone
    history = fits[0]
    for examples, new in zip(fits[1:], sampled):
        assert len(new) == 48 and examples[:48] == new  # all of the iteration before
        old = examples[48:]
        assert len(old) == 5 and all(
            example in history for example in old
        )  # 5 of 53, and never twice
        assert len({id(example) for example in old}) == 5
        history = history + new


def test_the_reward_model_starts_from_the_sft_model(model_run):
    out, calls = model_run
    policy, _ = load_model(str(out / "sft"), CPU)
    assert torch.equal(calls[0][3], next(policy.base_model.parameters()))


def test_the_log_says_how_often_model_and_rule_agree(model_run):
    out, calls = model_run
    rows, scored = rows_of(out)[1:], [examples for kind, examples, *_ in calls if kind == "score"]
    assert len(rows) == len(scored) == 12
    for row, examples in zip(rows, scored):
        assert row["right"] == pytest.approx(sum(labels[-1] for *_, labels in examples) / 12)
        assert (
            0 <= row["agree"] <= 1
            and abs(row["agree"] * 12 - round(row["agree"] * 12)) < 1e-3
            and 0 < row["reward"] < 1
        )


def test_the_first_fit_is_to_samples_of_the_sft_model_even_if_the_reference_writes_the_others(
    tmp_path, monkeypatch
):
    """At that moment the reference is still the model before the warm-up."""
    samplers, original = [], train.sample_problems
    monkeypatch.setattr(
        train,
        "sample_problems",
        lambda model, *rest: (
            samplers.append(next(model.parameters()).detach().clone()),
            original(model, *rest),
        )[1],
    )
    train.main(
        [
            *TINY,
            "--sft-steps",
            "2",
            "--steps",
            "1",
            "--reward",
            "model",
            "--reward-size",
            "20",
            "--sample-from",
            "reference",
            "--lr-warmup",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    policy, _ = load_model(str(tmp_path / "run" / "sft"), CPU)
    assert len(samplers) == 2 and all(
        torch.equal(weights, next(policy.parameters())) for weights in samplers
    )


def test_a_reward_model_that_has_diverged_is_found_before_the_update(tmp_path):
    with pytest.raises(
        FloatingPointError, match="inf or nan in the sampling of step 1.*lower --lr or --reward-lr"
    ):
        train.main(
            [
                *TINY,
                "--sft-steps",
                "2",
                "--steps",
                "2",
                "--reward",
                "model",
                "--reward-size",
                "40",
                "--reward-lr",
                "1e18",
                "--out",
                str(tmp_path / "run"),
            ]
        )


def test_agreement_is_that_of_the_verdicts_on_final_answers(tmp_path, monkeypatch, capsys):
    """Scores of our own: right for every second completion; the rule says so of the first quarter."""
    monkeypatch.setattr(train, "fit", lambda *_, **__: None)
    monkeypatch.setattr(
        train,
        "score",
        lambda model, examples: [
            [0.3] * (len(ends) - 1) + [0.9, 0.2][i % 2 :][:1]
            for i, (_, ends, _) in enumerate(examples)
        ],
    )
    monkeypatch.setattr(
        train,
        "score_texts",
        lambda reward, problems, texts: [float(i < len(texts) // 4) for i in range(len(texts))],
    )
    train.main(
        [
            *TINY,
            "--sft-steps",
            "0",
            "--steps",
            "1",
            "--reward",
            "model",
            "--group-size",
            "4",
            "--reward-size",
            "12",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    (row,) = rows_of(tmp_path / "run")[1:]
    # of 12: the rule 3 right; the model 0, 2, 4, ..., 10 right; they agree on 0, 2 (right) and 3, 5, 7, 9, 11 (wrong)
    assert (row["right"], row["reward"], row["agree"]) == pytest.approx((3 / 12, 0.55, 7 / 12))
    assert re.search(r" right +agree ", capsys.readouterr().out)


def test_a_run_without_a_reward_model_has_none(tmp_path, capsys):
    train.main([*TINY, "--sft-steps", "0", "--steps", "1", "--out", str(tmp_path / "run")])
    assert "agree" not in capsys.readouterr().out and {
        p.name for p in (tmp_path / "run" / "checkpoints" / "1").iterdir()
    } == {"policy.safetensors", "reference.safetensors", "state.pt"}


# --- RFT and Online RFT -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["reference", "policy"])
def test_rft_samples_from_the_reference_and_online_rft_from_the_policy(
    source, tmp_path, monkeypatch
):
    """Nothing of the reference moves within an iteration, and the loss knows no ratio, even in a second pass."""
    sampled, ratios, original = [], [], train.sample_problems
    monkeypatch.setattr(
        train,
        "sample_problems",
        lambda model, *rest: (
            sampled.append(torch.cat([p.detach().flatten() for p in model.parameters()])),
            original(model, *rest),
        )[1],
    )
    monkeypatch.setattr(
        train,
        "load_reward",
        lambda name: (
            lambda prompts, completions, answer: [float(len(text) % 2) for text in completions]
        ),
    )
    monkeypatch.setattr(
        train,
        "grpo_loss",
        lambda logp, logp_old, *rest, original=train.grpo_loss: (
            ratios.append((logp - logp_old).abs().max().item()),
            original(logp, logp_old, *rest),
        )[1],
    )
    train.main(
        [
            *TINY,
            "--sft-steps",
            "0",
            "--steps",
            "3",
            "--mu",
            "2",
            "--lr-warmup",
            "0",
            "--kl-beta",
            "0",
            "--advantage",
            "indicator",
            "--sample-from",
            source,
            "--out",
            str(tmp_path / "run"),
        ]
    )
    frozen = [torch.equal(sampled[0], weights) for weights in sampled]
    assert frozen == ([True] * 3 if source == "reference" else [True, False, False])
    assert all(ratio == 0 for ratio in ratios[::2]) and all(
        (ratio == 0) == (source == "reference") for ratio in ratios[1::2]
    )
    assert all(row["grad_norm"] > 0 for row in rows_of(tmp_path / "run")[1:])
