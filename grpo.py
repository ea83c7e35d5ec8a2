"""GRPO, Group Relative Policy Optimization: the algorithm, tensors in and tensors out.

GRPO comes from DeepSeekMath (arXiv 2402.03300); equation and section numbers are that paper's. In one
breath: sample a group of G completions for each question, score each of them, call a completion good if it
did better than the rest of its own group, and make the tokens of good completions likelier, not too far at
once (the clip) and not too far from where we started (the KL term).
A policy is a language model seen as a chooser of tokens: pi(o_t | q, o_<t) is the probability it gives to
token o_t after question q and the tokens before. EOS is the token that ends a completion.

    paper        here                       shape    meaning
    q            prompt_ids, prompt_mask    (B, P)   B questions, padded on the left
    o_i          completion_ids, mask       (N, T)   N = B * G completions, padded on the right
    r_i          rewards                    (B, G)   one number per completion; per step (N, K), with their ends
    A_hat[i,t]   advantages                 (N, T)   how much better than its group; (N,) if alike for all t
    pi_theta     logp                       (N, T)   log-probs of the policy that is trained
    pi_old       logp_old                   (N, T)   ... of the policy as it was when it sampled them
    pi_ref       logp_ref                   (N, T)   ... of the reference, a copy renewed at each iteration
    G, epsilon, beta: group_size, clip_low and clip_high, kl_beta

Rows are question-major: rows 0 ... G-1 are the group of question 0, and x.view(B, G) gives the groups back.
V is the size of the vocabulary, D that of a hidden state. `mask` is true where a completion token counts.

The paper leaves open, and we chose: the standard deviation is that of a sample (divisor G - 1), with 1e-4 added;
epsilon is 0.2; log-probs are those of the distribution that was sampled from, softmax(logits / temperature).
Comments marked PAPER say where the code departs from the paper, TRAP what goes wrong silently (and its test).
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

STD_EPSILON = 1e-4     # added to the standard deviation of a group's rewards
EQUAL_REWARDS = 1e-6   # rewards closer together than this are equal (0.1 + 0.2 against 0.3)
MAX_LOG_RATIO = 20.0   # bound on log(pi/pi'): e^20 = 5e8 is absurd for a ratio, and still finite
HEAD_LOGITS = 2 ** 26  # logits of a chunk: 256 MB in float32, a few times that while it is worked on
# --- 1. Grouped sampling ----------------------------------------------------------------------------
class Samples(NamedTuple):
    """What `sample_groups` returns: N = B * group_size rows, question-major."""
    completion_ids: torch.Tensor   # (N, T) int64, padded on the right; T is max_new_tokens
    mask: torch.Tensor             # (N, T) bool, true up to and including the first EOS
    logp: torch.Tensor             # (N, T) the sampler's own log-probs, 0 where mask is false
    truncated: torch.Tensor        # (N,) bool, true for completions cut off by max_new_tokens

def bf16_weights(model):
    """Turn the parameters of a model into bf16, in place; returns the model.
    TRAP: model.to(torch.bfloat16) also rounds the frequencies of rotary positions, which are a buffer. At
    position 500 the angles are then off by up to 0.5 radians (test_rotary_frequencies_stay_float32).
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model

def forward(model, ids, attention_mask, cache=None, use_cache=True, **options):
    """What a model says of s new tokens a row, ids (n, s), that follow those in the cache: its own output object.

    attention_mask: (n, tokens in the cache + s), false for padding on the left.
    TRAP: the position of a token is counted without the padding on its left, or a short prompt in a batch
    starts at position 5 or 50, and its log-probs are wrong (test_left_padding_changes_nothing).
    """
    attention_mask = attention_mask.long()
    position = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model(input_ids=ids, attention_mask=attention_mask, position_ids=position, past_key_values=cache,
                 use_cache=use_cache, **options)

def sample_token(logits, temperature, generator=None):
    """Draw a token a row from p = softmax(logits / temperature): (n, V) -> ids (n,) and log p of them (n,)."""
    # TRAP: in bf16 a log-prob is off by up to 0.08, the clip range 0.2 (test_a_bf16_model_gives_float32_logprobs).
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = torch.softmax(logits / (temperature or 1.0), dim=-1)          # (n, V)
    if temperature == 0:   # the likeliest token, with its log p at temperature 1
        token = p.argmax(dim=-1, keepdim=True)
    else:
        # The first token at which the sum of p so far reaches u, which is uniform in (0, sum of p]. One random
        # number a row: torch.multinomial draws one for each of the V tokens, 5 to 20 times as slow on a CPU.
        cdf = p.cumsum(dim=-1)
        u = cdf[:, -1:] * (1 - torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=p.device))
        token = torch.searchsorted(cdf, u).clamp(max=p.shape[1] - 1)   # it would be V where p is nan
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()

