"""What the tests call. To test other code, point these lines at it.

Each docstring is the contract: arguments, shapes, what comes out, and the equation of DeepSeekMath
(arXiv 2402.03300) that it has to be. B questions, G completions of each, N = B * G rows,
question-major: rows 0 ... G-1 belong to question 0. P prompt tokens, padded on the left; T
completion tokens, padded on the right; V the vocabulary; K steps.
"""

import grpo
import reward

Batch = grpo.Batch
Samples = grpo.Samples
LearnedReward = reward.LearnedReward

STD_EPSILON = 1e-4  # what the tests expect beside the standard deviation of a group


# --- grpo.py: advantages and the objective ------------------------------------------------------


def outcome_advantages(rewards, scale="std"):
    """(B, G) -> (B, G). Section 4.1.2: (r - mean) / (std + STD_EPSILON) of its own group; std with
    divisor G - 1. "none": r - mean. At least float32. Rewards of a group that differ by less than
    1e-6 give exactly 0. ValueError unless rewards are (B, G), G at least 2, and for another scale.
    """
    return grpo.outcome_advantages(rewards, scale)


def process_advantages(rewards, ends, mask, group_size, scale="std"):
    """(N, K) rewards of steps and the tokens that end them (-1: no step) -> (N, T). Section 4.1.3:
    the rewards are normalised as above over all steps of the group. A token gets the sum over the
    steps that end at it or behind it, and 0 where mask is false. Steps that are all alike, or a
    single one, give exactly 0. ValueError for another scale.
    """
    return grpo.process_advantages(rewards, ends, mask, group_size, scale)


def clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high):
    """-> (N, T). Eq. 3: min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), where ratio =
    pi/pi_old; finite for any two log-probs.
    """
    return grpo.clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)


def kl_estimate(logp, logp_ref):
    """(N, T) -> (N, T). Eq. 4: pi_ref/pi - log(pi_ref/pi) - 1. It stays finite where pi_ref/pi is
    large, and keeps its gradient where pi_ref/pi is small.
    """
    return grpo.kl_estimate(logp, logp_ref)


def token_weights(mask, aggregate="sequence", max_new_tokens=None):
    """(N, T) bool -> (N, T), 0 where mask is false. "sequence": 1/N * 1/|o_i| (eq. 3); "token": 1 /
    tokens; "constant": 1/N * 1/max_new_tokens. N counts the rows that have tokens. ValueError for
    another aggregate, and for "constant" without max_new_tokens.
    """
    return grpo.token_weights(mask, aggregate, max_new_tokens)


def grpo_loss(logp, logp_old, logp_ref, advantages, weights, **options):
    """-> (scalar, {"loss", "clip_share", "kl"} as floats). Eq. 3 with its sign turned: the sum of
    -weight * (surrogate - kl_beta * KL). clip_share: the weight of the tokens with A > 0 and ratio
    > 1 + clip_high, or A < 0 and ratio < 1 - clip_low; kl: the weighted sum of KL, if there is a
    logp_ref, which may be None if kl_beta is 0. advantages: (N,), (N, 1) or (N, T). Where a weight
    is 0, not even inf or nan has an effect. options: clip_low and clip_high (0.2), kl_beta (0.04).
    ValueError if the KL term lacks its reference, and for shapes that do not fit.
    """
    return grpo.grpo_loss(logp, logp_old, logp_ref, advantages, weights, **options)


def micro_batches(batch, limit):
    """Row numbers, each once, the shortest completions first, in lists as full as `limit` allows:
    rows * (P + longest completion). A row that is longer stands alone.
    """
    return grpo.micro_batches(batch, limit)


