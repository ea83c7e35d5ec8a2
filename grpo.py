"""GRPO, Group Relative Policy Optimization: the algorithm, tensors in and tensors out.

GRPO comes from DeepSeekMath (arXiv 2402.03300); equation and section numbers are that paper's.
In one breath: sample a group of G completions for each question, score each of them, call a
completion good if it did better than the rest of its own group, and make the tokens of good
completions likelier, but not by too much at once (the clip), and without straying too far from
where we started (KL).

A policy is a language model seen as a chooser of tokens: pi(o_t | q, o_<t) is the probability it
gives to token o_t after question q and the tokens before it. EOS is the token that ends a
completion.

    paper        here                       shape    meaning
    q            prompt_ids, prompt_mask    (B, P)   B questions, padded on the left
    o_i          completion_ids, mask       (N, T)   N = B * G completions, padded on the right
    r_i          rewards                    (B, G)   one number per completion; or (N, K), per step
    A_hat[i,t]   advantages                 (N, T)   how much better than its group
    pi_theta     logp                       (N, T)   log-probs of the policy that is trained
    pi_old       logp_old                   (N, T)   ... of the policy that sampled the completions
    pi_ref       logp_ref                   (N, T)   ... of the reference, a frozen copy
    G, epsilon, beta: group_size, clip_low and clip_high, kl_beta

Rows are question-major: rows 0 ... G-1 are the group of question 0, and x.view(B, G) gives the
groups back. P is the longest prompt, T the limit max_new_tokens, K the largest number of steps in
any completion, V the size of the vocabulary, D that of a hidden state. A part of a batch has n rows
and t columns; M is the number of its tokens that count. `mask` is true up to and including the
first EOS; `weights` say how much a token counts in the loss.

Choices that the paper leaves open: the standard deviation is that of a sample (divisor G - 1),
with STD_EPSILON added; epsilon is 0.2; log-probs are those of the distribution that was sampled
from, softmax(logits / temperature). Comments marked PAPER say where the code departs from the
paper. Those marked TRAP say what can go wrong silently, and which test notices.

Order: 1. advantages, 2. the objective, 3. the batch, 4. sampling, 5. log-probs. The rest may be
skipped: 6. which models are supported, 7. a faster cache.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

STD_EPSILON = 1e-4  # added to the standard deviation of a group's rewards
EQUAL_REWARDS = 1e-6  # rewards closer together than this are equal (0.1 + 0.2 and 0.3)
MAX_LOG_RATIO = 20.0  # bound on log(pi/pi'): e^20 = 5e8 is absurd for a ratio, and still finite
HEAD_LOGITS = 2**26  # logits computed at once: 256 MB in float32; the peak is a few times that


# --- 1. Advantages ------------------------------------------------------------------------------


def outcome_advantages(rewards, scale="std"):
    """Compare each completion with its group: A_hat[i] = (r_i - mean(r)) / std(r), section 4.1.2.

    rewards: (B, G). Returns advantages (B, G), each valid for all tokens of its completion. The
    group's mean stands in for the value model of PPO, a second network that predicts the reward.
    scale="none" leaves the division out, because a small std inflates the advantages of nearly
    solved and nearly hopeless questions (Dr. GRPO, arXiv 2503.20783). Raises ValueError for any
    other scale, and for a group of one, which has nothing to be compared with.

    [1, 0, 0, 0]: mean 1/4, std 1/2 -> [1.5, -0.5, -0.5, -0.5]  (a bit less, due to STD_EPSILON)
    [1, 1, 1, 1] -> [0, 0, 0, 0]: all right or all wrong teaches nothing
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G at least 2, not {tuple(rewards.shape)}")
    if scale not in ("std", "none"):
        raise ValueError(f'scale must be "std" or "none", not "{scale}"')
    r = rewards.double()  # float32 cannot tell 1e8 from 1e8 + 1
    # TRAP: mean and std are those of the row, the question's own group, never of the batch
    # (test_groups_do_not_mix).
    mean = r.mean(dim=1, keepdim=True)  # (B, 1)
    std = r.std(dim=1, keepdim=True)  # (B, 1)
    advantages = r - mean if scale == "none" else (r - mean) / (std + STD_EPSILON)
    # TRAP: rewards that differ by float noise alone must count as equal, or the policy learns the
    # noise (test_equal_rewards_give_exactly_zero).
    equal = r.amax(dim=1, keepdim=True) - r.amin(dim=1, keepdim=True) < EQUAL_REWARDS  # (B, 1)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return advantages.masked_fill(equal, 0.0).to(dtype)