class PreallocatedLayer(DynamicLayer):
    """The KV cache of one layer, (n, heads, tokens, head_dim); attention hands each new token to `update`.
    The library's DynamicLayer copies all it holds to append one token: a third of the sampling time on a CPU.
    Here memory is reserved at the start, and of rows that stay only those that change places are copied.
    """
    def __init__(self, layer, max_new_tokens):   # takes over the keys and values of the prompts
        super().__init__()
        self.is_initialized = True
        self.reserved = [pad(x, (0, 0, 0, max_new_tokens)) for x in (layer.keys, layer.values)]
        self.keys, self.values = (x[:, :, :layer.get_seq_length()] for x in self.reserved)   # views

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        for x, new in zip(self.reserved, (key_states, value_states)):
            x[:, :, start:end] = new
        self.keys, self.values = (x[:, :, :end] for x in self.reserved)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for x in (self.keys, self.values):
            x[moved] = x[indices[moved]]   # refilled from rows behind the new end
        self.reserved = [x[:len(indices)] for x in self.reserved]
        self.keys, self.values = self.keys[:len(indices)], self.values[:len(indices)]

@torch.no_grad()
def sample_groups(model, prompt_ids, prompt_mask, group_size, max_new_tokens, eos_ids, pad_id,
                  temperature=1.0, generator=None):
    """Sample `group_size` completions for each of B prompts, "a group of outputs" in section 4.1.
    The prompts go through the model once. What attention keeps of them, keys and values (the KV cache), is
    repeated G times; then each forward pass takes one new token a row. Rows that have ended leave the batch.

    prompt_ids, prompt_mask: (B, P), padded on the left; eos_ids: the ids that end a completion; pad_id:
    fills up rows that have ended, and may be an EOS id; temperature: 0 is greedy; generator: on the
    model's device. Returns `Samples`. Raises ValueError for arguments that make no sense.
    TRAP: a library's generate() also obeys the folder's generation_config (top_k, repetition_penalty): samples of
    another policy than the one trained. This reads only its arguments (test_hostile_generation_config_is_ignored).
    """
    if group_size < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError("group_size and max_new_tokens must be at least 1, temperature at least 0")
    P, N, device = prompt_ids.shape[1], len(prompt_ids) * group_size, prompt_ids.device
    eos, was_training = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device), model.training
    model.eval()   # in train() mode activation checkpointing would turn the KV cache off

    out = forward(model, prompt_ids, prompt_mask, logits_to_keep=1)   # of each prompt only the last logits
    # G rows for each prompt. repeat_interleave is [q0, q0, q1, q1]: question-major.
    logits, cache = out.logits[:, -1].repeat_interleave(group_size, dim=0), out.past_key_values       # (N, V)
    attention_mask = pad(prompt_mask, (0, max_new_tokens), value=1).repeat_interleave(group_size, dim=0)
    for i, layer in enumerate(cache.layers):
        layer.batch_repeat_interleave(group_size)
        if type(layer) is DynamicLayer:   # others, sliding windows say, stay as they are
            cache.layers[i] = PreallocatedLayer(layer, max_new_tokens)

    completion_ids = torch.full((N, max_new_tokens), pad_id, dtype=torch.long, device=device)
    logp = torch.zeros(N, max_new_tokens, dtype=torch.promote_types(logits.dtype, torch.float32), device=device)
    rows = torch.arange(N, device=device)   # the rows that still run; logits, cache etc. hold only these
    for t in range(max_new_tokens):
        token, token_logp = sample_token(logits, temperature, generator)        # (n,), n = len(rows)
        completion_ids[rows, t], logp[rows, t] = token, token_logp

        ended = [i for i, is_eos in enumerate(torch.isin(token, eos).tolist()) if is_eos]   # waits for the GPU
        if ended:
            stay = list(range(len(rows)))
            for i in reversed(ended):   # the last row takes its place: 0 1 2 3, of which 1 ended -> 0 3 2
                stay[i] = stay[-1]
                stay.pop()
            stay = torch.tensor(stay, dtype=torch.long)
            rows, token, attention_mask = rows[stay], token[stay], attention_mask[stay]
            cache.batch_select_indices(stay)
        if len(rows) == 0 or t + 1 == max_new_tokens:
            break
        logits = forward(model, token[:, None], attention_mask[:, :P + t + 1], cache, logits_to_keep=1).logits[:, -1]

    model.train(was_training)
    return Samples(completion_ids, completion_mask(completion_ids, eos_ids), logp,
                   truncated=~torch.isin(completion_ids, eos).any(dim=1))

