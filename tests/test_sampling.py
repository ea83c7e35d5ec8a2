"""Grouped sampling and log-probabilities, on small models of four architectures."""

import copy

import pytest
import torch

from transformers.cache_utils import DynamicLayer

import grpo
from adapters import (
    bf16_weights,
    cache_gap,
    head_is_plain,
    micro_batches,
    sample_groups,
    sample_token,
    score_rows,
    token_logprobs,
)
from helpers import DEVICE, generator, tiny_model

EOS, PAD = [2, 3], 0  # two ids that end a completion


def rescore(model, prompts, samples, temperature, group_size=1):
    ids, mask = (x.repeat_interleave(group_size, dim=0) for x in prompts)
    return token_logprobs(model, ids, mask, samples.completion_ids, samples.mask, temperature)


def test_samples_have_the_promised_shapes(llama, prompts):
    samples = sample_groups(llama, *prompts, 4, 20, EOS, PAD, generator=generator(0))
    N, T = samples.completion_ids.shape
    assert (N, T) == (12, 20)
    assert samples.mask.shape == samples.logp.shape == (N, T) and samples.truncated.shape == (N,)
    assert (
        samples.mask.dtype == samples.truncated.dtype == torch.bool
        and samples.logp.dtype == torch.float32
    )
    for ids, mask, logp, truncated in zip(*samples):
        length = mask.sum().item()
        assert mask.tolist() == [True] * length + [False] * (T - length)
        ended = ids[length - 1].item() in EOS
        assert truncated.item() != ended and (length == 20) >= truncated.item()
        assert not set(ids[: length - 1].tolist()) & set(EOS)  # nothing before the end is an EOS
        assert ids[length:].tolist() == [PAD] * (T - length) and logp[length:].tolist() == [0.0] * (
            T - length
        )
        assert (logp[:length] < 0).all()


def assert_equal_tokens(samples, expected):
    """generate() stops with its longest row, our samples are max_new_tokens wide: what is beyond must be padding."""
    width = expected.shape[1]
    assert (
        torch.equal(samples.completion_ids[:, :width], expected)
        and (samples.completion_ids[:, width:] == PAD).all()
    )


@pytest.mark.parametrize("max_new_tokens", [1, 25])
def test_greedy_equals_generate_token_by_token(any_model, prompts, max_new_tokens):
    ids, mask = prompts
    greedy = any_model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]
    samples = sample_groups(any_model, ids, mask, 2, max_new_tokens, EOS, PAD, temperature=0)
    assert_equal_tokens(samples, greedy.repeat_interleave(2, dim=0))


def test_greedy_equals_generate_when_rows_end_at_different_times(prompts):
    """Makes sure that the case above is met: every token that greedy decoding meets is an EOS once."""
    model, (ids, mask), lengths = tiny_model("llama"), prompts, set()
    for eos in range(3, 40):
        greedy = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
        samples = sample_groups(model, ids, mask, 1, 12, [eos], PAD, temperature=0)
        assert_equal_tokens(samples, greedy)
        lengths.add(tuple(samples.mask.sum(dim=1).tolist()))
    assert any(len(set(rows)) == 3 for rows in lengths)  # three rows, three lengths


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rescored_logprobs_equal_the_samplers(any_model, prompts, temperature):
    samples = sample_groups(any_model, *prompts, 8, 20, EOS, PAD, temperature, generator(0))
    logp, entropy = rescore(any_model, prompts, samples, temperature, group_size=8)
    assert samples.mask.sum(dim=1).unique().numel() > 2  # several lengths
    torch.testing.assert_close(
        logp,
        samples.logp,
        rtol=0,
        atol=1e-4,
        msg=lambda text: (
            f"log pi(o_t | q, o_<t), that of softmax(logits / {temperature}), differs from what it was sampled with\n{text}"
        ),
    )
    assert (
        (entropy[samples.mask] > 0).all()
        and not entropy[~samples.mask].any()
        and not entropy.requires_grad
    )


