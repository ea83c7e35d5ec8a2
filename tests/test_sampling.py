"""Grouped sampling, log-probs and the check of models, on small models of four architectures."""

import inspect
import itertools

import adapters
import pytest
import torch
import transformers
from helpers import DEVICE, SIZE, generator, tiny_model
from torch.distributions import Categorical
from torch.nn.functional import pad

import grpo
from eval import pad_rows

EOS = [2, 3]  # two ids that end a completion
PAD = 0


def sample(model, prompts, G=4, T=12, eos=EOS, temperature=1.0, seed=0):
    return adapters.sample_groups(model, *prompts, G, T, eos, PAD, temperature, generator(seed))


def score(model, prompts, samples, temperature=1.0, question=None):
    return adapters.token_logprobs(model, *prompts, *samples[:2], temperature, question)


def close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def limit_chunks(tokens, monkeypatch):
    """Let the head take so many tokens at once; V is 40. A course may have its own module."""
    function = inspect.unwrap(grpo.token_logprobs)
    monkeypatch.setitem(function.__globals__, "HEAD_LOGITS", 40 * tokens)


def input_shapes(module):
    """Return a list to which each forward pass of a module adds the shape of its input_ids."""
    shapes = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


# --- Sampling -----------------------------------------------------------------------------------


def test_samples_have_the_promised_shapes(llama, prompts):
    samples = sample(llama, prompts, T=20)
    assert [x.shape for x in samples] == [(12, 20), (12, 20), (12, 20), (12,)]
    assert [x.dtype for x in samples] == [torch.int64, torch.bool, torch.float32, torch.bool]
    assert torch.equal(samples.mask, adapters.completion_mask(samples.completion_ids, EOS))
    for ids, mask, logp, truncated in zip(*samples, strict=True):
        assert truncated == (not set(EOS) & set(ids.tolist()))
        assert (logp[mask] < 0).all() and (logp[~mask] == 0).all() and (ids[~mask] == PAD).all()
    assert 0 < samples.truncated.sum() < 12  # both kinds were met
    assert not sample(llama, prompts, T=1, eos=range(40)).truncated.any()  # ended by its last token


def test_greedy_equals_generate(any_model, prompts):
    """Rows are question-major, two per prompt here, and end at different times."""
    head = any_model.get_output_embeddings()  # tied to the input, some repeat one token for ever
    head.weight = torch.nn.Parameter(head.weight.detach().roll(7, dims=0))
    free = sample(any_model, prompts, 1, 25, eos=[], temperature=0).completion_ids
    pairs = itertools.combinations(free.unique().tolist(), 2)
    eos = next(e for e in pairs if len(adapters.completion_mask(free, e).sum(dim=1).unique()) == 3)
    for T, eos_ids in ((1, [40]), (25, [40]), (25, list(eos))):
        settings = dict(max_new_tokens=T, eos_token_id=eos_ids, pad_token_id=PAD, do_sample=False)
        expected = any_model.generate(prompts[0], attention_mask=prompts[1], **settings)[:, 5:]
        expected = pad(expected, (0, T - expected.shape[1]), value=PAD)  # it ends with its last row
        samples = sample(any_model, prompts, 2, T, eos_ids, temperature=0)
        assert torch.equal(samples.completion_ids, expected.repeat_interleave(2, dim=0))


@pytest.mark.parametrize("drawn_at, scored_at", [(1.0, 1.0), (0.7, 0.7), (0.0, 1.0)])
def test_rescored_logprobs_equal_the_samplers(any_model, prompts, drawn_at, scored_at):
    """Greedy samples, drawn at temperature 0, come with their log-probs at temperature 1."""
    samples = sample(any_model, prompts, G=8, T=20, temperature=drawn_at)
    assert drawn_at == 0 or len(samples.mask.sum(dim=1).unique()) > 1  # several lengths
    logp, entropy = score(any_model, prompts, samples, scored_at)
    close(logp, samples.logp)
    assert (entropy[samples.mask] > 0).all() and not entropy[~samples.mask].any()
    assert logp.requires_grad and not entropy.requires_grad