# --- grpo.py: sampling and log-probs ------------------------------------------------------------


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
    """G completions for each of B prompts (B, P) -> Samples: ids, mask, log-probs (N, T), with T =
    max_new_tokens; truncated (N,), true where no EOS came. Only the arguments decide what is drawn.
    Each prompt goes through the model once; rows that have ended leave, once they are an eighth of
    those still there; the model stays in its mode (train or eval). ValueError, whose text says "at
    least", for group_size or max_new_tokens below 1, or temperature below 0.
    """
    return grpo.sample_groups(
        model,
        prompt_ids,
        prompt_mask,
        group_size,
        max_new_tokens,
        eos_ids,
        pad_id,
        temperature,
        generator,
    )


def sample_token(logits, temperature, generator=None):
    """(n, V) -> (ids (n,), log-probs (n,)), drawn from softmax(logits / temperature), at least in
    float32. The token is the first at which the sum of probabilities so far reaches (1 -
    torch.rand(n, 1)) of the whole sum. Temperature 0 takes the likeliest one, with its log-prob at
    temperature 1. A token of probability 0 never comes; nan gives log-probs of nan, ids below V.
    """
    return grpo.sample_token(logits, temperature, generator)


def completion_mask(completion_ids, eos_ids):
    """(N, T) ids -> (N, T) bool: true up to and including the first id of the set eos_ids; all true
    without one.
    """
    return grpo.completion_mask(completion_ids, eos_ids)


def token_logprobs(
    model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question=None
):
    """log pi(o_t | q, o_<t) at the sampling's temperature, and the entropy: both (N, T), 0 where
    mask is false, at least float32; only the first has a gradient. question (N,): the row of
    prompt_ids that each completion answers (None: question-major). Each prompt goes through the
    model once, all tokens of a completion behind it. Only tokens that count reach the head, in
    chunks of HEAD_LOGITS / V tokens; if there are several, the backward pass computes their logits
    again. ValueError for a temperature that is not above 0.
    """
    return grpo.token_logprobs(
        model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question
    )


def bf16_weights(model):
    """The same model with bf16 parameters; buffers, such as rotary frequencies, stay float32."""
    return grpo.bf16_weights(model)


def check_model(model):
    """ValueError for a model that keeps another state than keys and values, that changes its logits
    after the head, or whose log-probs with padding and a cache are not those without.
    """
    return grpo.check_model(model)


# --- reward.py ----------------------------------------------------------------------------------


def extract_answer(completion):
    """str -> str or None: the last box, even if it is empty, else the last <answer>, else the last
    line "#### " that has a value, else the last of these lines. A megabyte takes below 0.06 s.
    """
    return reward.extract_answer(completion)


def clean(text):
    """str -> str: one spelling for what means the same; "" if there is too much of it."""
    return reward.clean(text)


def value_of(text):
    """A cleaned text -> its value at three points, exact where it can be, or None."""
    return reward.value_of(text)


def is_equivalent(answer, gold):
    """str, str -> bool: whether they mean the same, by the conventions at the top of reward.py."""
    return reward.is_equivalent(answer, gold)


def accuracy_reward(completion, gold):
    """1.0 if the marked answer is equivalent to gold, else 0.0. Never raises."""
    return reward.accuracy_reward(completion, gold)


def accuracy_rewards(prompts, completions, answer, **kwargs):
    """N texts or chats, N golds or worked solutions -> N floats."""
    return reward.accuracy_rewards(prompts, completions, answer, **kwargs)


def final_answer(solution):
    """What stands behind the last "#### " of a worked solution, or all of it."""
    return reward.final_answer(solution)


def step_rewards(completion):
    """str -> [(end in characters, 1.0 or 0.0), ...] of the steps that can be checked."""
    return reward.step_rewards(completion)


def load_reward(name):
    """The function that FILE.py:FUNCTION names; accuracy_rewards for "". Or InputError."""
    return reward.load_reward(name)


def ask_reward(function, prompts, completions, answer):
    """Rewards of N texts by any reward, as floats. It gets copies of the lists. InputError if it
    fails, or does not return N finite numbers.
    """
    return reward.ask_reward(function, prompts, completions, answer)