def test_logprobs_are_those_of_logits_over_temperature(llama, prompts):
    (ids, mask), T = prompts, 6
    completion = torch.randint(4, 40, (3, T), generator=generator(0))
    logp, entropy = token_logprobs(
        llama, ids, mask, completion, torch.ones(3, T).bool(), temperature=0.7
    )
    for row in range(3):  # each row alone, without padding, through the model as it is
        whole = torch.cat([ids[row][mask[row].bool()], completion[row]])
        logits = llama(input_ids=whole[None]).logits[0, -T - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, dim=-1)
        torch.testing.assert_close(
            logp[row], expected.gather(1, completion[row][:, None])[:, 0], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            entropy[row], -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5
        )


def test_left_padding_changes_nothing(any_model, prompts):
    ids, mask = prompts
    batch = sample_groups(any_model, ids, mask, 1, 15, EOS, PAD, temperature=0)
    for row in range(len(ids)):
        alone = sample_groups(
            any_model,
            ids[row : row + 1, mask[row].bool()],
            mask[row : row + 1, mask[row].bool()],
            1,
            15,
            EOS,
            PAD,
            temperature=0,
        )
        keep = alone.mask[0]
        T = keep.shape[0]
        assert torch.equal(batch.completion_ids[row, :T][keep], alone.completion_ids[0][keep])
        torch.testing.assert_close(batch.logp[row, :T], alone.logp[0], rtol=0, atol=1e-4)


def test_hostile_generation_config_is_ignored(prompts):
    plain, hostile = tiny_model("llama"), tiny_model("llama")
    for key, value in dict(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.01,
        repetition_penalty=5.0,
        min_p=0.9,
        max_new_tokens=2,
        eos_token_id=[7],
        num_beams=3,
        no_repeat_ngram_size=1,
    ).items():
        setattr(hostile.generation_config, key, value)
    draw = lambda model: sample_groups(model, *prompts, 8, 10, EOS, PAD, 1.0, generator(0))
    samples = draw(hostile)
    assert all(torch.equal(a, b) for a, b in zip(draw(plain), samples))
    assert (
        len({tuple(row) for row in samples.completion_ids[:8].tolist()}) > 4
    )  # a group is not all alike
    torch.testing.assert_close(
        rescore(hostile, prompts, samples, 1.0, 8)[0], samples.logp, rtol=0, atol=1e-4
    )