def test_samples_follow_the_distribution(llama):
    """Of 20,000 first tokens, the share of each is that of softmax(logits / 0.7), to 5 sigma."""
    ids = torch.tensor([[5, 6, 7]])
    samples = sample(llama, (ids, torch.ones_like(ids)), G=20_000, T=1, eos=[], temperature=0.7)
    p = (llama(input_ids=ids).logits[0, -1] / 0.7).softmax(dim=-1)
    share = torch.bincount(samples.completion_ids[:, 0], minlength=40) / 20_000
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


def test_prompts_go_through_once_and_ended_rows_leave(llama, prompts):
    """Rows leave when an eighth of them have ended. What they write until then is padding."""
    shapes = input_shapes(llama)
    samples = sample(llama, prompts, G=8, T=20)
    expected = [(3, 5)]  # B prompts, not B * G
    unheard = 0
    for t in range(1, samples.mask.sum(dim=1).max()):  # no pass behind the last token
        held = expected[-1][0] if t > 1 else 24
        running = samples.mask[:, t].sum().item()
        expected.append((running if running <= held * 7 / 8 else held, 1))
        unheard += expected[-1][0] - running
    assert shapes == expected
    assert unheard > 0 and (samples.completion_ids[~samples.mask] == PAD).all()


def test_the_generator_is_the_only_randomness(prompts):
    """Dropout, too, is off while sampling. The mode is what it was."""
    model = tiny_model("gpt2").train()
    model.transformer.drop.p = 0.5
    torch.manual_seed(1)
    following = torch.rand(1)
    torch.manual_seed(1)
    first = sample(model, prompts, seed=3)
    assert torch.rand(1) == following  # nothing was drawn from the global generator
    assert all(map(torch.equal, first, sample(model, prompts, seed=3)))
    assert not torch.equal(first.completion_ids, sample(model, prompts, seed=4).completion_ids)
    assert model.training and not first.logp.requires_grad
    assert all(map(torch.equal, first, sample(model.eval(), prompts, seed=3)))
    assert not model.training


def test_hostile_generation_config_is_ignored(llama, prompts):
    expected = sample(llama, prompts, G=8)
    hostile = dict(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0)
    hostile |= dict(min_p=0.9, max_new_tokens=2, eos_token_id=[7], no_repeat_ngram_size=1)
    llama.generation_config.update(**hostile)
    assert llama.generation_config.top_k == 1
    assert all(map(torch.equal, sample(llama, prompts, G=8), expected))


def test_senseless_arguments_are_refused(llama, prompts):
    for G, T, temperature in ((0, 5, 1.0), (2, 0, 1.0), (2, 5, -1.0)):
        with pytest.raises(ValueError, match="at least"):
            sample(llama, prompts, G, T, temperature=temperature)
    samples = sample(llama, prompts)
    for temperature in (0.0, -0.5):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            score(llama, prompts, samples, temperature)


def test_impossible_tokens_are_never_drawn(monkeypatch):
    """Whatever the random number, and wherever the running sum of probabilities rounds."""
    nan, nan_logp = adapters.sample_token(torch.full((3, 50), torch.nan), 1.0, generator(0))
    assert (nan < 50).all() and nan_logp.isnan().all()  # reported later, no index out of range
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 8, 30]] = torch.tensor([0.0, 1.0, 2.0])
    token, logp = adapters.sample_token(logits.expand(20_000, -1), 1.0, generator(0))
    assert set(token.tolist()) == {7, 8, 30} and logp.isfinite().all()
    rounded = torch.randn(200, 1000, generator=generator(0))  # sums a little off 1
    rounded[:, -1] = -torch.inf
    for u, expected in ((0.0, 30), (1 - 2**-24, 7)):  # the ends of what torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u))
        assert adapters.sample_token(logits, 1.0)[0].tolist() == [expected]
        assert adapters.sample_token(rounded, 1.0)[1].isfinite().all()