def process_advantages(rewards, ends, mask, group_size, scale="std"):
    """Credit each token with the steps that end at or after it: section 4.1.3.

    A_hat[i,t] = sum of r~[i,j] over the steps j of completion i that end at token t or after it.
    r~ is the reward of a step, compared with all steps of the group as above.

    rewards, ends: (N, K), what each step earned and the token that ends it; ends is -1 past a row's
    last step. mask: (N, T). Returns (N, T), 0 where mask is false.

    G = 2, T = 5. Steps [1, 0, 1] end at tokens 1, 3, 4; step [0] ends at 2. Mean 1/2, std 0.577:
    r~ is +-0.866 -> [0.87, 0.87, 0, 0, 0.87] and [-0.87, -0.87, -0.87, 0, 0]
    """
    normalised = torch.zeros_like(at_least_float32(rewards))  # (N, K)
    for first in range(0, len(rewards), group_size):
        group = slice(first, first + group_size)
        real = ends[group] >= 0  # (G, K)
        steps = rewards[group][real]  # all steps of the group, as one flat row
        if len(steps) > 1:  # a single step has nothing to be compared with
            # group is a slice, so normalised[group] is a view, and this writes to normalised.
            normalised[group][real] = outcome_advantages(steps[None], scale)[0]
    # Each r~ is added to the token that ends its step; the padding adds 0 to token 0. Then every
    # token sums what is on it and after it: flip, running sum, flip back.
    at_end = normalised.new_zeros(mask.shape).scatter_add(1, ends.clamp(min=0), normalised)
    return at_end.flip(1).cumsum(dim=1).flip(1).masked_fill(~mask, 0.0)  # (N, T)


# --- 2. The objective ---------------------------------------------------------------------------
# The unified view (eq. 5, table 10): all methods have the gradient
#     E[ 1/|o| * sum_t GC * grad log pi(o_t | q, o_<t) ]
# and all but SFT go through `grpo_loss`. They differ in who wrote the completions, and in GC, the
# gradient coefficient of a token:
#   SFT          people or a program     1                     warm_up of train.py
#   Online RFT   the policy              1 if right, else 0    --advantage indicator --kl-beta 0
#   RFT          the reference (SFT)     1 if right, else 0    the same with --sample-from reference
#   GRPO         the policy, in groups   A_hat + beta * (pi_ref/pi - 1): eq. 21, where pi_old = pi


def clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high):
    """Compute min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) per token, from eq. 3.

    All tensors (N, T) or broadcast to it; ratio = pi/pi_old. To be maximised. Its gradient with
    respect to logp, for a clip range of 0.2 on both sides:

              ratio < 0.8    0.8 ... 1.2    ratio > 1.2
      A > 0   ratio * A      ratio * A      0 (likely enough for now)
      A < 0   0 (unlikely)   ratio * A      ratio * A

    TRAP: it is min for both signs of A. With max for A < 0, a bad token that grew likelier would
    get no gradient (test_gradient_of_the_surrogate_by_cases).
    """
    # PAPER: eq. 3 has no bound. Without one, a token of log-ratio 100 makes the step inf or nan.
    ratio = (logp - logp_old).clamp(max=MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.min(ratio * advantages, clipped_ratio * advantages)


def kl_estimate(logp, logp_ref):
    """Estimate the KL to the reference per token: pi_ref/pi - log(pi_ref/pi) - 1, eq. 4.

    (N, T), (N, T) -> (N, T). It is 0 where the two agree and positive elsewhere: for
    pi_ref/pi = 2 it is 2 - log 2 - 1 = 0.307. Averaged over samples from pi it is KL(pi || pi_ref);
    the paper calls it unbiased. Used as a loss on fixed samples, it has on average the gradient
    of KL(pi_ref || pi) instead (test_gradient_of_the_kl_term_is_that_of_the_other_kl).
    """
    # PAPER: eq. 4 has no bound. Only a large pi_ref/pi overflows, so only that side is bounded. The
    # other keeps its gradient: a token that the reference finds far less likely is pulled back.
    log_ratio = (logp_ref - logp).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio  # expm1(x) is exp(x) - 1, exact for small x


def token_weights(mask, aggregate="sequence", max_new_tokens=None):
    """Say how much each token counts in the loss: (N, T) bool -> (N, T), 0 where mask is false.

    sequence   1/N * 1/|o_i|               eq. 3: the mean over a completion, then over completions
    token      1 / tokens of the batch     DAPO, arXiv 2503.14476: all tokens weigh the same
    constant   1/N * 1/max_new_tokens      Dr. GRPO: the same at any length

    N counts the rows that have a token, so rows that the caller masks out are not in the mean.
    Raises ValueError for any other aggregate, and for "constant" without max_new_tokens.
    """
    N = mask.any(dim=1).sum().clamp(min=1)
    if aggregate == "sequence":
        return mask / (N * mask.sum(dim=1, keepdim=True).clamp(min=1))
    if aggregate == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregate == "constant" and max_new_tokens:
        return mask / (N * max_new_tokens)
    raise ValueError(f'want aggregate sequence, token, or constant with a limit, not "{aggregate}"')


def grpo_loss(
    logp, logp_old, logp_ref, advantages, weights, clip_low=0.2, clip_high=0.2, kl_beta=0.04
):
    """Compute the GRPO loss: eq. 3 with the sign flipped, since optimizers minimise.

      J = sum_i sum_t  weight[i,t] * { min(ratio * A, clip(ratio) * A) - beta * KL[i,t] }

    logp, logp_old, logp_ref, weights: (N, T). logp_ref may be None if kl_beta is 0. advantages:
    (N,), (N, 1) or (N, T). weights: from `token_weights` for the whole batch. The rows may be
    a micro-batch: the losses of all micro-batches add up to that of the batch.

    Returns (loss, diagnostics): a scalar, and floats that add up as well: loss; clip_share, the
    weight of the tokens whose gradient the clip took away; kl, if there is a logp_ref. Raises
    ValueError if the KL term lacks its reference or the shapes do not fit.

    In the first update after sampling every ratio is 1. With outcome rewards and "sequence"
    weights, the products weight * A then add up to 0 over a group, and the loss prints as 0, plus
    the KL term. This is not a bug. d ratio / d logp is the ratio, here 1, so token t has the
    gradient weight * A * grad logp_t. Each grad logp_t is different, so they do not cancel
    (test_the_loss_is_zero_on_policy_but_its_gradient_is_not).
    """
    if kl_beta and logp_ref is None:
        raise ValueError("kl_beta is not 0, so the KL term needs logp_ref")
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # (N, 1)
    shapes = [tuple(x.shape) for x in (weights, logp, logp_old, logp_ref) if x is not None]
    if len(set(shapes)) > 1 or advantages.shape not in (weights.shape, (len(weights), 1)):
        raise ValueError(f"the shapes do not fit: {shapes}, advantages {tuple(advantages.shape)}")

    # TRAP: if padding holds inf or nan, a weight of 0 gives nan, in the backward pass as well.
    # Therefore padding is set to 0 before anything is computed (test_padding_may_hold_anything).
    padding = weights == 0
    logp = logp.masked_fill(padding, 0.0)
    logp_old = logp_old.masked_fill(padding, 0.0)
    advantages = advantages.expand_as(weights).masked_fill(padding, 0.0)

    objective = clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)  # (N, T)
    unclipped = (logp - logp_old).detach().exp() * advantages
    clipped = objective < unclipped  # where min chose the clipped term
    diagnostics = {"clip_share": (weights * clipped).sum().item()}
    if logp_ref is not None:
        kl = kl_estimate(logp, logp_ref.masked_fill(padding, 0.0))  # (N, T)
        objective = objective - kl_beta * kl
        diagnostics["kl"] = (weights * kl).sum().item()
    loss = -(weights * objective).sum()
    return loss, diagnostics | {"loss": loss.item()}