def completion_mask(completion_ids, eos_ids):
    """True for the tokens of a completion that count: up to and including the first EOS. (N, T) -> bool.

    With EOS = 9:  [5, 6, 9, 9] -> [1, 1, 1, 0];  [5, 6, 7, 8] -> [1, 1, 1, 1];  [9, 9] -> [1, 0].
    TRAP: many tokenizers pad with the EOS token. A mask by value (`!= pad_id`) then hides the EOS itself,
    and the model never learns to stop. So the mask goes by position (test_eos_token_is_trained).
    """
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=completion_ids.device)
    is_eos = torch.isin(completion_ids, eos).long()
    return is_eos.cumsum(dim=1) - is_eos == 0   # the number of EOS that stand before this token
# --- 2. Log-probabilities: log pi(o_t | q, o_<t) ----------------------------------------------------
def token_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question=None):
    """Log-prob of every completion token, log pi(o_t | q, o_<t), and the entropy that it was drawn with.
    prompt_ids, prompt_mask: (B, P); completion_ids, mask: (N, T); question: (N,) which of the B prompts each
    completion answers, question-major if None; temperature: that of the sampling. Returns (logp, entropy),
    both (N, T), in nats, at least float32, 0 where mask is false; only logp carries a gradient.
    Raises ValueError for a temperature that is not above 0.

    With V = 150,000 the logits are by far the largest tensor around. So only the tokens that count reach the
    vocabulary head, in chunks; several are computed again in the backward pass: no (N, T, V) tensor exists.
    """
    # TRAP: samples drawn at temperature 0.7 and scored at 1 are those of another policy, from step 1 on
    # (test_rescored_logprobs_equal_the_samplers).
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to score samples, not {temperature}")
    B, (N, T) = len(prompt_ids), completion_ids.shape
    question = torch.arange(N, device=mask.device) // (N // B) if question is None else question
    if head_is_plain(model):   # ids (n, s) -> body -> states (n, s, D) -> head -> logits (n, s, V)
        body, head = model.base_model, model.get_output_embeddings()
    else:                      # here the states are logits already
        body, head = (lambda **inputs: model(**inputs, logits_to_keep=T + 1)), torch.nn.Identity()

    # Padding behind a completion needs no masking out: causal attention never looks ahead.
    attention_mask = torch.cat([prompt_mask.long()[question], torch.ones_like(completion_ids)], dim=1)   # (N, P + T)
    # TRAP: activation checkpointing drops the cache (test_activation_checkpointing_changes_nothing).
    no_cache = model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    if B == N or no_cache:   # no prompt is shared, or there is no way to share it
        whole = torch.cat([prompt_ids[question], completion_ids], dim=1)
        states = forward(body, whole, attention_mask, use_cache=False)[0][:, -T - 1:]
    else:   # as in sampling: the prompts once, the completions behind their keys and values, which carry gradients
        out = forward(body, prompt_ids, prompt_mask)
        out.past_key_values.batch_select_indices(question)
        behind = forward(body, completion_ids, attention_mask, out.past_key_values)[0]
        states = torch.cat([out[0][question, -1:], behind], dim=1)
    # (N, T + 1, D): from the last token of the prompt to the last of the completion. Each state predicts the next
    # token, so the last one has nothing to predict.
    states, targets = states[:, :-1][mask], completion_ids[mask]                # (M, D), (M,): M tokens that count

    size = max(1, HEAD_LOGITS // len(model.get_input_embeddings().weight))      # tokens of a chunk
    jobs = [(head, h, y, temperature) for h, y in zip(states.split(size), targets.split(size))]
    done = [checkpoint(_logp_and_entropy, *job, use_reentrant=False) if len(jobs) > 1 else _logp_and_entropy(*job)
            for job in jobs]   # checkpoint keeps no logits, and computes them again in the backward pass
    values, entropies = map(torch.cat, zip(*done))                              # (M,), (M,)
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask, values), zeros.masked_scatter(mask, entropies)

