"""Advantages, KL, the clipped surrogate and the loss: every equation by worked numbers, in float64."""

import math

import pytest
import torch

from adapters import (
    clipped_surrogate,
    completion_mask,
    grpo_loss,
    kl_estimate,
    loss_denominator,
    outcome_advantages,
    process_advantages,
)
from helpers import DEVICE, generator


def t(values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


# What a failure names.
OUTCOME = "section 4.1.2: A_hat[i] = (r_i - mean(r)) / std(r), over the group of one question"
PROCESS = (
    "section 4.1.3: A_hat[i,t] = sum of the normalised rewards of the steps that end at or behind t"
)
UNIFIED = "eq. 5, table 10: grad J = E[1/|o| * sum_t GC * grad log pi(o_t)], GC = A_hat + beta * (pi_ref/pi - 1) for GRPO"
KL = "eq. 4: KL = pi_ref/pi - log(pi_ref/pi) - 1"
CLIP = "eq. 3: min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)"
LOSS = "eq. 3: J = 1/G * sum_i 1/|o_i| * sum_t {min(ratio * A, clip(ratio) * A) - beta * KL}, the loss is -J"


def close(equation, got, expected, tolerance=1e-9):
    expected = expected if torch.is_tensor(expected) else t(expected)
    torch.testing.assert_close(
        got,
        expected,
        rtol=0,
        atol=tolerance,
        msg=lambda text: (
            f"{equation}\nexpected {expected.tolist()}\ngot      {got.tolist()}\n{text}"
        ),
    )


# --- Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, eos_ids, expected",
    [
        (
            [5, 6, 9, 9, 9],
            [9],
            [1, 1, 1, 0, 0],
        ),  # up to and including the first EOS, although pad == EOS
        ([5, 6, 7, 8, 5], [9], [1, 1, 1, 1, 1]),  # no EOS: everything counts
        ([9, 9, 9, 9, 9], [9], [1, 0, 0, 0, 0]),  # an empty completion still has its EOS
        ([5, 8, 9, 5, 9], [8, 9], [1, 1, 0, 0, 0]),  # two EOS ids: the first of either
        ([5, 9, 8, 5, 9], [8, 9], [1, 1, 0, 0, 0]),
        (
            [0, 5, 0, 9, 0],
            [9],
            [1, 1, 1, 1, 0],
        ),  # the pad id inside a completion is a token like any other
        ([5, 6, 7, 8, 9], [], [1, 1, 1, 1, 1]),
    ],
)
def test_mask_goes_up_to_and_including_the_first_eos(ids, eos_ids, expected):
    assert completion_mask(torch.tensor([ids]), eos_ids).tolist() == [[bool(x) for x in expected]]