# --- 3. The batch -------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the loss of one step needs: B questions, N completions, the tensors of eq. 3."""

    prompt_ids: torch.Tensor  # (B, P) padded on the left
    prompt_mask: torch.Tensor  # (B, P) bool
    completion_ids: torch.Tensor  # (N, T) padded on the right
    mask: torch.Tensor  # (N, T) bool, true up to and including the first EOS
    question: torch.Tensor  # (N,) the row of prompt_ids that each completion answers
    advantages: torch.Tensor  # (N, T)
    weights: torch.Tensor  # (N, T) how much each token counts in the loss
    logp_old: torch.Tensor  # (N, T)
    logp_ref: torch.Tensor  # (N, T)

    def rows(self, index):
        """Take some rows, with their prompts, and cut off columns that only hold padding."""
        index = torch.as_tensor(index, device=self.mask.device)
        asked, question = torch.unique(self.question[index], return_inverse=True)
        P = self.prompt_mask[asked].sum(dim=1).max()
        T = self.mask[index].sum(dim=1).max()
        prompt_ids, prompt_mask = (x[asked, -P:] for x in self[:2])
        completion_ids, mask = (x[index, :T] for x in self[2:4])
        others = [x[index, :T] for x in self[5:]]
        return Batch(prompt_ids, prompt_mask, completion_ids, mask, question, *others)


def micro_batches(batch, limit):
    """Cut a batch into lists of row numbers with at most `limit` tokens, padding included.

    P, the width of prompt_ids, counts once per row, since each row holds a copy of its prompt's
    keys and values. A row longer than the limit goes alone. Rows of similar length go
    together, so that there is little padding. The cut changes memory, time and rounding only: the
    losses add up.
    """
    P = batch.prompt_ids.shape[1]
    lengths = batch.mask.sum(dim=1).tolist()
    lists = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lists[-1] and (len(lists[-1]) + 1) * (P + lengths[row]) > limit:
            lists.append([])
        lists[-1].append(row)
    return lists


# --- 4. Grouped sampling ------------------------------------------------------------------------


class Samples(NamedTuple):
    """What `sample_groups` returns: N = B * group_size rows, question-major."""

    completion_ids: torch.Tensor  # (N, T) padded on the right to T = max_new_tokens
    mask: torch.Tensor  # (N, T) bool, true up to and including the first EOS
    logp: torch.Tensor  # (N, T) the sampler's own log-probs, 0 where mask is false
    truncated: torch.Tensor  # (N,) bool, true for completions cut off by max_new_tokens