def _logp_and_entropy(head, states, targets, temperature):
    logits = head(states)                                                       # (m, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # never bf16, as in sample_token
    logp = torch.log_softmax(logits / temperature, dim=-1)                      # (m, V)
    entropy = -logp.detach().exp().mul_(logp.detach()).sum(dim=-1)   # - sum p log p; mul_ saves an (m, V)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy

@torch.no_grad()
def head_is_plain(model):
    """Whether the model's logits are its output embedding applied to its base model's output, nothing else.
    Not so for Granite and Cohere, which scale their logits, and Gemma 2, which caps them: there the head applied
    by hand would be another model. Found out by trying, once a model, then remembered as model._head_is_plain.
    """
    if hasattr(model, "_head_is_plain"):
        return model._head_is_plain
    head, model._head_is_plain = model.get_output_embeddings(), False
    if head is not None and model.base_model is not model:
        ids = torch.tensor([[1, 2]], device=head.weight.device)
        expected = head(1000 * model.base_model(input_ids=ids, use_cache=False)[0])
        with head.register_forward_pre_hook(lambda module, args: (1000 * args[0],)):   # so that a cap shows
            logits = model(input_ids=ids, use_cache=False).logits
        model._head_is_plain = ((logits - expected).abs().max() < 1e-3 * expected.abs().max()).item()
    return model._head_is_plain

@torch.no_grad()
def cache_gap(model):
    """The largest difference between log-probs of a small sample, drawn with a KV cache, and without one: about 0."""
    ids = torch.tensor([[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]], device=model.device)
    samples = sample_groups(model, ids, ids > 0, 2, 8, eos_ids=range(0, 10**6, 4), pad_id=0)   # one token in 4 ends
    alone = [x.repeat_interleave(2, dim=0) for x in (ids, ids > 0)]
    return (token_logprobs(model, *alone, *samples[:2], 1.0)[0] - samples.logp).abs().max().item()