def test_eos_token_is_trained():
    ids = torch.tensor([[5, 9, 9], [5, 6, 9]])  # 9 is EOS and padding
    mask = completion_mask(ids, [9])
    logp = t([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    loss, _ = grpo_loss(logp, logp.detach(), None, t([1.0, 1.0]), mask, kl_beta=0)
    loss.backward()
    close(
        LOSS, logp.grad, [[-0.25, -0.25, 0.0], [-1 / 6, -1 / 6, -1 / 6]]
    )  # -1/2 * 1/|o_i|, EOS included, pad not


# --- 4.1.2: advantages ------------------------------------------------------------------------------


def test_advantages_by_hand():
    # mean 1/4; sample variance (9/16 + 3 * 1/16) / 3 = 1/4, so std 1/2 (the population's would be 0.433)
    close(
        OUTCOME,
        outcome_advantages(t([[1, 0, 0, 0]])),
        [[0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001]],
    )
    close(
        OUTCOME, outcome_advantages(t([[1, 0, 0, 0]]), scale="none"), [[0.75, -0.25, -0.25, -0.25]]
    )


def test_groups_do_not_mix():
    rewards = t([[10.0, 12.0, 11.0, 10.0], [0.0, 1.0, 0.0, 0.0]])
    together = outcome_advantages(rewards)
    close(OUTCOME, together.sum(dim=1), [0.0, 0.0])
    close(
        OUTCOME,
        together,
        torch.cat([outcome_advantages(rewards[:1]), outcome_advantages(rewards[1:])]),
    )


@pytest.mark.parametrize(
    "group", [[0.0] * 4, [1.0] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [1e-9, 0.0, 0.0, 0.0]]
)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_exactly_zero(group, scale):
    assert outcome_advantages(t([group]), scale).tolist() == [[0.0] * 4]


def test_advantages_do_not_depend_on_shift_or_scale_of_rewards():
    rewards = t([[1.0, 3.0, 2.0, 7.0]])
    close(
        OUTCOME, outcome_advantages(rewards), outcome_advantages(100 * rewards - 5), tolerance=1e-3
    )  # 1e-4 beside the std
    close(OUTCOME, outcome_advantages(rewards), outcome_advantages(rewards - 5))


def test_integer_and_bf16_rewards_are_computed_in_float32():
    for dtype in (torch.int64, torch.bfloat16, torch.bool):
        advantages = outcome_advantages(torch.tensor([[1, 0, 0, 0]]).to(dtype))
        assert advantages.dtype == torch.float32
        close(
            OUTCOME, advantages.double(), [[0.75 / 0.5001] + [-0.25 / 0.5001] * 3], tolerance=1e-6
        )


@pytest.mark.parametrize(
    "rewards, scale", [([[1.0]], "std"), ([1.0, 0.0], "std"), ([[1.0, 0.0]], "batch")]
)
def test_a_group_of_one_and_unknown_scales_are_refused(rewards, scale):
    with pytest.raises(ValueError):
        outcome_advantages(t(rewards), scale)


# --- 4.1.3: process advantages ----------------------------------------------------------------------


def test_process_advantages_by_hand():
    """Steps [1, 0, 1] that end at tokens 1, 3, 4, and [0] at 2: mean 1/2, variance 4 * 1/4 / 3, std 0.57735."""
    rewards, ends = t([[1, 0, 1], [0, 9, 9]]), torch.tensor([[1, 3, 4], [2, -1, -1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    up = 0.5 / (1 / math.sqrt(3) + 1e-4)
    close(
        PROCESS,
        process_advantages(rewards, ends, mask, 2),
        [
            [
                up,
                up,
                0,
                0,
                up,
                0,
            ],  # +up -up +up, then -up +up, then +up: the token that ends a step belongs to it
            [-up, -up, -up, 0, 0, 0],
        ],
    )
    close(
        PROCESS,
        process_advantages(rewards, ends, mask, 2, scale="none"),
        [[0.5, 0.5, 0, 0, 0.5, 0], [-0.5, -0.5, -0.5, 0, 0, 0]],
    )


def test_tokens_behind_the_last_step_get_nothing():
    mask = torch.ones(2, 5).bool()
    advantages = process_advantages(t([[1.0], [0.0]]), torch.tensor([[2], [0]]), mask, 2)
    up = 0.5 / (math.sqrt(0.5) + 1e-4)  # mean 1/2, variance 2 * 1/4 / 1
    close(PROCESS, advantages, [[up, up, up, 0, 0], [-up, 0, 0, 0, 0]])


def test_tokens_that_do_not_count_get_nothing_wherever_a_step_ends():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    advantages = process_advantages(t([[1.0], [0.0]]), torch.tensor([[3], [2]]), mask, 2)
    assert ((advantages != 0) == mask).all()


def test_one_step_at_the_last_token_is_outcome_supervision():
    g = generator(0)
    rewards, lengths = (
        torch.rand(6, 1, generator=g, dtype=torch.float64),
        torch.tensor([3, 5, 1, 2, 4, 5]),
    )
    mask = torch.arange(5) < lengths[:, None]
    advantages = process_advantages(rewards, lengths[:, None] - 1, mask, 3)
    close(PROCESS, advantages, outcome_advantages(rewards.view(2, 3)).view(6, 1) * mask)


def test_process_advantages_by_the_definition():
    """Against a loop over groups, completions, tokens and steps, on steps of any number in any group."""
    g = generator(1)
    N, K, T, G = 12, 5, 9, 4
    rewards = torch.randn(N, K, generator=g, dtype=torch.float64)
    ends = torch.randint(0, T, (N, K), generator=g).sort(dim=1).values
    ends[torch.rand(N, K, generator=g) < 0.4] = -1
    mask = torch.arange(T) <= ends.amax(dim=1, keepdim=True)
    advantages = process_advantages(rewards, ends, mask, G)
    for first in range(0, N, G):
        steps = [
            (i, ends[i, j].item(), rewards[i, j].item())
            for i in range(first, first + G)
            for j in range(K)
            if ends[i, j] >= 0
        ]
        mean = sum(r for *_, r in steps) / len(steps)
        std = math.sqrt(sum((r - mean) ** 2 for *_, r in steps) / (len(steps) - 1)) + 1e-4
        for i in range(first, first + G):
            close(
                PROCESS,
                advantages[i],
                [
                    sum((r - mean) / std for k, end, r in steps if k == i and end >= token)
                    for token in range(T)
                ],
            )


def test_process_advantages_refuse_another_scale():
    with pytest.raises(ValueError):
        process_advantages(
            t([[1.0], [0.0]]), torch.tensor([[2], [0]]), torch.ones(2, 5).bool(), 2, scale="batch"
        )


@pytest.mark.parametrize(
    "rewards, ends",
    [
        ([[1.0, 1.0], [1.0, 0.0]], [[0, 2], [1, -1]]),
        ([[0.1 + 0.2, 0.3], [0.3, 7.0]], [[0, 2], [1, -1]]),  # all alike
        ([[1.0], [0.0]], [[-1], [-1]]),
        ([[1.0], [0.0]], [[0], [-1]]),  # no step, one step
    ],
)
def test_equal_or_missing_steps_give_exactly_zero(rewards, ends):
    assert not process_advantages(t(rewards), torch.tensor(ends), torch.ones(2, 3).bool(), 2).any()


# --- The unified view: gradient coefficients, table 10 ----------------------------------------------


@pytest.mark.parametrize("method", ["SFT", "RFT", "Online RFT", "GRPO, outcome", "GRPO, process"])
def test_every_method_has_the_gradient_of_its_coefficient(method):
    """grad J = 1/G * sum_i 1/|o_i| * sum_t GC * grad log pi(o_t), through the logits of a small policy."""
    g = generator(2)
    G, T, V, beta = 4, 5, 7, 0.0 if "RFT" in method or method == "SFT" else 0.3
    logits = torch.randn(G, T, V, generator=g, dtype=torch.float64, requires_grad=True)
    tokens, mask = (
        torch.randint(0, V, (G, T), generator=g),
        torch.arange(T) < torch.tensor([[5], [2], [3], [1]]),
    )
    logp = logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
    logp_ref = logp.detach() + 0.3 * torch.randn(G, T, generator=g, dtype=torch.float64)
    right = t([1, 0, 1, 0])
    ends = torch.tensor([[1, 4], [1, -1], [0, 2], [0, -1]])
    advantages = {
        "SFT": torch.ones(G).double(),
        "RFT": right,
        "Online RFT": right,
        "GRPO, outcome": outcome_advantages(right.view(1, G)).view(G),
        "GRPO, process": process_advantages(t([[1, 0], [1, 9], [0, 1], [0, 9]]), ends, mask, G),
    }[method]
    loss, _ = grpo_loss(logp, logp.detach(), logp_ref, advantages, mask, kl_beta=beta)
    loss.backward()
    by_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(G, T)
    coefficient = by_token + beta * (torch.exp(logp_ref - logp.detach()) - 1)
    weight = coefficient * mask / mask.sum(1, keepdim=True) / G  # (G, T)
    one_hot = torch.nn.functional.one_hot(tokens, V).double()
    expected = -weight[..., None] * (one_hot - logits.detach().softmax(-1))  # of -J
    close(UNIFIED, logits.grad, expected)
    assert logits.grad.abs().max() > 0.01


# --- eq. 4: the KL estimate -------------------------------------------------------------------------


def test_kl_estimate_by_hand():
    # pi_ref/pi = 1, 2, 1/2:  2 - log 2 - 1 = 0.30685,  1/2 + log 2 - 1 = 0.19315
    close(
        KL,
        kl_estimate(t([0.0, 0.0, 0.0]), t([0.0, math.log(2), -math.log(2)])),
        [0.0, 1 - math.log(2), math.log(2) - 0.5],
    )


def test_kl_estimate_is_never_negative_and_always_finite():
    difference = torch.linspace(-100, 100, 4001)
    kl = kl_estimate(torch.zeros_like(difference), difference)
    assert torch.isfinite(kl).all() and (kl >= 0).all(), (
        f"{KL}, is finite and never negative; got {kl.min()} to {kl.max()}"
    )


def test_kl_estimate_averages_to_the_true_kl():
    p, q = t([0.5, 0.3, 0.2]), t([0.2, 0.2, 0.6])  # policy and reference over three tokens
    close(KL, (p * kl_estimate(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def test_gradient_of_the_kl_term_is_that_of_the_other_kl():
    # Differentiated on samples from pi, eq. 4 moves the policy as KL(pi_ref || pi) would, not KL(pi || pi_ref).
    logits, q = t([0.3, -0.2, 0.5], requires_grad=True), t([0.2, 0.2, 0.6])
    logp = logits.log_softmax(0)
    (logp.exp().detach() * kl_estimate(logp, q.log())).sum().backward()  # expectation over samples
    close(KL, logits.grad, logits.softmax(0).detach() - q)  # = grad of sum q log(q / pi)


# --- eq. 3: the surrogate ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, value, gradient",
    [
        (2.0, 0.5, 1.0, 1.0),
        (2.0, 1.1, 2.2, 2.2),
        (2.0, 1.5, 2.4, 0.0),  # A > 0: capped above 1.2
        (-2.0, 0.5, -1.6, 0.0),
        (-2.0, 1.1, -2.2, -2.2),
        (-2.0, 1.5, -3.0, -3.0),  # A < 0: capped below 0.8
    ],
)
def test_gradient_of_the_surrogate_by_cases(advantage, ratio, value, gradient):
    logp = t(math.log(ratio), requires_grad=True)  # d ratio / d logp = ratio
    surrogate = clipped_surrogate(logp, t(0.0), t(advantage), clip_low=0.2, clip_high=0.2)
    surrogate.backward()
    close(CLIP, surrogate.detach(), value)
    close(CLIP, logp.grad, gradient)


def test_the_two_clip_ranges_are_independent():
    ratio = t([0.75, 1.25]).log()
    close(
        CLIP,
        clipped_surrogate(ratio, t([0.0, 0.0]), t([-1.0, 1.0]), clip_low=0.3, clip_high=0.1),
        [-0.75, 1.1],
    )


@pytest.mark.parametrize("difference", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_absurd_ratios_stay_finite(difference, advantage):
    logp = torch.tensor([[difference]], requires_grad=True)
    loss, _ = grpo_loss(
        logp,
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.tensor([advantage]),
        torch.ones(1, 1).bool(),
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


# --- eq. 3: the loss --------------------------------------------------------------------------------

MASK = torch.tensor(
    [[1, 1, 1], [1, 0, 0]], device=DEVICE
).bool()  # two completions, of 3 tokens and 1 token


def test_loss_by_hand():
    ratio = t([[1.1, 0.9, 1.5], [0.5, 7.0, 7.0]])
    logp_old = t([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    logp = logp_old + ratio.log()
    logp_ref = logp + t([[0.0, math.log(2), 0.0], [0.0, 5.0, 5.0]])
    # A = 1: ratios 1.1, 0.9, 1.2 (clipped), mean 3.2 / 3; A = -1: -0.8 (clipped)
    # KL: one token with 1 - log 2, in the first completion of 3 tokens
    kl = 1 - math.log(2)
    first, second = (3.2 - 0.1 * kl) / 3, -0.8
    loss, diagnostics = grpo_loss(logp, logp_old, logp_ref, t([1.0, -1.0]), MASK, kl_beta=0.1)
    close(LOSS, loss, -(first + second) / 2)
    close(KL, diagnostics["kl"], kl / 4)  # 4 tokens count
    close(
        KL, grpo_loss(logp, logp_old, logp_ref, t([1.0, -1.0]), MASK, kl_beta=0)[1]["kl"], kl / 4
    )  # to be looked at
    assert diagnostics["clip_share"] == 2 / 4, (
        "clip_share: the 1.5 of A > 0 and the 0.5 of A < 0, of 4 tokens"
    )


def test_the_three_aggregates_by_hand():
    zeros, advantages = torch.zeros(2, 3, dtype=torch.float64), t([1.0, -2.0])
    loss = lambda **kwargs: grpo_loss(zeros, zeros, None, advantages, MASK, kl_beta=0, **kwargs)[0]
    close(LOSS, loss(aggregate="sequence"), -(1.0 - 2.0) / 2)  # means of each completion
    close(LOSS, loss(aggregate="token"), -(3 * 1.0 - 2.0) / 4)  # 4 tokens
    close(
        LOSS, loss(aggregate="constant", max_completion_tokens=10), -(3 * 1.0 - 2.0) / 20
    )  # 2 rows x limit
    close(LOSS, loss(denominator=8.0), -(1.0 - 2.0) / 8)
    with pytest.raises(ValueError):
        loss(aggregate="constant")
    with pytest.raises(ValueError):
        loss(aggregate="mean")


@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "(N, T)"])
def test_advantages_come_in_three_shapes(shape):
    zeros, advantages = torch.zeros(2, 3, dtype=torch.float64), t([1.0, -2.0])
    given = {
        "(N,)": advantages,
        "(N, 1)": advantages[:, None],
        "(N, T)": advantages[:, None].expand(2, 3),
    }[shape]
    close(LOSS, grpo_loss(zeros, zeros, None, given, MASK, kl_beta=0)[0], 0.5)


@pytest.mark.parametrize("advantages", [[1.0, 2.0, 3.0], [[1.0, 2.0]], 1.0])
def test_advantages_of_another_shape_are_refused(advantages):
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError):
        grpo_loss(zeros, zeros, None, t(advantages), MASK, kl_beta=0)


def test_the_kl_term_needs_a_reference():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError):
        grpo_loss(zeros, zeros, None, torch.zeros(2), MASK, kl_beta=0.04)


def policy_example(seed=0):
    """Six completions of a softmax policy over 5 tokens: logits (6, 4, 5) with gradient, tokens, mask, advantages."""
    g = generator(seed)
    logits = torch.randn(6, 4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (6, 4), generator=g)
    mask = torch.arange(4) < torch.tensor([[4], [1], [3], [2], [4], [2]])
    advantages = outcome_advantages(
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    ).flatten()
    ref = torch.randn(6, 4, 5, generator=g, dtype=torch.float64).log_softmax(-1)
    pick = lambda logp: logp.gather(2, tokens[:, :, None]).squeeze(2)
    return logits, pick, pick(ref), mask, advantages


def test_gradient_equals_equation_21():
    """At pi_old = pi, grad J = mean_i 1/|o_i| sum_t (A + beta * (pi_ref/pi - 1)) * grad log pi: eq. 20 and 21."""
    logits, pick, logp_ref, mask, advantages = policy_example()
    logp = pick(logits.log_softmax(-1))
    loss, _ = grpo_loss(logp, logp.detach(), logp_ref, advantages, mask, kl_beta=0.3)
    (gradient,) = torch.autograd.grad(loss, logits)

    coefficient = advantages[:, None] + 0.3 * ((logp_ref - logp).exp() - 1)
    weight = coefficient.detach() * mask / mask.sum(1, keepdim=True) / 6
    (expected,) = torch.autograd.grad(-(weight * pick(logits.log_softmax(-1))).sum(), logits)
    close(UNIFIED, gradient, expected)


def test_the_loss_is_zero_on_policy_but_its_gradient_is_not():
    logits, pick, _, _, advantages = policy_example()
    logp = pick(logits.log_softmax(-1))
    loss, _ = grpo_loss(logp, logp.detach(), None, advantages, torch.ones(6, 4).bool(), kl_beta=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-6 and gradient.norm() > 0.1


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_micro_batches_change_nothing(aggregate, size):
    logits, pick, logp_ref, mask, advantages = policy_example()
    logp_old = pick(
        torch.randn(6, 4, 5, generator=generator(1), dtype=torch.float64).log_softmax(-1)
    )

    def gradient(size, extra_columns):
        logp = pick(logits.log_softmax(-1))
        pad = lambda x: torch.nn.functional.pad(x, (0, extra_columns), value=0)
        total, denominator = 0.0, loss_denominator(mask, aggregate, 10)
        for rows in torch.arange(6).split(size):
            loss, _ = grpo_loss(
                *(pad(x)[rows] for x in (logp, logp_old, logp_ref)),
                advantages[rows],
                pad(mask)[rows],
                aggregate=aggregate,
                max_completion_tokens=10,
                denominator=denominator,
            )
            total = total + loss
        return total.detach(), torch.autograd.grad(total, logits)[0]

    logp = pick(logits.log_softmax(-1))
    whole, _ = grpo_loss(
        logp, logp_old, logp_ref, advantages, mask, aggregate=aggregate, max_completion_tokens=10
    )
    value, grad = gradient(size, extra_columns=3)
    close(LOSS, value, whole.detach())
    close(LOSS, grad, torch.autograd.grad(whole, logits)[0])


def test_padding_may_hold_anything():
    logp = t([[-1.0, -2.0, -3.0], [-1.0, float("nan"), float("-inf")]], requires_grad=True)
    rubbish = t([[-1.0, -2.0, -3.0], [-1.0, float("inf"), float("nan")]])
    loss, diagnostics = grpo_loss(logp, rubbish, rubbish, t([1.0, -1.0]), MASK)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
    assert logp.grad[1, 1:].tolist() == [0.0, 0.0] and all(
        torch.isfinite(v) for v in diagnostics.values()
    )


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_everything_truncated_and_masked_gives_zero(aggregate):
    logp = torch.randn(2, 3, requires_grad=True)
    loss, diagnostics = grpo_loss(
        logp,
        logp.detach(),
        logp.detach(),
        torch.tensor([1.0, -1.0]),
        torch.zeros(2, 3).bool(),
        aggregate=aggregate,
        max_completion_tokens=3,
    )
    loss.backward()
    assert (
        loss.item() == 0
        and logp.grad.abs().sum() == 0
        and not any(v.isnan() for v in diagnostics.values())
    )


def test_rows_without_tokens_leave_the_denominator():
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]]).bool()
    assert loss_denominator(mask) == 2
    assert loss_denominator(mask, "token") == 3
    assert loss_denominator(mask, "constant", 10) == 20


def test_batch_tensors_are_not_written_to():
    tensors = [
        torch.randn(2, 3),
        torch.randn(2, 3),
        torch.randn(2, 3),
        torch.randn(2),
        MASK.clone(),
    ]
    copies = [x.clone() for x in tensors]
    grpo_loss(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))


def test_diagnostics_are_means_over_the_tokens_that_count():
    mask, far = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), math.log(2)
    logp = t([[0.0, far, 5.0], [far, float("nan"), float("inf")]])
    _, diagnostics = grpo_loss(
        logp,
        torch.zeros_like(logp),
        t([[0.0, 0.0, 9.0], [0.0, float("nan"), 0.0]]),
        t([1.0, -1.0]),
        mask,
    )
    close(
        "clip_share, the share of tokens whose gradient the clip took away",
        diagnostics["clip_share"].double(),
        1 / 3,
        tolerance=1e-6,
    )  # too far up and A > 0; for A < 0 it may come back
    close(KL, diagnostics["kl"], 2 * (0.5 + far - 1) / 3)
    _, diagnostics = grpo_loss(logp, logp, logp, t([1.0, 1.0]), torch.zeros(2, 3).bool())
    assert diagnostics["clip_share"] == diagnostics["kl"] == 0