def test_samples_follow_the_distribution(llama):
    """20,000 first tokens against softmax(logits / T)."""
    ids = torch.tensor([[5, 6, 7]])
    samples = sample_groups(llama, ids, torch.ones_like(ids), 20_000, 1, [], PAD, 0.7, generator(0))
    expected = (llama(input_ids=ids).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(samples.completion_ids[:, 0], minlength=40) / 20_000
    assert (found - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5
    assert samples.truncated.all()


def test_greedy_logprobs_are_at_temperature_one(llama, prompts):
    samples = sample_groups(llama, *prompts, 1, 8, EOS, PAD, temperature=0)
    torch.testing.assert_close(
        rescore(llama, prompts, samples, 1.0)[0], samples.logp, rtol=0, atol=1e-4
    )


def test_rows_are_question_major(llama, prompts):
    samples = sample_groups(llama, *prompts, 4, 5, [], PAD, temperature=0)
    for group in samples.completion_ids.view(3, 4, 5):
        assert (group == group[0]).all()
    assert not torch.equal(samples.completion_ids[0], samples.completion_ids[4])


def test_prompts_go_through_once_and_ended_rows_leave(llama, prompts):
    shapes = []
    handle = llama.register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    samples = sample_groups(llama, *prompts, 8, 20, EOS, PAD, generator=generator(0))
    handle.remove()
    assert shapes[0] == (3, 5)  # B prompts, not B * G
    lengths = samples.mask.sum(dim=1)
    for t, shape in enumerate(shapes[1:]):
        assert shape == ((lengths > t + 1).sum().item(), 1)  # only rows with a token behind token t
    assert len(shapes) == lengths.max() and shapes[-1][0] < 24


@pytest.mark.parametrize("training", [True, False])
def test_the_cache_is_used_and_the_mode_restored(training, prompts):
    """Activation checkpointing in train() mode turns the KV cache off; sampling must not suffer from it."""
    model = tiny_model("llama").train(training)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    samples = sample_groups(model, *prompts, 4, 10, EOS, PAD, generator=generator(0))
    assert model.training == training
    torch.testing.assert_close(
        rescore(model, prompts, samples, 1.0, 4)[0], samples.logp, rtol=0, atol=1e-4
    )


def test_sampling_leaves_no_gradient_and_takes_its_randomness_from_the_generator(llama, prompts):
    rng_state = torch.get_rng_state if DEVICE.type == "cpu" else torch.cuda.get_rng_state
    state = rng_state()
    first, second = (
        sample_groups(llama, *prompts, 4, 10, EOS, PAD, generator=generator(3)) for _ in range(2)
    )
    assert torch.equal(first.completion_ids, second.completion_ids) and not first.logp.requires_grad
    assert torch.equal(state, rng_state())
    third = sample_groups(llama, *prompts, 4, 10, EOS, PAD, generator=generator(4))
    assert not torch.equal(first.completion_ids[:, :3], third.completion_ids[:, :3])


@pytest.mark.parametrize("arguments", [(0, 5, 1.0), (2, 0, 1.0), (2, 5, -1.0)])
def test_senseless_arguments_are_refused(llama, prompts, arguments):
    with pytest.raises(ValueError):
        sample_groups(llama, *prompts, arguments[0], arguments[1], EOS, PAD, arguments[2])


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_scoring_at_temperature_zero_is_refused(llama, prompts, temperature):
    samples = sample_groups(llama, *prompts, 1, 4, EOS, PAD, temperature=0)
    with pytest.raises(ValueError):
        rescore(llama, prompts, samples, temperature)


# --- The KV cache -----------------------------------------------------------------------------------


def test_the_cache_is_written_in_place(llama, prompts, monkeypatch):
    """Keys and values stay where they are from the first token to the last, and are those of the library's cache."""
    places, original = set(), grpo.PreallocatedLayer.update

    def spy(layer, *args, **kwargs):
        keys, values = original(layer, *args, **kwargs)
        places.add((keys.data_ptr(), values.data_ptr()))
        assert torch.equal(keys, layer.keys) and keys.shape[2] == layer.get_seq_length()
        return keys, values

    monkeypatch.setattr(grpo.PreallocatedLayer, "update", spy)
    samples = sample_groups(llama, *prompts, 8, 20, EOS, PAD, generator=generator(0))
    assert len(places) == len(llama.model.layers)  # one place a layer, never another
    monkeypatch.setattr(grpo, "PreallocatedLayer", lambda layer, max_new_tokens: layer)
    plain = sample_groups(llama, *prompts, 8, 20, EOS, PAD, generator=generator(0))
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], samples[:2]))
    torch.testing.assert_close(plain.logp, samples.logp, rtol=0, atol=1e-5)


def test_selected_rows_of_the_cache_are_those_asked_for():
    layer = DynamicLayer()
    keys, values = torch.randn(2, 6, 2, 5, 3, generator=generator(0)).unbind()
    layer.update(keys, values)
    layer, new = grpo.PreallocatedLayer(layer, 4), torch.ones(6, 2, 1, 3)
    layer.update(new, -new)
    for rows in ([0, 5, 2, 4], [3, 1], [1]):  # each counts in what the one before has left
        layer.batch_select_indices(torch.tensor(rows, dtype=torch.long))
        keys, values = keys[rows], values[rows]
        assert torch.equal(layer.keys[:, :, :5], keys) and torch.equal(
            layer.values[:, :, :5], values
        )
        assert (
            (layer.keys[:, :, 5] == 1).all()
            and (layer.values[:, :, 5] == -1).all()
            and layer.get_seq_length() == 6
        )


def test_impossible_tokens_are_never_drawn():
    """Drawing goes by the running sum of p, which must not stop at a token of p = 0, whatever the random number."""
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 8, 30]] = torch.tensor([0.0, 1.0, 2.0])
    assert (
        sample_token(logits * torch.nan, 1.0)[1].isnan().all()
    )  # an error later on, not an index out of range
    token, logp = sample_token(logits.expand(20_000, -1), 1.0, generator(0))
    assert set(token.tolist()) == {7, 8, 30} and logp.isfinite().all()
    for u, expected in ((0.0, 30), (1 - 2**-24, 7)):  # the ends of what torch.rand gives
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, u))
            assert sample_token(logits, 1.0)[0].tolist() == [expected]
            rounded = torch.randn(200, 1000, generator=generator(0))  # sums a little off 1
            rounded[:, -1] = -torch.inf
            assert sample_token(rounded, 1.0)[1].isfinite().all()