def micro_batches(rows, prompt_mask, mask, limit):
    """Cut row numbers into lists of at most `limit` tokens, with padding; a row that is longer stands alone.
    A prompt counts for each of its rows, since its keys and values are there as often.
    """
    G, p, t = len(mask) // len(prompt_mask), prompt_mask.sum(dim=1).tolist(), mask.sum(dim=1).tolist()
    cuts = [[]]
    for row in sorted(rows, key=lambda row: t[row]):   # alike in length, so that little is padding
        together = cuts[-1] + [row]   # of these `row` is the longest
        if cuts[-1] and len(together) * (max(p[r // G] for r in together) + t[row]) > limit:
            cuts.append([])
        cuts[-1].append(row)
    return cuts

def score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, temperature):
    """logp, entropy and mask, each (n, t), of rows by number. Prompts go through once, mere padding not at all."""
    rows, G = torch.tensor(rows, device=mask.device), len(mask) // len(prompt_mask)
    prompts, question = torch.unique(rows // G, return_inverse=True)   # prompts[question] is rows // G
    p, t = prompt_mask[prompts].sum(dim=1).max(), mask[rows].sum(dim=1).max()
    mask = mask[rows, :t]
    return *token_logprobs(model, prompt_ids[prompts, -p:], prompt_mask[prompts, -p:], completion_ids[rows, :t],
                           mask, temperature, question), mask
# --- 3. Advantages ----------------------------------------------------------------------------------
def outcome_advantages(rewards, scale="std"):
    """How much better a completion did than its group: A_hat[i] = (r_i - mean(r)) / std(r), section 4.1.2.
    rewards (B, G) -> advantages (B, G), one for all tokens of a completion. This group mean stands in for
    the value model of PPO, a second network that predicts the reward. scale="none" leaves the division out,
    so that nearly solved and nearly hopeless questions do not weigh more (Dr. GRPO, arXiv 2503.20783).
    Raises ValueError for another scale, or a group of one, which has nothing to be compared with.

    [1, 0, 0, 0]: mean 1/4, std 1/2 -> [1.5, -0.5, -0.5, -0.5]   (less 0.02%, for the added 1e-4)
    [1, 1, 1, 1] -> [0, 0, 0, 0]: all right or all wrong teaches nothing
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G at least 2, not {tuple(rewards.shape)}")
    # TRAP: mean and std are those of the row, the question's own group, never of the batch
    # (test_groups_do_not_mix).
    return _normalised(rewards, torch.ones_like(rewards, dtype=torch.bool), scale)

def process_advantages(rewards, ends, mask, group_size, scale="std"):
    """Steps have rewards of their own: A_hat[i,t] = sum of r~[i,j] over the steps j that end at or after t, 4.1.3.
    rewards, ends: (N, K), what a step earned and the token that ends it, padded with ends of -1; mask (N, T).
    r~ is the reward normalised over all steps of the group; scale as above. -> (N, T), 0 where mask is false.

    G = 2, steps [1, 0, 1] that end at tokens 1, 3, 4, and [0] at 2: mean 1/2, std 0.577, so r~ is +-0.866
    -> [0.87, 0.87, 0, 0, 0.87] and [-0.87, -0.87, -0.87, 0, 0]; behind the last step nothing is left to earn
    """
    B = len(rewards) // group_size
    groups = _normalised(rewards.reshape(B, -1), ends.reshape(B, -1) >= 0, scale)                     # (B, G * K)
    # Each r~ goes onto the token that ends its step; then every token sums up what stands on it and behind it.
    at_end = groups.new_zeros(mask.shape).scatter_add(1, ends.clamp(min=0), groups.view_as(rewards))   # (N, T)
    return at_end.flip(1).cumsum(dim=1).flip(1).masked_fill(~mask, 0.0)

def _normalised(rewards, real, scale):
    """(r - mean) / std over the entries of a row that are real; the others become 0. (B, n), (B, n) -> (B, n)."""
    if scale not in ("std", "none"):
        raise ValueError(f'scale must be "std" or "none", not "{scale}"')
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).masked_fill(~real, 0.0)
    count = real.sum(dim=1, keepdim=True)                                       # (B, 1)
    centred = (rewards - rewards.sum(dim=1, keepdim=True) / count).masked_fill(~real, 0.0)
    std = (centred.square().sum(dim=1, keepdim=True) / (count - 1)).sqrt()
    # TRAP: rewards that differ by float noise alone must count as equal. Divided by their own tiny std they
    # would be of order 1; STD_EPSILON shrinks that, this makes it 0 (test_equal_rewards_give_exactly_zero).
    equal = centred.amax(dim=1, keepdim=True) - centred.amin(dim=1, keepdim=True) < EQUAL_REWARDS
    return (centred / (std + STD_EPSILON) if scale == "std" else centred).masked_fill(equal, 0.0)
# --- 4. The objective -------------------------------------------------------------------------------
# The unified view (eq. 5, table 10): each method has the gradient E[1/|o| * sum_t GC * grad log pi(o_t | q, o_<t)].
# Here each is `grpo_loss`; they differ in who wrote the completions, and in GC, the gradient coefficient of a token:
#   SFT          people, or a program    1                     warm_up of train.py (PAPER: all tokens weigh alike)
#   RFT          the reference (SFT)     1 if right, else 0    as in the next line, and --sample-from reference
#   Online RFT   the policy              1 if right, else 0    --advantage indicator --kl-beta 0: the bare rewards
#   GRPO         the policy, in groups   A_hat + beta * (pi_ref/pi - 1): eq. 21, where pi_old = pi
def kl_estimate(logp, logp_ref):
    """KL to the reference, estimated per token: pi_ref/pi - log(pi_ref/pi) - 1, eq. 4. (N, T) -> (N, T).

    It is 0 where the two agree and positive elsewhere: for pi_ref/pi = 2 it is 2 - log 2 - 1 = 0.307.
    Averaged over samples from pi it is KL(pi || pi_ref), "unbiased" in the paper. Its own gradient, samples fixed,
    is on average that of KL(pi_ref || pi) instead (test_gradient_of_the_kl_term_is_that_of_the_other_kl).
    """
    # PAPER: eq. 4 has no clamp. Without one, a token of log-ratio 100 makes the whole step inf or nan.
    log_ratio = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio   # expm1(x) is exp(x) - 1, exact for small x

def clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high):
    """min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) per token, to be maximised: eq. 3.

    All arguments (N, T) or broadcast to it; ratio = pi/pi_old. The gradient with respect to logp, for eps = 0.2:

              ratio < 0.8    0.8 ... 1.2    ratio > 1.2
      A > 0   ratio * A      ratio * A      0              (good enough now: leave it)
      A < 0   0              ratio * A      ratio * A      (on the left, bad enough now)
    TRAP: it is min for both signs of A. With max for A < 0 a bad token that grew likelier gets no
    gradient (test_gradient_of_the_surrogate_by_cases).
    """
    # PAPER: eq. 3 has no clamp; the same reason as in kl_estimate, since inf * 0 is nan.
    ratio = (logp - logp_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.min(ratio * advantages, clipped_ratio * advantages)

def loss_denominator(mask, aggregate="sequence", max_completion_tokens=None):
    """What `grpo_loss` divides its sum over all rows by, as a float; mask: (N, T).
    Rows without any token (taken out of the loss by the caller) do not count. At least 1.
    Raises ValueError for an unknown aggregate, or "constant" without max_completion_tokens.
    """
    rows = mask.any(dim=1).sum().item()
    if aggregate == "sequence":      # eq. 3: 1/G * sum_i 1/|o_i| * sum_t, and then the mean over B questions
        return float(max(rows, 1))
    if aggregate == "token":         # DAPO, arXiv 2503.14476: every token weighs the same
        return float(max(mask.sum().item(), 1))
    if aggregate == "constant" and max_completion_tokens:   # Dr. GRPO: no reward for being short
        return float(max(rows, 1) * max_completion_tokens)
    raise ValueError(f'aggregate is sequence, token, or constant with max_completion_tokens, not "{aggregate}"')

def grpo_loss(logp, logp_old, logp_ref, advantages, mask, clip_low=0.2, clip_high=0.2, kl_beta=0.04,
              aggregate="sequence", max_completion_tokens=None, denominator=None):
    """The GRPO loss: eq. 3 with its sign turned, since optimizers minimise. (Algorithm 1 names eq. 21, its gradient.)

      J = 1/G * sum_i  1/|o_i| * sum_t { min(ratio * A, clip(ratio) * A) - beta * KL[i,t] }

    logp, logp_old, logp_ref, mask: (N, T); logp_ref may be None if kl_beta is 0. advantages: (N,), (N, 1)
    or (N, T). aggregate: "sequence" as above, "token" or "constant" (see `loss_denominator`).
    Returns (loss, diagnostics): a scalar, and means over this call's tokens as detached scalars: kl (with logp_ref
    only), and clip_share, the share of tokens whose gradient the clip took away.
    Raises ValueError if the KL term lacks its reference or the shapes do not fit.
    TRAP: cut into micro-batches, each must be divided by the `denominator` of the whole batch, and the losses
    summed; a mean of means depends on the cut (test_micro_batches_change_nothing).

    At pi_old = pi, as in the first update after sampling, every ratio is 1, and outcome advantages sum to 0 a group.
    So with "sequence" the loss prints as 0 (plus the KL term). That is no bug: the gradient, above, is not 0.
    """
    if kl_beta and logp_ref is None:
        raise ValueError("kl_beta is not 0, so the KL term needs logp_ref")
    if advantages.dim() == 1:
        advantages = advantages[:, None]                                        # (N,) -> (N, 1)
    if logp.shape != mask.shape or advantages.shape not in (mask.shape, mask.shape[:1] + (1,)):
        raise ValueError(f"shapes do not fit: logp {tuple(logp.shape)}, mask {tuple(mask.shape)}, "
                         f"advantages {tuple(advantages.shape)}")
    objective = clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)   # (N, T)
    ratio = (logp - logp_old).detach().exp()
    too_far = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    tokens = mask.sum().clamp(min=1)
    diagnostics = {"clip_share": (too_far & mask).sum() / tokens}
    if logp_ref is not None:
        kl = kl_estimate(logp, logp_ref)                                        # (N, T)
        diagnostics["kl"] = kl.detach().masked_fill(~mask, 0.0).sum() / tokens
        objective = objective - kl_beta * kl
    # TRAP: masked_fill, not `* mask`: where padding holds inf or nan, 0 times it is nan
    # (test_padding_may_hold_anything).
    objective = objective.masked_fill(~mask, 0.0)
    per_completion = objective.sum(dim=1)                                       # (N,) the sum over t
    if aggregate == "sequence":
        per_completion = per_completion / mask.sum(dim=1).clamp(min=1)          # times 1/|o_i|
    denominator = loss_denominator(mask, aggregate, max_completion_tokens) if denominator is None else denominator
    return -per_completion.sum() / denominator, diagnostics