def test_left_padding_changes_nothing(any_model, prompts):
    """Neither the number of padded columns matters, nor what stands in them."""
    ids, mask = prompts
    batch = sample(any_model, (ids.where(mask.bool(), 17), mask), G=1, temperature=0)
    for row in range(3):
        prompt = ids[row, mask[row].bool()][None]  # (1, P) without padding
        alone = sample(any_model, (prompt, torch.ones_like(prompt)), G=1, temperature=0)
        assert torch.equal(batch.completion_ids[row], alone.completion_ids[0])
        close(batch.logp[row], alone.logp[0])


# --- Log-probs ----------------------------------------------------------------------------------


def plain_logprobs(model, prompts, samples, temperature, question):
    """Score each row by the model as it is: alone, without padding or a cache, all logits."""
    logp = torch.zeros_like(samples.logp)
    entropy = torch.zeros_like(samples.logp)
    for row, q in enumerate(question):
        prompt = prompts[0][q, prompts[1][q].bool()]
        completion = samples.completion_ids[row, samples.mask[row]]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        policy = Categorical(logits=logits[len(prompt) - 1 : -1] / temperature)
        logp[row, : len(completion)] = policy.log_prob(completion)
        entropy[row, : len(completion)] = policy.entropy().detach()
    return logp, entropy


@pytest.mark.parametrize("T, chunk", [(1, 1), (12, 7), (12, 1000)])
def test_logprobs_and_gradients_are_those_of_the_plain_model(any_model, T, chunk, monkeypatch):
    """With shared prompts, groups cut in any order, or a prompt per completion; head in chunks."""
    exact = any_model.config.model_type == "gpt2"  # which alone can compute all of it in float64
    model = any_model.double() if exact else any_model
    limit_chunks(chunk, monkeypatch)
    ids = torch.randint(4, 40, (3, 12), generator=generator(0))  # longer than Gemma's window
    mask = (torch.arange(12) >= torch.tensor([[0], [5], [10]])).long()
    whole = sample(model, (ids, mask), T=T)
    assert whole.logp.dtype == model.dtype
    for rows in (torch.arange(12), torch.tensor([9, 0, 5, 1, 8, 4, 2]), torch.tensor([11, 2])):
        samples = adapters.Samples(*(field[rows] for field in whole))
        question = rows // 4
        results = []
        for logp, entropy in (
            plain_logprobs(model, (ids, mask), samples, 0.7, question),
            score(model, (ids, mask), samples, 0.7, None if len(rows) == 12 else question),
            score(model, (ids[question], mask[question]), samples, 0.7),
        ):
            model.zero_grad()
            (logp * torch.linspace(-1, 1, T).to(logp)).sum().backward()
            results.append([logp.detach(), entropy, *(p.grad.clone() for p in model.parameters())])
        for got in results[1:]:
            for a, b in zip(got, results[0], strict=True):
                close(a, b, (1e-9 if exact else 1e-5) * max(1.0, b.abs().max().item()))


def test_prompts_pass_once_and_only_tokens_that_count_reach_the_head(llama, prompts, monkeypatch):
    samples = sample(llama, prompts)
    limit_chunks(10, monkeypatch)
    shapes = input_shapes(llama.base_model)
    chunks = []
    llama.lm_head.register_forward_hook(lambda module, args, output: chunks.append(len(output)))
    logp, _ = score(llama, prompts, samples)
    assert shapes == [(3, 5), (12, 12)]
    assert max(chunks) == 10 and sum(chunks) == samples.mask.sum()
    logp.sum().backward()  # computes the logits again, which were not kept
    assert max(chunks) == 10 and sum(chunks) == 2 * samples.mask.sum()


def test_a_bf16_model_gives_float32_logprobs(llama, prompts):
    model = adapters.bf16_weights(llama)
    samples = sample(model, prompts)
    logp, entropy = score(model, prompts, samples)
    assert samples.logp.dtype == logp.dtype == entropy.dtype == torch.float32
    # The probabilities of all 40 first tokens add up to 1 far better than bf16 could say.
    every = torch.arange(40)[:, None]
    logp, _ = adapters.token_logprobs(model, *(x[:1] for x in prompts), every, every >= 0, 1.0)
    assert abs(logp.exp().sum().item() - 1) < 1e-5


