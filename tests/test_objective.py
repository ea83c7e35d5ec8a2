"""Test advantages, KL, the clipped surrogate and the loss: each equation by numbers, in float64."""

import math

import adapters as grpo  # grpo.py, or what a course puts in its place
import pytest
import torch
from helpers import generator
from torch import tensor
from torch.nn.functional import pad


@pytest.fixture(autouse=True)
def doubles():
    """Compute in float64, so that a tolerance of 1e-9 holds."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(got, expected, tolerance=1e-9):
    got, expected = (torch.as_tensor(x).double().detach().cpu() for x in (got, expected))
    message = f"expected {expected.tolist()}\ngot      {got.tolist()}\n"
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=message.__add__)


def example():
    """Six completions of 1 to 4 tokens: logp (with a gradient), logp_old, logp_ref, A, mask."""
    g = generator(0)
    logp = -3 * torch.rand(6, 4, generator=g)
    logp_old = logp + 0.4 * torch.randn(6, 4, generator=g)
    logp_ref = logp + 0.4 * torch.randn(6, 4, generator=g)
    mask = torch.arange(4) < tensor([[4], [1], [3], [2], [4], [2]])
    return logp.requires_grad_(), logp_old, logp_ref, tensor([1.5, -0.5, -1, 0.7, -1.4, 0.7]), mask


def test_mask_goes_up_to_and_including_the_first_eos():
    ids = [
        [5, 6, 9, 9, 9],  # the first EOS counts, although 9 may be the padding, too
        [9, 9, 9, 9, 9],  # an empty completion still has its EOS
        [5, 8, 9, 5, 9],  # two EOS ids: the first of either
        [0, 5, 0, 9, 0],  # a pad id before the EOS is a token like any other
        [5, 6, 7, 4, 5],  # no EOS: everything counts
    ]
    lengths = tensor([[3], [1], [2], [4], [5]])
    assert torch.equal(grpo.completion_mask(tensor(ids), {8, 9}), torch.arange(5) < lengths)
    assert grpo.completion_mask(tensor(ids), []).all()


def test_eos_token_is_trained():
    weights = grpo.token_weights(grpo.completion_mask(tensor([[5, 9, 9], [5, 6, 9]]), [9]))
    logp = torch.zeros(2, 3, requires_grad=True)
    grpo.grpo_loss(logp, logp.detach(), None, torch.ones(2), weights, kl_beta=0)[0].backward()
    # 9 is EOS and padding. The gradient is -1/2 * 1/|o_i|, at the first EOS, too.
    close(logp.grad, [[-1 / 4, -1 / 4, 0], [-1 / 6, -1 / 6, -1 / 6]])


def test_advantages_by_hand():
    # Mean 1/4, sample variance (9/16 + 3 * 1/16) / 3 = 1/4, so std 1/2 (a population's is 0.433).
    rewards = tensor([[1, 0, 0, 0]])
    scale = 0.5 + grpo.STD_EPSILON
    expected = [[0.75 / scale, -0.25 / scale, -0.25 / scale, -0.25 / scale]]
    close(grpo.outcome_advantages(rewards.double()), expected)
    close(grpo.outcome_advantages(rewards.double(), "none"), [[0.75, -0.25, -0.25, -0.25]])
    for dtype in (torch.int64, torch.bfloat16, torch.bool):
        advantages = grpo.outcome_advantages(rewards.to(dtype))
        assert advantages.dtype == torch.float32
        close(advantages, expected, tolerance=1e-6)
    for wrong in ((rewards[:, :1],), (rewards[0],), (rewards, "batch")):  # a group of one, no group
        with pytest.raises(ValueError):
            grpo.outcome_advantages(*wrong)


def test_large_rewards_that_differ_little_do_differ():
    """float32 cannot tell 1e8 from 1e8 + 1, and the square of 1e20 is infinite in it."""
    for low, high in ((1e8, 1e8 + 1), (0.0, 1e20), (-1e29, 1e29)):
        rewards = torch.tensor([[high, low, low, low]], dtype=torch.float64)
        tolerance = 4 * grpo.STD_EPSILON
        close(grpo.outcome_advantages(rewards), [[1.5, -0.5, -0.5, -0.5]], tolerance)
    rewards = torch.tensor([[1e6, 1e6 + 0.5, 1e6]], dtype=torch.float32)
    expected = torch.tensor([[-1 / 6, 1 / 3, -1 / 6]], dtype=torch.float32)
    close(grpo.outcome_advantages(rewards, "none"), expected, tolerance=1e-6)
    ends = torch.tensor([[0], [0], [0]])
    credit = grpo.process_advantages(rewards.T, ends, ends == 0, 3, "none")
    close(credit.T, expected, tolerance=1e-6)


def test_groups_do_not_mix():
    rewards = tensor([[10.0, 12.0, 11.0, 10.0], [0.0, 1.0, 0.0, 0.0]])
    for scale in ("std", "none"):
        alone = [grpo.outcome_advantages(group[None], scale) for group in rewards]
        close(grpo.outcome_advantages(rewards, scale), torch.cat(alone))


def test_equal_rewards_give_exactly_zero():
    rewards = tensor([[1, 1, 1], [0.1 + 0.2, 0.3, 0.3], [1e-9, 0, 0], [1, 1, 0.999]])
    for scale in ("std", "none"):
        advantages = grpo.outcome_advantages(rewards, scale)
        assert not advantages[:3].any() and advantages[3].all()
    # Rewards of steps, in three groups of two: all alike; no step; a single one.
    rewards = tensor([[0.1 + 0.2, 0.3], [0.3, 7], [1, 1], [0, 0], [1, 1], [0, 0]])
    ends = tensor([[0, 2], [1, -1], [-1, -1], [-1, -1], [0, -1], [-1, -1]])
    assert not grpo.process_advantages(rewards, ends, torch.ones(6, 3).bool(), 2).any()


def test_process_advantages_by_hand():
    # Steps [1, 0, 1] end at tokens 1, 3, 4 and [0] at 2: mean 1/2, variance 4 * 1/4 / 3.
    rewards = tensor([[1.0, 0.0, 1.0], [0.0, 9.0, 9.0]])
    ends = tensor([[1, 3, 4], [2, -1, -1]])
    mask = tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    for scale, std in (("std", math.sqrt(1 / 3) + grpo.STD_EPSILON), ("none", 1.0)):
        up = 0.5 / std  # a step is worth +up or -up
        first = [up, up, 0, 0, up, 0]  # +up -up +up, then -up +up, then +up, then no step
        second = [-up, -up, 0, 0, 0, 0]  # the mask hides token 2
        close(grpo.process_advantages(rewards, ends, mask, 2, scale), [first, second])
    with pytest.raises(ValueError):
        grpo.process_advantages(rewards, ends, mask, 2, "batch")


def test_process_advantages_by_the_definition():
    g = generator(1)
    rewards = torch.randn(12, 5, generator=g)  # three groups of four, at most five steps each
    ends = torch.randint(0, 9, (12, 5), generator=g)
    ends[torch.rand(12, 5, generator=g) < 0.4] = -1
    expected = torch.zeros(12, 9)
    for i in range(12):
        group = slice(i // 4 * 4, i // 4 * 4 + 4)
        steps = rewards[group][ends[group] >= 0]
        for j in range(5):
            scale = steps.std() + grpo.STD_EPSILON
            expected[i, : ends[i, j] + 1] += (rewards[i, j] - steps.mean()) / scale
    close(grpo.process_advantages(rewards, ends, torch.ones(12, 9).bool(), 4), expected)


def test_one_step_at_the_last_token_is_outcome_supervision():
    rewards = torch.rand(6, 1, generator=generator(0))
    *_, mask = example()
    ends = mask.sum(dim=1, keepdim=True) - 1
    expected = grpo.outcome_advantages(rewards.view(3, 2)).view(6, 1) * mask
    close(grpo.process_advantages(rewards, ends, mask, 2), expected)


def test_kl_estimate_and_its_gradient_by_hand():
    # pi_ref/pi = 2: 2 - log 2 - 1 = 0.307. The gradient in log pi is 1 - pi_ref/pi: where the
    # policy has drifted to a token that the reference finds impossible, it is 1 and not 0.
    difference = tensor([0, math.log(2), -math.log(2), 10, -21, -100])
    logp = torch.zeros(6, requires_grad=True)
    kl = grpo.kl_estimate(logp, difference)
    kl.sum().backward()
    close(kl, [0, 1 - math.log(2), math.log(2) - 1 / 2, math.exp(10) - 11, 20, 99], tolerance=1e-8)
    close(logp.grad, [0, 1 - 2, 1 - 1 / 2, 1 - math.exp(10), 1, 1], tolerance=1e-8)
    x = tensor(1e-4, dtype=torch.float32)  # where exp(x) - 1 - x is off by 2e-8
    close(grpo.kl_estimate(x * 0, x), 5e-9, tolerance=1e-10)  # x^2 / 2


def test_gradient_of_the_kl_term_is_that_of_the_other_kl():
    logits = tensor([0.3, -0.2, 0.5], requires_grad=True)  # a policy over three tokens
    q = tensor([0.2, 0.2, 0.6])  # the reference
    logp = logits.log_softmax(0)
    p = logp.exp().detach()
    mean = (p * grpo.kl_estimate(logp, q.log())).sum()  # over samples of the policy
    mean.backward()
    close(mean, (p * (p / q).log()).sum())  # the value of KL(pi || pi_ref)
    close(logits.grad, p - q)  # the gradient of KL(pi_ref || pi) = sum of q * log(q / p)


def test_gradient_of_the_surrogate_by_cases():
    cases = [
        (2.0, 0.5, 1.0, 1.0),  # A, ratio, value, gradient
        (2.0, 1.15, 2.3, 2.3),
        (2.0, 1.5, 2.4, 0.0),  # A > 0: capped above 1.2
        (-2.0, 0.5, -1.4, 0.0),  # A < 0: capped below 0.7
        (-2.0, 0.75, -1.5, -1.5),  # the two ranges are independent
        (-2.0, 1.5, -3.0, -3.0),
        (-2.0, 1e4, -2e4, -2e4),  # the bound on the ratio is far away
    ]
    A, ratio, value, gradient = tensor(cases).T
    logp = (ratio.log() - 1).requires_grad_()  # d ratio / d logp = ratio
    surrogate = grpo.clipped_surrogate(logp, tensor(-1.0), A, clip_low=0.3, clip_high=0.2)
    surrogate.sum().backward()
    close(surrogate, value)
    close(logp.grad, gradient)


def test_absurd_ratios_stay_finite():
    logp = tensor([[100.0, -100.0, 1e4, -1e4]] * 3, dtype=torch.float32, requires_grad=True)
    zeros = torch.zeros_like(logp)
    loss, _ = grpo.grpo_loss(logp, zeros, zeros, tensor([1.0, 0.0, -1.0]), zeros + 1)
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all()


def test_weights_of_the_three_aggregates_by_hand():
    mask = tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool()  # two rows have tokens, four in all
    close(grpo.token_weights(mask), [[1 / 6, 1 / 6, 1 / 6], [0, 0, 0], [1 / 2, 0, 0]])
    close(grpo.token_weights(mask, "token"), mask / 4)
    close(grpo.token_weights(mask, "constant", 10), mask / (2 * 10))
    for wrong in (("constant",), ("mean", 10)):
        with pytest.raises(ValueError):
            grpo.token_weights(mask, *wrong)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_everything_truncated_and_masked_gives_zero(aggregate):
    *tensors, mask = example()
    loss, diagnostics = grpo.grpo_loss(*tensors, grpo.token_weights(mask & False, aggregate, 10))
    loss.backward()
    assert diagnostics == {"loss": 0, "kl": 0, "clip_share": 0} and not tensors[0].grad.any()


def test_loss_by_hand():
    ratio = tensor([[1.1, 0.5, 1.3], [0.7, 0.5, 9.0], [1.3, 9.0, 9.0]])
    weights = tensor([[1 / 9, 1 / 9, 1 / 9], [1 / 6, 1 / 6, 0], [1 / 3, 0, 0]])
    A = tensor([1.0, -1.0, -1.0])
    logp = ratio.log()
    ref = logp + tensor([[0, math.log(2), 0], [0, 0, 5], [0, 5, 5]])
    loss, diagnostics = grpo.grpo_loss(logp, logp * 0, ref, A, weights, clip_low=0.4, kl_beta=0.1)
    # Clipped to 0.6 ... 1.2.  A = 1: 1.1 + 0.5 + 1.2 = 2.8;  A = -1: -0.7 - 0.6 = -1.3, and -1.3
    kl = (1 - math.log(2)) / 9  # one token has 2 - log 2 - 1
    close(loss, 0.1 * kl - 2.8 / 9 + 1.3 / 6 + 1.3 / 3)
    assert diagnostics["loss"] == loss.item()
    close(diagnostics["kl"], kl)
    close(diagnostics["clip_share"], 1 / 9 + 1 / 6)  # 1.3 of A = 1, and 0.5 of A = -1


def loss_by_loops(logp, logp_old, logp_ref, A, mask, aggregate):
    """Compute eq. 3 token by token, clipped to 0.8 ... 1.2, beta 0.04: loss, KL, clip share."""
    sums = torch.zeros(3)
    lengths = [sum(row) for row in mask.tolist()]
    N = sum(length > 0 for length in lengths)
    for i, length in enumerate(lengths):
        parts = {"sequence": N * length, "token": sum(lengths), "constant": N * 10}[aggregate]
        for t in range(length):
            ratio = torch.exp(logp[i, t] - logp_old[i, t])
            clipped = min(max(ratio, 0.8), 1.2)
            kl = torch.exp(logp_ref[i, t] - logp[i, t]) - (logp_ref[i, t] - logp[i, t]) - 1
            objective = min(ratio * A[i], clipped * A[i]) - 0.04 * kl
            sums = sums + torch.stack([-objective, kl, clipped * A[i] < ratio * A[i]]) / parts
    return sums


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
@pytest.mark.parametrize("longest", [3, 4])  # with 3 the rows of 4 are truncated and masked
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_micro_batches_change_nothing(aggregate, longest, size):
    """Compare the sums over micro-batches, with more padding, with plain loops over the batch."""
    logp, logp_old, logp_ref, A, mask = example()
    mask = mask & (mask.sum(dim=1, keepdim=True) <= longest)
    expected = loss_by_loops(logp, logp_old, logp_ref, A, mask, aggregate)
    *wider, mask = (pad(x, (0, 3)) for x in (logp, logp_old, logp_ref, mask))
    weights = grpo.token_weights(mask, aggregate, 10)
    sums = torch.zeros(3)
    for rows in torch.arange(6).split(size):
        loss, diagnostics = grpo.grpo_loss(*(x[rows] for x in (*wider, A, weights)))
        sums = sums + torch.stack([loss, *tensor([diagnostics["kl"], diagnostics["clip_share"]])])
    close(sums, expected)
    close(*(torch.autograd.grad(x[0], logp)[0] for x in (sums, expected)))


@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan, 1e300])
def test_padding_may_hold_anything(rubbish):
    *tensors, mask = example()
    mask[1] = False  # row 1 is padding from end to end
    tensors[3] = tensors[3][:, None].expand(6, 4)  # the advantages
    loss, diagnostics = grpo.grpo_loss(*tensors, grpo.token_weights(mask))
    dirty = [x.detach().masked_fill(~mask, rubbish) for x in tensors]
    again, same = grpo.grpo_loss(dirty[0].requires_grad_(), *dirty[1:], grpo.token_weights(mask))
    (loss + again).backward()
    assert same == diagnostics and torch.equal(dirty[0].grad, tensors[0].grad * mask)


def test_gradient_equals_equation_21_and_the_coefficients_of_table_10():
    logp, _, logp_ref, A, mask = example()
    weights = grpo.token_weights(mask)
    for gc, beta in ((torch.ones(6), 0), ((A > 0).double(), 0), (A, 0.3)):  # SFT, RFT, GRPO
        loss, shown = grpo.grpo_loss(logp, logp.detach(), logp_ref, gc, weights, kl_beta=beta)
        assert shown["kl"] > 0  # with beta = 0, too
        (gradient,) = torch.autograd.grad(loss, logp)
        coefficient = gc[:, None] + beta * ((logp_ref - logp).exp() - 1)
        close(-gradient, coefficient * mask / mask.sum(dim=1, keepdim=True) / 6)


def test_the_loss_is_zero_on_policy_but_its_gradient_is_not():
    logits = torch.randn(4, 3, 5, generator=generator(3), requires_grad=True)
    logp = logits.log_softmax(-1)[..., 0]
    A = grpo.outcome_advantages(tensor([[1.0, 0.0, 0.0, 0.0]])).flatten()
    loss, _ = grpo.grpo_loss(logp, logp.detach(), None, A, torch.full((4, 3), 1 / 12), kl_beta=0)
    loss.backward()
    assert abs(loss.item()) < 1e-9 and logits.grad.norm() > 0.1


def test_batch_tensors_are_not_written_to():
    tensors = example()
    grpo.grpo_loss(*tensors[:4], grpo.token_weights(tensors[4]))
    assert all(map(torch.equal, tensors, example()))


def test_advantages_come_in_three_shapes_and_others_are_refused():
    zeros = torch.zeros(2, 3)
    weights = tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]])
    for A in ([1.0, -2.0], [[1.0], [-2.0]], [[3.0, 0.0, 0.0], [-2.0, 9.0, 9.0]]):
        loss, diagnostics = grpo.grpo_loss(zeros, zeros, None, tensor(A), weights, kl_beta=0)
        close(loss, -(3 * 1 / 6 - 2 / 2))
        assert set(diagnostics) == {"loss", "clip_share"}  # no reference, no KL
    with pytest.raises(ValueError):
        grpo.grpo_loss(zeros, zeros, None, zeros, weights)  # the KL term needs its reference
    for shape in ((3,), (1, 3), (3, 3), (2, 2), ()):
        for place in range(4):  # logp, logp_old, logp_ref, advantages
            tensors = [zeros] * 4
            tensors[place] = torch.zeros(shape)
            with pytest.raises(ValueError):
                grpo.grpo_loss(*tensors, weights)


def make_batch():
    """Two completions of each of three prompts, of 2, 4 and 5 tokens; wider than it need be."""
    prompt_mask = torch.arange(6) >= tensor([[4], [2], [1]])  # (3, 6)
    mask = pad(example()[-1], (0, 2))  # (6, 6)
    ids, *others = (torch.arange(36).view(6, 6) + 100 * k for k in range(5))
    return grpo.Batch(ids[:3], prompt_mask, ids, mask, tensor([0, 0, 1, 1, 2, 2]), *others)


def test_rows_keep_their_own_prompt_and_lose_padding():
    batch = make_batch()
    # Row numbers, their prompts, the longest prompt, the longest completion.
    for rows, asked, P, T in (([5, 0, 1], [0, 2], 5, 4), ([3], [1], 4, 2), ([1], [0], 2, 1)):
        micro = batch.rows(rows)
        assert [asked[q] for q in micro.question] == batch.question[rows].tolist()
        for got, whole in zip(micro[:2], batch[:2], strict=True):  # each prompt once
            assert torch.equal(got, whole[asked, 6 - P :])
        for name, field in micro._asdict().items():
            if name not in ("prompt_ids", "prompt_mask", "question"):
                assert torch.equal(field, batch._asdict()[name][rows, :T]), name


def test_micro_batches_hold_each_row_once_and_what_the_limit_allows():
    batch = make_batch()
    lengths = batch.mask.sum(dim=1).tolist()
    for limit, expected in (
        (1, [[1], [2], [2], [3], [4], [4]]),  # a row that is longer than the limit stands alone
        (20, [[1, 2], [2, 3], [4, 4]]),  # prompts of 6: 2 * 8, 2 * 9 and 2 * 10 fit, 3 * 8 do not
        (59, [[1, 2, 2, 3, 4], [4]]),  # 5 * 10 fit, 6 * 10 do not
        (60, [[1, 2, 2, 3, 4, 4]]),
    ):
        lists = grpo.micro_batches(batch, limit)
        assert [[lengths[row] for row in rows] for rows in lists] == expected
        assert sorted(sum(lists, [])) == list(range(6))
