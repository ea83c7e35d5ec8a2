"""Rewards of steps, and the learned reward model of Algorithm 1."""

import contextlib
import copy
import random
import time

import pytest
import torch
from adapters import LearnedReward, Samples, accuracy_rewards, completion_mask, process_advantages
from helpers import make_chat_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import train
from eval import Problem

FLAGS = (
    "--questions 3 --group-size 4 --max-new-tokens 20 --steps 2 --sft-steps 0 --lr 1e-3 "
    "--lr-warmup 0 --eval-every 0 --show-every 0 --reward model"
)
TEXTS = [
    "7+5=12\n12-4=8\n\\boxed{8}",
    "7+5=13\n13-4=9\n\\boxed{9}",
    "\\boxed{8}",
    "7+5-4=9\n\\boxed{9}",
]
EARNED = [[1, 1, 1], [0, 1, 0], [1], [0, 0]]  # by each step, and by the answer
ENDS = [[4, 10, 15], [4, 10, 15], [3], [6, 11]]  # tokens: 7, +, 5, =, 12, "\n", 12, ... <end>
PROBLEMS = [Problem("7+5-4", "8", text) for text in TEXTS]


def settings(*flags):
    return train.parse_config([*FLAGS.split(), *" ".join(flags).split()])


def learned(policy, tokenizer, lr=1e-3, steps=False, kind=LearnedReward, bf16=False):
    torch.manual_seed(0)  # for the head
    return kind(policy, tokenizer, lr, 30, steps, bf16)