# --- Prompts once a group ---------------------------------------------------------------------------


def scored(model, prompts, samples, question, shared):
    """log-probs, entropies and all gradients of rows that answer prompts[question]: prompts once, or one for each row."""
    ids, mask = prompts
    model.zero_grad()
    logp, entropy = (
        token_logprobs(model, ids, mask, samples.completion_ids, samples.mask, 0.8, question)
        if shared
        else token_logprobs(
            model, ids[question], mask[question], samples.completion_ids, samples.mask, 0.8
        )
    )
    (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
    return [logp.detach(), entropy] + [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_new_tokens", [1, 12])
def test_a_prompt_scored_once_equals_a_prompt_for_each_completion(any_model, max_new_tokens):
    """Value and gradient; groups cut in any way, in any order. Only GPT-2 computes all of it in float64 if asked."""
    model, tolerance = (
        (any_model.double(), 1e-9) if any_model.config.model_type == "gpt2" else (any_model, 1e-5)
    )
    ids = torch.randint(4, 40, (3, 12), generator=generator(0))  # longer than Gemma's window
    prompts = ids, (torch.arange(12) >= torch.tensor([[0], [5], [10]])).long()
    samples = sample_groups(model, *prompts, 4, max_new_tokens, EOS, PAD, generator=generator(0))
    rows = torch.tensor([9, 0, 5, 1, 8, 4, 2])
    for question, part in (
        (None, samples),
        (rows // 4, type(samples)(*(x[rows] for x in samples))),
    ):
        whole = torch.arange(12) // 4 if question is None else question
        apart = scored(model, prompts, part, whole, shared=False)
        for a, b in zip(scored(model, prompts, part, question, shared=True), apart):
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * b.abs().max().clamp(min=1).item()
            )


def test_each_prompt_goes_through_once(llama, prompts):
    samples = sample_groups(llama, *prompts, 4, 12, EOS, PAD, generator=generator(0))
    head_is_plain(llama)
    shapes = []
    llama.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    token_logprobs(llama, *prompts, samples.completion_ids, samples.mask, 1.0)
    assert shapes == [(3, 5), (12, 12)]


def test_activation_checkpointing_changes_nothing(prompts):
    model = tiny_model("gpt2").double()
    samples = sample_groups(model, *prompts, 4, 12, EOS, PAD, generator=generator(0))
    plain = scored(model, prompts, samples, None, shared=True)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for a, b in zip(scored(model.train(), prompts, samples, None, shared=True), plain):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# --- The vocabulary head ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, plain", [("llama", True), ("gpt2", True), ("cohere", False), ("gemma2", False)]
)
def test_which_heads_can_be_applied_by_hand(name, plain):
    assert head_is_plain(tiny_model(name)) is plain


def gradients(model, prompts, samples):
    model.zero_grad()
    logp, entropy = rescore(model, prompts, samples, 0.8, group_size=4)
    (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
    return logp.detach(), entropy, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_chunks_equal_the_whole(monkeypatch, prompts, chunk):
    """In float64, value and gradient, against the model's own logits."""
    model = tiny_model("llama").double()
    samples = sample_groups(model, *prompts, 4, 12, EOS, PAD, generator=generator(0))
    assert samples.logp.dtype == torch.float64
    monkeypatch.setattr(grpo, "HEAD_LOGITS", 40 * chunk)
    chunked = gradients(model, prompts, samples)
    model._head_is_plain = False
    whole = gradients(model, prompts, samples)
    for a, b in zip(chunked[:2] + tuple(chunked[2]), whole[:2] + tuple(whole[2])):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_only_tokens_that_count_reach_the_head_in_chunks(monkeypatch, llama, prompts):
    samples = sample_groups(llama, *prompts, 4, 12, EOS, PAD, generator=generator(0))
    head_is_plain(llama)
    sizes = []
    llama.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    monkeypatch.setattr(grpo, "HEAD_LOGITS", 40 * 10)
    with torch.no_grad():
        rescore(llama, prompts, samples, 1.0, group_size=4)
    assert max(sizes) <= 10 and sum(sizes) == samples.mask.sum()


@pytest.mark.parametrize("chunk, times", [(10, 2), (1000, 1)])
def test_logits_of_chunks_are_computed_again_instead_of_kept(
    monkeypatch, llama, prompts, chunk, times
):
    """With several chunks; one chunk alone is needed whole in the backward pass anyway."""
    samples = sample_groups(llama, *prompts, 4, 12, EOS, PAD, generator=generator(0))
    head_is_plain(llama)
    monkeypatch.setattr(grpo, "HEAD_LOGITS", 40 * chunk)
    sizes = []
    llama.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    rescore(llama, prompts, samples, 1.0, group_size=4)[0].sum().backward()
    assert sum(sizes) == times * samples.mask.sum()


def test_a_bf16_model_gives_float32_logprobs(llama, prompts):
    model = bf16_weights(copy.deepcopy(llama))
    samples = sample_groups(model, *prompts, 2, 8, EOS, PAD, generator=generator(0))
    logp, entropy = rescore(model, prompts, samples, 1.0, group_size=2)
    assert samples.logp.dtype == logp.dtype == entropy.dtype == torch.float32
    # Normalised in float32: the probabilities of all 40 tokens add up to 1 far better than bf16 could say.
    ids, mask = prompts
    every = torch.arange(40).view(40, 1)
    one = lambda x: x[:1].expand(40, -1)
    logp, _ = token_logprobs(model, one(ids), one(mask), every, torch.ones(40, 1).bool(), 1.0)
    assert abs(logp.exp().sum().item() - 1) < 1e-5


def test_rotary_frequencies_stay_float32(llama):
    model = bf16_weights(copy.deepcopy(llama))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(
        torch.equal(a, b) and a.dtype == torch.float32
        for a, b in zip(model.buffers(), llama.buffers())
    )
    assert list(llama.buffers())


def test_the_check_of_a_model_finds_no_gap(any_model):
    """Log-probs as sampled with a KV cache, and as scored without one."""
    assert 0 < cache_gap(any_model) < 1e-4


# --- Micro-batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 20, 50, 10_000])
def test_every_row_is_in_one_micro_batch(limit):
    g = generator(0)
    lengths = torch.randint(1, 30, (37, 1), generator=g)
    mask, prompt_mask = (
        torch.arange(30) < lengths,
        torch.arange(5) >= torch.randint(0, 5, (37, 1), generator=g),
    )
    cuts = micro_batches(range(37), prompt_mask.long(), mask, limit)
    assert sorted(row for cut in cuts for row in cut) == list(range(37))
    for cut in cuts:
        columns = (
            prompt_mask[cut].sum(1).max() + mask[cut].sum(1).max()
        )  # as many as go through the model
        assert len(cut) == 1 or len(cut) * columns <= limit


@pytest.mark.parametrize("limit", [1, 40, 90, 10_000])
def test_micro_batches_of_groups_are_as_large_as_the_limit_allows(limit):
    """12 groups of 3, and some rows left out."""
    g = generator(0)
    mask = torch.arange(30) < torch.randint(1, 30, (36, 1), generator=g)
    prompt_mask = torch.arange(8) >= torch.randint(0, 8, (12, 1), generator=g)
    rows = [row for row in range(36) if row % 5]
    cuts = micro_batches(rows, prompt_mask.long(), mask, limit)
    assert sorted(row for cut in cuts for row in cut) == rows

    def tokens(cut):
        return len(cut) * (
            mask[cut].sum(1).max() + prompt_mask[[row // 3 for row in cut]].sum(1).max()
        )

    assert all(len(cut) == 1 or tokens(cut) <= limit for cut in cuts)
    assert all(tokens(a + b[:1]) > limit for a, b in zip(cuts, cuts[1:]))


def test_rows_score_alone_as_in_the_batch(llama, prompts):
    """Rows of three questions, out of order: values, entropies and mask of the batch, less the columns of mere padding."""
    samples = sample_groups(llama, *prompts, 4, 20, EOS, PAD, generator=generator(0))
    whole = rescore(llama, prompts, samples, 0.7, group_size=4)
    for rows in ([7, 0, 2], [11], list(range(12))):
        logp, entropy, mask = score_rows(llama, rows, *prompts, *samples[:2], 0.7)
        width = samples.mask[rows].sum(dim=1).max()
        assert torch.equal(mask, samples.mask[rows, :width])
        torch.testing.assert_close(
            (logp, entropy), (whole[0][rows, :width], whole[1][rows, :width]), rtol=0, atol=1e-5
        )