@torch.no_grad()
def sample_groups(
    model,
    prompt_ids,
    prompt_mask,
    group_size,
    max_new_tokens,
    eos_ids,
    pad_id,
    temperature=1.0,
    generator=None,
):
    """Sample `group_size` completions for each of B prompts: "a group of outputs" in section 4.1.

    The prompts go through the model once. Their keys and values (the KV cache) are repeated G
    times. Then each forward pass takes one new token per row. Finished rows are dropped
    once they are an eighth of the rows held.

    prompt_ids, prompt_mask: (B, P), padded on the left. eos_ids: the ids that end a completion.
    pad_id: fills up rows that have ended; it may be an EOS id. temperature: 0 is greedy.
    generator: on the model's device. Returns `Samples`. Raises ValueError for a group_size or
    max_new_tokens below 1, or a temperature below 0.

    TRAP: the library's generate() also obeys the model folder's generation_config (top_k,
    repetition_penalty), so it samples from a different policy than the one trained. This function
    reads only its arguments (test_hostile_generation_config_is_ignored).
    """
    if group_size < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError("group_size and max_new_tokens must be at least 1, temperature at least 0")
    P = prompt_ids.shape[1]
    N = len(prompt_ids) * group_size
    device = prompt_ids.device
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    was_training = model.training
    model.eval()

    prompts = forward(model, prompt_ids, prompt_mask, logits_to_keep=1)  # the last logits only
    # Each prompt gets G rows. repeat_interleave gives [q0, q0, q1, q1]: question-major.
    logits = prompts.logits[:, -1].repeat_interleave(group_size, dim=0)  # (N, V)
    cache = prompts.past_key_values
    cache.batch_repeat_interleave(group_size)
    preallocate(cache, max_new_tokens)  # the same numbers, faster: section 7
    attention_mask = pad(prompt_mask, (0, max_new_tokens), value=1)  # (B, P + T)
    attention_mask = attention_mask.repeat_interleave(group_size, dim=0)  # (N, P + T)

    completion_ids = torch.full((N, max_new_tokens), pad_id, dtype=torch.long, device=device)
    logp = torch.zeros((N, max_new_tokens), dtype=at_least_float32(logits).dtype, device=device)
    rows = torch.arange(N, device=device)  # (n,) the rows that logits, cache and so on still hold
    running = torch.ones(N, dtype=torch.bool, device=device)  # (n,) which of them have no EOS yet
    for t in tqdm(range(max_new_tokens), desc="tokens", delay=5, leave=False):
        token, token_logp = sample_token(logits, temperature, generator)  # both (n,)
        completion_ids[rows, t] = token
        logp[rows, t] = token_logp
        running = running & ~torch.isin(token, eos)
        left = running.sum().item()  # waits for the GPU
        if left == 0 or t + 1 == max_new_tokens:
            break
        # Copying the cache costs time, so finished rows stay until they are 1/8 of `rows`.
        if left <= 7 / 8 * len(rows):
            stay = running.nonzero().squeeze(1)
            rows = rows[stay]
            token = token[stay]
            running = running[stay]
            attention_mask = attention_mask[stay]
            cache.batch_select_indices(stay)
        seen = attention_mask[:, : P + t + 1]
        logits = forward(model, token[:, None], seen, cache, logits_to_keep=1).logits[:, -1]

    model.train(was_training)
    mask = completion_mask(completion_ids, eos_ids)
    truncated = ~torch.isin(completion_ids, eos).any(dim=1)
    # Rows kept past their EOS got more tokens: turn these into padding.
    completion_ids = completion_ids.masked_fill(~mask, pad_id)
    return Samples(completion_ids, mask, logp.masked_fill(~mask, 0.0), truncated)


def sample_token(logits, temperature, generator=None):
    """Draw one token per row from p = softmax(logits / temperature).

    logits: (n, V). Returns (token, logp), both (n,). Temperature 0 takes the likeliest token, with
    its log-prob at temperature 1.
    """
    # TRAP: in bf16 a log-prob is off by up to 0.08, and the clip range is 0.2
    # (test_a_bf16_model_gives_float32_logprobs).
    p = torch.softmax(at_least_float32(logits) / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature == 0:
        token = p.argmax(dim=-1, keepdim=True)  # (n, 1)
    else:
        # Take the first token at which the running sum of p reaches u, uniform in (0, sum of p].
        # One random number per row: torch.multinomial draws V of them, which takes a CPU 5 to 20
        # times as long.
        cdf = p.cumsum(dim=-1)
        draw = torch.rand(len(p), 1, generator=generator, dtype=p.dtype, device=p.device)
        u = cdf[:, -1:] * (1 - draw)  # (n, 1)
        token = torch.searchsorted(cdf, u).clamp(max=p.shape[1] - 1)  # with nan in p, it returns V
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def completion_mask(completion_ids, eos_ids):
    """Mark the tokens of a completion that count: up to and including the first EOS.

    (N, T) int64 -> (N, T) bool. With EOS = 9:
    [5, 6, 9, 9] -> [1, 1, 1, 0];  [5, 6, 7, 8] -> [1, 1, 1, 1];  [9, 9] -> [1, 0]

    TRAP: many tokenizers pad with the EOS token. A mask by value (`!= pad_id`) then hides the EOS
    itself, and the model never learns to stop. So the mask goes by position
    (test_eos_token_is_trained).
    """
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=completion_ids.device)
    is_eos = torch.isin(completion_ids, eos).long()
    return is_eos.cumsum(dim=1) - is_eos == 0  # the number of EOS before this token is 0