def test_rotary_frequencies_stay_float32(llama):
    before = [buffer.clone() for buffer in llama.buffers()]
    model = adapters.bf16_weights(llama)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert before and all(map(torch.equal, llama.buffers(), before))
    assert {buffer.dtype for buffer in llama.buffers()} == {torch.float32}


def test_rows_of_a_batch_score_alone_as_in_the_batch(llama, prompts):
    """Rows of several questions, out of order, less the columns that only hold padding."""
    samples = sample(llama, prompts, T=20)
    question = torch.arange(12) // 4
    numbers = torch.arange(240.0).view(12, 20)
    whole = score(llama, prompts, samples, 0.7)  # log-probs and entropies, in the last two fields
    batch = adapters.Batch(*prompts, *samples[:2], question, numbers, -numbers, *whole)
    for rows in ([7, 0, 2], [3], [10, 5], list(range(12))):
        part = batch.rows(rows)
        asked = prompts[1][question[rows].unique()]
        assert part.prompt_ids.shape == (len(asked), asked.sum(dim=1).max())
        for i in (3, 5, 6, 7, 8):  # all fields that are (N, T), but for the ids
            assert torch.equal(part[i], batch[i][rows, : samples.mask[rows].sum(dim=1).max()])
        close(adapters.token_logprobs(llama, *part[:4], 0.7, part.question), part[7:], 1e-5)


# What makes many kinds of models small. The cap of Gemma 2, 30, is far above its logits then.
SMALL = SIZE | dict(initializer_range=0.02, head_dim=8, hidden_size_per_layer_input=8)
SMALL |= dict(laurel_rank=4, altup_num_inputs=2, vocab_size_per_layer_input=40)
SMALL |= dict(num_kv_shared_layers=0, logits_scaling=8.0, full_attn_idxs=[1], num_heads=8)
SMALL |= dict(state_size=4, mamba_d_state=4, mamba_d_head=8, mamba_n_heads=8, mamba_d_ssm=64)
SMALL |= dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
STATES = "Bamba FalconH1 Jamba Lfm2 Mamba Mamba2 MiniMax OlmoHybrid Qwen3Next RecurrentGemma Rwkv"


def make(name, **config):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **config)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)


def test_padding_does_not_make_the_gradient_nan():
    """A fresh Gemma 3n embeds the pad id as 0, where its norm has an infinite derivative."""
    model = make("Gemma3nText", activation_sparsity_pattern=[0.0, 0.0])
    ids, mask = pad_rows([[5, 6], [7, 8, 9, 10]], "left", DEVICE)
    completions = pad_rows([[11, 12, 13], [14, 15]], "right", DEVICE)
    for prompt_ids, harmless in ((ids, True), (ids.where(mask, PAD), False)):
        model.zero_grad()
        logp, _ = adapters.token_logprobs(model, prompt_ids, mask, *completions, 1.0)
        logp.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients) == harmless


# --- The check of a model -----------------------------------------------------------------------


def test_the_four_architectures_pass_the_check(any_model):
    adapters.check_model(any_model)


@pytest.mark.parametrize("name", ["Cohere", "Gemma2", "Granite"])
def test_logits_that_are_changed_behind_the_head_are_refused(name):
    with pytest.raises(ValueError, match="not just the vocabulary head"):
        adapters.check_model(make(name))


@pytest.mark.parametrize("name", STATES.split())
def test_models_with_another_state_are_refused_before_any_pass(name):
    """For a pass through a small one may take gigabytes: a scan over the states of all tokens."""
    model = make(name)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match="keeps state"):
        adapters.check_model(model)


def test_a_model_that_forgets_its_padding_behind_a_cache_is_refused(llama):
    def forget(module, args, kwargs):
        if kwargs.get("past_key_values"):
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return args, kwargs

    llama.base_model.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(ValueError, match="padding and a cache"):
        adapters.check_model(llama)