@pytest.fixture
def tiny():
    return train.make_tiny_model(0, torch.device("cpu"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The built-in model, taught to write one of TEXTS."""
    policy, tokenizer = train.make_tiny_model(0, torch.device("cpu"))
    folder = tmp_path_factory.mktemp("taught")
    config = settings("--sft-steps 40")
    train.warm_up(policy, tokenizer, PROBLEMS, config, folder, contextlib.nullcontext())
    return policy, tokenizer


# --- Rewards of steps: from characters to tokens ------------------------------------------------


@pytest.mark.parametrize("text", ["3*4 = 12.\nSo 17.", "一共3+4=7个。 é½…", "2+2=4🙂。3+3=6"])
def test_a_step_ends_in_the_token_that_holds_its_last_character(text, tmp_path):
    """Tokens hold several characters, "= 12.", or a part of one that was never seen."""
    folder = make_chat_model(tmp_path, ["3*4 = 12.\nSo 17.\n"] * 20)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = [len(tokenizer.decode(ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
    ends = range(1, len(text) + 1)
    expected = [sum(length < end for length in whole) for end in ends]
    assert train.step_ends(tokenizer, ids, ends) == expected
    # Special tokens are no part of the text, but shift its tokens.
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    places = train.step_ends(tokenizer, [special, *ids, special], ends)
    assert places == [place + 1 for place in expected]


def test_the_ends_of_steps_take_linear_time(chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    text = "3*4 = 12.\n" * 2000
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = range(10, len(text) + 1, 10)
    started = time.process_time()
    places = train.step_ends(tokenizer, ids, ends)
    assert time.process_time() - started < 1  # by decoding each prefix of 18,000 tokens: minutes
    assert len(set(places)) == len(ends)


def test_bytes_that_hide_what_stands_before_them_do_not_move_the_end():
    """Llama 2's tokenizer decodes a run of bytes to U+FFFD until its last character is whole."""
    text = "2+2=4。很漂亮的孩子们学会了加法"
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"0123456789+=\n"]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text and "4" not in tokenizer.decode(ids[5:-1])
    assert train.step_ends(tokenizer, ids, [5, 6, len(text)]) == [4, 7, len(ids) - 1]
    # Half a character between others, which the decoder's stream refuses, is passed over.
    ids = tokenizer("2+2=4\n5", add_special_tokens=False).input_ids
    half = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xF0>"])
    assert train.step_ends(tokenizer, [*ids[:5], *half, *ids[6:]], [5]) == [4]


def test_each_step_earns_what_it_deserves_at_the_token_that_ends_it(tiny):
    policy, tokenizer = tiny
    rows = [torch.tensor(tokenizer(text).input_ids + [1]) for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = completion_mask(ids, {1})
    samples = Samples(ids, mask, torch.zeros(ids.shape), ~mask.any(dim=1))
    questions = ["7+5-4"] * 4
    given = (tokenizer, samples, questions, TEXTS, [1.0, 0.0, 1.0, 0.0])
    rewards, ends = train.rewards_of_steps(*given, accuracy_rewards)
    assert [row[row >= 0].tolist() for row in ends] == ENDS
    assert [row[: len(e)].tolist() for row, e in zip(rewards, ENDS, strict=True)] == EARNED
    # A learned model judges each step by the text up to there.
    judge = learned(policy, tokenizer, steps=True)
    rewards, ends = train.rewards_of_steps(*given, judge)
    assert [row[row >= 0].tolist() for row in ends] == ENDS
    (part,) = judge(prompts=questions[:1], completions=["7+5=13\n13-4=9"], answer=["8"])
    assert rewards[1, 1].item() == pytest.approx(part, abs=1e-5)
    assert rewards[1, 2] == 0.0  # the outcome


@pytest.mark.parametrize("scale", ["std", "none"])
def test_process_supervision_credits_the_steps_of_what_was_sampled(scale, taught):
    config = settings("--supervision process --group-size 8 --scale-rewards", scale)
    torch.manual_seed(0)
    batch, texts, stats = train.sample_batch(*taught, PROBLEMS[:2], accuracy_rewards, config)
    assert sum(text in TEXTS for text in texts) > 8
    right = accuracy_rewards(None, texts, ["8"] * 16)
    given = (taught[1], batch, ["7+5-4"] * 16, texts, right, accuracy_rewards)
    expected = process_advantages(*train.rewards_of_steps(*given), batch.mask, 8, scale).float()
    assert torch.equal(batch.advantages, expected) and (expected != expected[:, :1]).any()
    assert stats["reward"] == pytest.approx(sum(right) / 16)


# --- The reward model ---------------------------------------------------------------------------


def test_a_judgement_does_not_depend_on_what_else_is_judged(tiny):
    judge = learned(*tiny)
    prompts = ["7+5-4", "1+1", "2+3", "7+5-4"]
    ends = [[6, 14, len(TEXTS[0])], [6], [8], [3, 5]]
    together = judge.judge(prompts, TEXTS, ends)
    cut = judge.judge(prompts, TEXTS, ends, size=3)
    for i, row in enumerate(together):
        assert cut[i] == pytest.approx(row, abs=1e-5)
        for end, right in zip(ends[i], row, strict=True):
            # It knows nothing of what comes behind.
            alone = judge(prompts=[prompts[i]], completions=[TEXTS[i][:end]], answer=["8"])
            assert alone == [pytest.approx(right, abs=1e-5)] and 0 < right < 1
    assert len({row[0] for row in together}) == 4


def test_it_is_asked_as_the_policy_is(tiny):
    policy, tokenizer = tiny
    judge = learned(policy, tokenizer)
    assert judge.frame("7+5") == "<user>7+5<assistant>"
    tokenizer.chat_template = None
    assert judge.frame("7+5") == "7+5\n"


def test_the_reward_model_starts_as_the_policy_and_leaves_it_alone(tiny):
    policy, tokenizer = tiny
    before = [p.detach().clone() for p in policy.parameters()]
    judge = learned(policy, tokenizer, lr=0.1)
    bodies = zip(judge.body.parameters(), policy.base_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in bodies)
    judge.fit([("7+5-4", text, "8") for text in TEXTS])
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert not torch.equal(next(judge.body.parameters()), before[0])


def test_the_head_is_as_wide_as_the_states(tiny):
    """In OPT-350m these are narrower than config.hidden_size."""
    size = {"hidden_size": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=111, ffn_dim=32, num_hidden_layers=1, **size)
    (right,) = learned(OPTForCausalLM(config), tiny[1])(["7+5"], ["12"], ["12"])
    assert 0 < right < 1


def test_a_fit_equals_a_naive_loop(tiny):
    """Each text once per epoch, eight per step; a rate that falls to 0; gradients cut to norm 1."""
    judges = [learned(*tiny, steps=True, lr=0.01).double() for _ in range(2)]
    cases = [(f"{i}", *case) for i in range(3) for case in zip(TEXTS, ENDS, EARNED, strict=True)]
    random.seed(0)
    judges[0].fit([(prompt, text, "8") for prompt, text, _, _ in cases])
    random.seed(0)
    order = [case for _ in range(3) for case in random.sample(cases, 12)]
    naive = judges[1]
    adam = torch.optim.AdamW(naive.parameters(), weight_decay=0.0)
    norms = []
    for i in range(0, 36, 8):
        losses = []
        for prompt, text, ends, earned in order[i : i + 8]:
            ids = tiny[1](f"<user>{prompt}<assistant>{text}").input_ids
            states = naive.body(input_ids=torch.tensor([ids])).last_hidden_state[0, 3:]
            for end, right in zip([*ends[:-1], ends[-1] - 1], earned, strict=True):  # no <end>
                logit = naive.head(states[end])
                losses.append(torch.log1p(torch.exp(-logit if right else logit)))
        (sum(losses) / len(losses)).backward()
        norms.append(sum(p.grad.square().sum().item() for p in naive.parameters()) ** 0.5)
        for p in naive.parameters():
            p.grad /= max(1.0, norms[-1])
        adam.param_groups[0]["lr"] = 0.01 * (1 - i / 36)
        adam.step()
        adam.zero_grad()
    assert max(norms) > 1
    for a, b in zip(judges[0].parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Checked(LearnedReward):
    """Compare all logits with those of a copy, whose weights nothing can have cast before."""

    def logits(self, rows):
        logits = super().logits(rows)
        torch.testing.assert_close(logits, LearnedReward.logits(copy.deepcopy(self), rows))
        return logits


def test_each_step_of_a_fit_sees_the_one_before(tiny):
    judge = learned(*tiny, lr=0.01, kind=Checked, bf16=True)
    judge.fresh = judge.replay = [(f"{i}", f"\\boxed{{{i}}}", "5") for i in range(10)]
    train.renew_reward(judge, None, None, None, None)
    assert len(judge.replay) == 20


def test_it_learns_to_judge(tiny):
    """Right is what holds the gold 5, also behind questions that it has not seen."""
    judge = learned(*tiny, lr=3e-3)
    texts = [(f"{i}+{i % 7}", f"\\boxed{{{4 + i % 3}}}", "5") for i in range(90)]
    judge.fit(texts[:60], epochs=9)
    prompts, completions, answer = zip(*texts[60:], strict=True)
    right = judge(prompts=prompts, completions=completions, answer=answer)
    assert all((right[i] > 0.5) == (i % 3 == 1) for i in range(30))


# --- Algorithm 1 with a reward model ------------------------------------------------------------


class Recorder(LearnedReward):
    """Keep what it was fitted to, and with which weights a fit began."""

    def fit(self, texts):
        state = self.body.state_dict()
        self.fits = [*getattr(self, "fits", []), (list(texts), state["norm.weight"].clone())]
        super().fit(texts, epochs=1)


def test_one_in_ten_of_the_examples_of_a_retraining_is_old(taught, tmp_path):
    """Before the first iteration 30 samples of the policy; then 24 of the last one, and 2 older."""
    policy, tokenizer = taught
    start = policy.model.norm.weight.detach().clone()
    other, _ = train.make_tiny_model(1, torch.device("cpu"))
    judge = learned(other, tokenizer, kind=Recorder)  # of size 30
    config = settings("--iterations 3")
    train.train(policy, tokenizer, PROBLEMS, [], {}, judge, config, tmp_path, lambda row: None)
    fits = [texts for texts, _ in judge.fits]
    assert torch.equal(judge.fits[0][1], start)
    assert [len(texts) for texts in fits] == [30, 24 + 2, 24 + 2] and len(judge.fresh) == 24
    assert all(text in fits[0] for text in fits[1][24:])
    assert all(text in fits[0] + fits[1][:24] for text in fits[2][24:])
    assert judge.replay == fits[0] + fits[1][:24] + fits[2][:24]
    # A checkpoint holds the texts, too.
    again = learned(other, tokenizer)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(saved["states"]["reward"])
    assert (again.fresh, again.replay) == (judge.fresh, judge.replay)
    assert again.judge(["1"], ["2"], [[1]]) == judge.judge(["1"], ["2"], [[1]])


class Every(LearnedReward):
    """Find every second completion right."""

    def forward(self, prompts, completions, answer):
        return [0.9, 0.2] * (len(completions) // 2)


def test_the_log_says_how_often_model_and_rule_agree(taught):
    torch.manual_seed(0)
    judge = learned(*taught, kind=Every)
    _, texts, stats = train.sample_batch(*taught, PROBLEMS[:3], judge, settings())
    right = ["boxed{8}" in text for text in texts]
    agree = sum(right[0::2]) + 6 - sum(right[1::2])
    assert 0 < sum(right) < 12 and 0 < agree < 12
    found = (stats["right"], stats["reward"], stats["agree"])
    assert found == pytest.approx((sum(right) / 12, 0.55, agree / 12))
