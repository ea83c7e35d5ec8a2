"""What the tests call. For a course: blank the bodies in grpo.py, or point these lines at another module.

Each docstring is the contract: arguments, shapes, what comes out, and the equation of DeepSeekMath (arXiv 2402.03300)
that it has to be. B questions, G completions of each, N = B * G rows, question-major: rows 0 ... G-1 belong to
question 0. P prompt tokens, padded on the left; T completion tokens, padded on the right; V the vocabulary; K steps.
"""

import grpo
import reward

Samples, PreallocatedLayer, RewardModel = grpo.Samples, grpo.PreallocatedLayer, reward.RewardModel


# --- grpo.py: sampling and log-probs ----------------------------------------------------------------

def bf16_weights(model):
    """The same model with bf16 parameters; its buffers, the frequencies of rotary positions say, stay float32."""
    return grpo.bf16_weights(model)


def completion_mask(completion_ids, eos_ids):
    """(N, T) ids -> (N, T) bool: true up to and including the first id of the set eos_ids; all true without one."""
    return grpo.completion_mask(completion_ids, eos_ids)


def sample_token(logits, temperature, generator=None):
    """(n, V) -> (ids (n,), their log-probs (n,)), drawn from softmax(logits / temperature), in float32 at least.

    The token is the first one at which the sum of probabilities so far reaches (1 - torch.rand(n, 1)) of the whole sum.
    Temperature 0 takes the likeliest token, with its log-prob at temperature 1. A token of probability 0 never comes, not
    even at the ends of the range of torch.rand; logits that are nan give log-probs that are nan, and an id below V.
    """
    return grpo.sample_token(logits, temperature, generator)


def sample_groups(model, prompt_ids, prompt_mask, group_size, max_new_tokens, eos_ids, pad_id, temperature=1.0,
                  generator=None):
    """G completions for each of B prompts (B, P) -> Samples: ids, mask, log-probs (N, T), T = max_new_tokens;
    truncated (N,), true where no EOS came. Nothing but the arguments decides what is drawn; ValueError for a group_size
    or max_new_tokens below 1, or a temperature below 0. Each prompt goes through the model once; rows that have ended
    leave the batch; the model's mode (train or eval) is what it was; the cache is made of PreallocatedLayers.
    """
    return grpo.sample_groups(model, prompt_ids, prompt_mask, group_size, max_new_tokens, eos_ids, pad_id, temperature,
                              generator)


def token_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question=None):
    """log pi(o_t | q, o_<t) at the temperature of the sampling, and the entropy there: both (N, T), 0 where mask is
    false, at least float32; only the first has a gradient. question (N,): the row of prompt_ids that each completion
    answers (None: question-major). ValueError for a temperature that is not above 0. Each prompt goes through the model
    once, all T tokens of a completion behind it; tokens that count reach the head in chunks of HEAD_LOGITS / V, and if there are several, their logits are not kept
    but computed again in the backward pass.
    """
    return grpo.token_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask, temperature, question)


def head_is_plain(model):
    """Whether logits are the output embedding of the body's states and nothing else, no scale and no cap of the model's
    own. The answer is remembered as model._head_is_plain.
    """
    return grpo.head_is_plain(model)


def cache_gap(model):
    """The largest difference of log-probs as sampled, with a cache, and as scored, a prompt for each row: a float near 0."""
    return grpo.cache_gap(model)


def micro_batches(rows, prompt_mask, mask, limit):
    """Row numbers, each once, in lists of at most `limit` tokens (rows times the longest prompt + completion)."""
    return grpo.micro_batches(rows, prompt_mask, mask, limit)


def score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, temperature):
    """log-probs, entropy, mask (n, t) of some rows, without columns that are padding in all of them."""
    return grpo.score_rows(model, rows, prompt_ids, prompt_mask, completion_ids, mask, temperature)


# --- grpo.py: the paper -----------------------------------------------------------------------------

def outcome_advantages(rewards, scale="std"):
    """(B, G) -> (B, G). Section 4.1.2: (r - mean) / (std + 1e-4) of its own group, std with divisor G - 1; "none":
    r - mean. At least float32, whatever the rewards are. Rewards of a group that differ by less than 1e-6 give exactly 0.
    ValueError unless rewards have two dimensions with G at least 2, and for another scale.
    """
    return grpo.outcome_advantages(rewards, scale)


def process_advantages(rewards, ends, mask, group_size, scale="std"):
    """(N, K) rewards of steps and the tokens that end them (-1: no step) -> (N, T). Section 4.1.3: the rewards are
    normalised as above over all steps of the group; a token gets the sum over the steps that end at it or behind it, and
    0 where mask is false. Steps that are all alike, or a single one, give exactly 0. ValueError for another scale.
    """
    return grpo.process_advantages(rewards, ends, mask, group_size, scale)


def kl_estimate(logp, logp_ref):
    """(N, T) -> (N, T). Eq. 4: pi_ref/pi - log(pi_ref/pi) - 1, finite for any two log-probs."""
    return grpo.kl_estimate(logp, logp_ref)


def clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high):
    """-> (N, T). Eq. 3: min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = pi/pi_old, finite."""
    return grpo.clipped_surrogate(logp, logp_old, advantages, clip_low, clip_high)


def loss_denominator(mask, aggregate="sequence", max_completion_tokens=None):
    """(N, T) -> float, at least 1: rows that have tokens ("sequence"), tokens ("token"), or rows * limit ("constant")."""
    return grpo.loss_denominator(mask, aggregate, max_completion_tokens)


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, **options):
    """-> (scalar, {"clip_share", "kl"}). Eq. 3 with its sign turned: the mean over rows of the mean over their tokens
    of -(surrogate - kl_beta * KL). clip_share: the share of tokens with A > 0 and ratio > 1 + clip_high, or A < 0 and ratio
    < 1 - clip_low; kl: the mean of KL over tokens, if there is a logp_ref. What is outside the mask changes nothing, inf
    and nan neither. options: clip_low, clip_high, kl_beta, aggregate, max_completion_tokens, denominator.
    """
    return grpo.grpo_loss(logp, logp_old, logp_ref, advantages, mask, **options)


# --- reward.py --------------------------------------------------------------------------------------

def extract_answer(completion):
    """str -> str or None: the last box, else the last <answer>, else the last line "#### "."""
    return reward.extract_answer(completion)


def clean(text):
    """str -> str: one spelling for what means the same; "" if there is too much of it."""
    return reward.clean(text)


def parse(text):
    """A cleaned text -> its value at three points, exact where it can be, or None if it is not understood."""
    return reward.parse(text)


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
    """str -> [(end in characters, 1.0 or 0.0), ...] of the steps that can be checked; section 4.1.3 needs them."""
    return reward.step_rewards(completion)


def score_texts(function, problems, texts):
    """Rewards of N texts by a user's function, as floats; InputError names the first text that has none."""
    return reward.score_texts(function, problems, texts)


def load_reward(name):
    """The function that FILE.py:FUNCTION names; accuracy_rewards for "" and "model". InputError if there is none."""
    return reward.load_reward(name)


def score(model, examples, size=32):
    """A reward model's probability of "right" at each end of each example: a list of lists."""
    return reward.score(model, examples, size)


def fit(model, examples, lr, epochs=3, size=8):
    """Train a reward model on (ids, ends, labels): each example once an epoch, `size` of them a step."""
    return reward.fit(model, examples, lr, epochs, size)