# --- 5. Log-probs: log pi(o_t | q, o_<t) --------------------------------------------------------


def token_logprobs(
    model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question=None
):
    """Compute the log-prob of every completion token, and the entropy at its position.

    prompt_ids, prompt_mask: (B, P); completion_ids, mask: (N, T); question: (N,), which of the B
    prompts each completion answers (None: question-major); temperature: as in sampling.
    Returns (logp, entropy), both (N, T), in nats, at least float32, 0 where mask is false. Only
    logp carries a gradient. Raises ValueError for a temperature that is not above 0.

    As in sampling, each of the B prompts goes through the model once. Its keys and values are
    copied for its completions, and gradients flow back through the copies. With V = 150,000 the
    logits would be by far the largest tensor, so only the tokens that count reach the vocabulary
    head, a chunk at a time.
    """
    # TRAP: score at the sampling temperature: at any other, it is a different policy
    # (test_rescored_logprobs_equal_the_samplers).
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to score samples, not {temperature}")
    N = len(completion_ids)
    if question is None:
        question = torch.arange(N, device=mask.device) // (N // len(prompt_ids))
    prompts = forward(model.base_model, prompt_ids, prompt_mask)  # states (B, P, D), and a cache
    cache = prompts.past_key_values
    cache.batch_select_indices(question)  # from B rows to N
    # Padding after a completion needs no mask: causal attention never looks ahead.
    behind = torch.ones_like(completion_ids)
    attention_mask = torch.cat([prompt_mask[question].to(behind), behind], dim=1)  # (N, P + T)
    completions = forward(model.base_model, completion_ids, attention_mask, cache)  # (N, T, D)

    # The state at a token predicts the next one: the last state of the prompt predicts token 0,
    # and the state at the last token has nothing to predict.
    first = prompts.last_hidden_state[question, -1:]  # (N, 1, D)
    states = torch.cat([first, completions.last_hidden_state[:, :-1]], dim=1)  # (N, T, D)
    states = states[mask]  # (M, D), M tokens that count
    targets = completion_ids[mask]  # (M,)

    head = model.get_output_embeddings()
    size = max(1, HEAD_LOGITS // len(model.get_input_embeddings().weight))  # tokens per chunk
    # checkpoint keeps no logits: it computes them again in the backward pass, a chunk at a time.
    # That would be useless for a single chunk.
    run = partial(checkpoint, logp_and_entropy, use_reentrant=False)
    if len(states) <= size:
        run = logp_and_entropy
    parts = []
    for h, y in zip(states.split(size), targets.split(size), strict=True):
        parts.append(run(head, h, y, temperature))
    values, entropies = (torch.cat(x) for x in zip(*parts, strict=True))  # (M,), (M,)
    zeros = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(mask, values), zeros.masked_scatter(mask, entropies)


def logp_and_entropy(head, states, targets, temperature):
    """Apply the vocabulary head: states (m, D), targets (m,) -> logp (m,), entropy (m,)."""
    logits = at_least_float32(head(states)) / temperature  # (m, V)
    logp = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def forward(model, ids, attention_mask, cache=None, **options):
    """Run a model on s new tokens per row, ids (n, s), that follow those in the cache.

    attention_mask: (n, tokens in the cache + s), false for padding on the left. Returns the
    model's own output object, with the cache, to which the new tokens have been added.

    TRAP: the position of a token is counted without the padding on its left. Otherwise a short
    prompt in a batch starts at position 5 or 50, and its log-probs are wrong in models with
    absolute positions, such as GPT-2 (test_left_padding_changes_nothing).
    """
    attention_mask = attention_mask.long()
    position = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        **options,
    )


def at_least_float32(x):
    """Convert bf16, integers and bools to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bf16_weights(model):
    """Turn the parameters of a model into bf16, in place, and return it.

    TRAP: model.to(torch.bfloat16) also rounds the frequencies of rotary positions, which are a
    buffer. At position 500 the angles are then off by up to 0.5 radians
    (test_rotary_frequencies_stay_float32).
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


# --- 6. Which models are supported? -------------------------------------------------------------


@torch.no_grad()
def check_model(model):
    """Raise ValueError if sampling or log-probs would be wrong for a model.

    It refuses three kinds: models that keep some state besides keys and values, such as Mamba;
    models whose logits are not just the vocabulary head applied to the last state, such as Gemma 2,
    Cohere and Granite; models whose log-probs differ with a cache and padding.
    """
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or attention
    if model._is_stateful or not attention.issuperset(kinds):
        raise ValueError("it keeps state other than a cache of keys and values")

    head = model.get_output_embeddings()
    ids = torch.tensor([[1, 1, 1, 2, 3], [4, 5, 6, 7, 8]], device=model.device)
    # States so large that a soft cap on the logits would show.
    expected = head(1000 * model.base_model(input_ids=ids).last_hidden_state)
    with head.register_forward_pre_hook(lambda module, states: (1000 * states[0],)):
        difference = model(input_ids=ids).logits - expected
    if not difference.abs().max() < 1e-3 * expected.abs().max():
        raise ValueError("its logits are not just the vocabulary head of its last state")

    prompt_mask = ids.cumsum(dim=1) > 3  # a prompt of 2 tokens, and one of 5
    samples = sample_groups(model, ids, prompt_mask, 1, 8, [], pad_id=1, temperature=0)
    logp, _ = token_logprobs(model, ids, prompt_mask, samples.completion_ids, samples.mask, 1.0)
    alone = torch.cat([ids[:1, 3:], samples.completion_ids[:1]], dim=1)  # (1, 2 + 8)
    plain = torch.log_softmax(model(input_ids=alone).logits[:, 1:-1], dim=-1)  # (1, 8, V)
    plain = plain.gather(2, alone[:, 2:, None]).squeeze(2)  # (1, 8)
    gap = torch.cat([logp[:1] - plain, samples.logp[:1] - plain]).abs().max()
    if not gap < 1e-2:
        raise ValueError(f"its log-probs with padding and a cache are off by {gap:.2g}")


# --- 7. The same numbers, faster ----------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """Keep the keys and values of one layer, (n, heads, tokens, head_dim), in reserved memory.

    Attention hands each new token to `update`. To append one token, the library's DynamicLayer
    copies all that it holds.
    """

    def __init__(self, layer, max_new_tokens):
        super().__init__()
        self.is_initialized = True
        self.reserved = [pad(x, (0, 0, 0, max_new_tokens)) for x in (layer.keys, layer.values)]
        self.show(layer.get_seq_length())

    def show(self, tokens):
        self.keys, self.values = (x[:, :, :tokens] for x in self.reserved)

    def update(self, *states, **options):
        start = self.get_seq_length()
        end = start + states[0].shape[2]
        for x, new in zip(self.reserved, states[:2], strict=True):  # keys, values
            x[:, :, start:end] = new
        self.show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.reserved = [x[indices] for x in self.reserved]
        self.show(self.get_seq_length())


def preallocate(cache, max_new_tokens):
    """Reserve room for max_new_tokens in each plain layer of a cache, not in sliding windows."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(layer, max_new_tokens)
