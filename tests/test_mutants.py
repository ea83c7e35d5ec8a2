"""Wrong versions of this project, each a real mistake seen in public code: every one must fail a test.

Each is a line of the code, and the same line with the mistake. The code of the functions is exchanged in place, the tests
run in this process, and the table at the end says which of them notice: the grading sheet of a course. The numbers are
those of the exercise "find the silent bug": make_assignment.py --bug NUMBER plants one.

    python -m pytest -q -s tests/test_mutants.py
"""

import inspect
import runpy
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import grpo
import train

MODULES = {"grpo": grpo, "train": train, "eval": evaluation}
OBJECTIVE, SAMPLING = (
    "test_objective.py",
    "test_sampling.py -k 'rescored or over_temperature or left_padding or bf16'",
)
MUTANTS = [  # (what is wrong, module, the line or a part of it, with the mistake, where to look: a file, and a -k filter)
    (
        "no clip",
        "grpo",
        "clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)",
        "clipped_ratio = ratio",
        OBJECTIVE,
    ),
    (
        "max in place of min where A < 0",
        "grpo",
        "return torch.min(ratio * advantages, clipped_ratio * advantages)",
        "return torch.where(advantages < 0, torch.max(ratio * advantages, clipped_ratio * advantages), "
        "torch.min(ratio * advantages, clipped_ratio * advantages))",
        OBJECTIVE,
    ),
    (
        "one clip range on both sides",
        "grpo",
        "clamp(1 - clip_low, 1 + clip_high)",
        "clamp(1 - clip_low, 1 + clip_low)",
        OBJECTIVE,
    ),
    (
        "ratio from detached log-probs",
        "grpo",
        "ratio = (logp - logp_old).clamp(",
        "ratio = (logp.detach() - logp_old).clamp(",
        OBJECTIVE,
    ),
    (
        "log-ratio without a bound",
        "grpo",
        "(logp - logp_old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()",
        "(logp - logp_old).exp()",
        OBJECTIVE,
    ),
    (
        "mean over the batch, not the group",
        "grpo",
        "rewards.sum(dim=1, keepdim=True) / count)",
        "rewards.sum() / count.sum())",
        OBJECTIVE,
    ),
    (
        "std over the batch, not the group",
        "grpo",
        "std = (centred.square().sum(dim=1, keepdim=True) / (count - 1)).sqrt()",
        "std = rewards[real].std()",
        OBJECTIVE,
    ),
    (
        "std of a population, divisor G",
        "grpo",
        "/ (count - 1)).sqrt()",
        "/ count).sqrt()",
        OBJECTIVE,
    ),
    (
        "float noise divided by its own std",
        "grpo",
        'if scale == "std" else centred).masked_fill(equal, 0.0)',
        'if scale == "std" else centred)',
        OBJECTIVE,
    ),
    (
        "steps normalised within a completion",
        "grpo",
        "_normalised(rewards.reshape(B, -1), ends.reshape(B, -1) >= 0, scale)",
        "_normalised(rewards, ends >= 0, scale)",
        OBJECTIVE,
    ),
    (
        "steps before a token, not behind it",
        "grpo",
        "at_end.flip(1).cumsum(dim=1).flip(1)",
        "at_end.cumsum(dim=1)",
        OBJECTIVE,
    ),
    (
        "KL with the wrong sign",
        "grpo",
        "objective = objective - kl_beta * kl",
        "objective = objective + kl_beta * kl",
        OBJECTIVE,
    ),
    (
        "KL of the other direction",
        "grpo",
        "log_ratio = (logp_ref - logp).clamp(",
        "log_ratio = (logp - logp_ref).clamp(",
        OBJECTIVE,
    ),
    (
        "KL without a gradient",
        "grpo",
        "kl = kl_estimate(logp, logp_ref)",
        "kl = kl_estimate(logp.detach(), logp_ref)",
        OBJECTIVE,
    ),
    (
        "k1 as the KL loss",
        "grpo",
        "return torch.expm1(log_ratio) - log_ratio",
        "return -log_ratio",
        OBJECTIVE,
    ),
    (
        "token mean for the mean over completions",
        "grpo",
        "per_completion / mask.sum(dim=1).clamp(min=1)",
        "per_completion / mask.sum(dim=1).float().mean().clamp(min=1)",
        OBJECTIVE,
    ),
    (
        "mean over the padding, too",
        "grpo",
        "per_completion / mask.sum(dim=1).clamp(min=1)",
        "per_completion / mask.shape[1]",
        OBJECTIVE,
    ),
    (
        "advantages of the padding are added",
        "grpo",
        "objective = objective.masked_fill(~mask, 0.0)",
        "pass",
        OBJECTIVE,
    ),
    (
        "the padding is multiplied by 0",
        "grpo",
        "objective = objective.masked_fill(~mask, 0.0)",
        "objective = objective * mask",
        OBJECTIVE,
    ),
    (
        "a denominator for each micro-batch",
        "grpo",
        "if denominator is None else denominator",
        "if True else denominator",
        OBJECTIVE,
    ),
    (
        "mask by the pad value, which is EOS",
        "grpo",
        "return is_eos.cumsum(dim=1) - is_eos == 0",
        "return is_eos == 0",
        OBJECTIVE,
    ),
    (
        "EOS left out of the loss",
        "grpo",
        "return is_eos.cumsum(dim=1) - is_eos == 0",
        "return is_eos.cumsum(dim=1) == 0",
        OBJECTIVE,
    ),
    (
        "only one of several EOS ids",
        "grpo",
        "is_eos = torch.isin(completion_ids, eos).long()",
        "is_eos = torch.isin(completion_ids, eos[:1]).long()",
        OBJECTIVE,
    ),
    (
        "no temperature in the log-probs",
        "grpo",
        "torch.log_softmax(logits / temperature, dim=-1)",
        "torch.log_softmax(logits, dim=-1)",
        SAMPLING,
    ),
    ("log-probs shifted by one", "grpo", "states[:, :-1][mask]", "states[:, 1:][mask]", SAMPLING),
    (
        "log-softmax in bf16",
        "grpo",
        "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # never",
        "# never",
        SAMPLING,
    ),
    (
        "positions that count the padding",
        "grpo",
        "position = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1]:]",
        "position = torch.arange(attention_mask.shape[1])[-ids.shape[1]:].expand(ids.shape)",
        SAMPLING,
    ),
    (
        "rotary frequencies in bf16",
        "grpo",
        "    for parameter in model.parameters():\n        parameter.data = parameter.data.to(torch.bfloat16)",
        "    model.to(torch.bfloat16)",
        "test_sampling.py -k rotary",
    ),
    (
        "old log-probs computed again after an update",
        "train",
        "if pass_number == 0 or config.sample_from",
        "if True or config.sample_from",
        "test_train.py -k old_logprobs",
    ),
    (
        "groups in the wrong order",
        "train",
        "torch.tensor([row[-1] for row in rewards]).view(-1, G)",
        "torch.tensor([row[-1] for row in rewards]).view(G, -1).T",
        "test_reward_model.py -k indicator",
    ),
    (
        "golds in the wrong order",
        "train",
        "[problem for problem in problems for _ in range(G)]",
        "problems * G",
        "test_train.py -k its_own_gold",
    ),
    (
        "the reference is updated every step",
        "train",
        'if step % config.steps == 0 and "reference"',
        'if "reference"',
        "test_train.py -k reference_is_the_policy",
    ),
    (
        "truncated rows stay in the denominator",
        "train",
        "denominator = loss_denominator(in_loss,",
        "denominator = loss_denominator(batch.mask,",
        "test_train.py -k truncated_leave",
    ),
    (
        "the gradient of the step before is kept",
        "train",
        "        run.optimizer.zero_grad()\n",
        "",
        "test_train.py -k begins_without",
    ),
    (
        "the last micro-batch is dropped",
        "train",
        "enumerate(tqdm(cuts, ",
        "enumerate(tqdm(cuts[:-1] or cuts, ",
        "test_train.py -k old_logprobs",
    ),
    (
        "a second BOS",
        "eval",
        "if wanted else ids",
        "if False else ids",
        "test_eval.py -k exactly_one_bos",
    ),
    (
        "the end of a turn is no EOS",
        "eval",
        "return ids - {None}",
        "return {tokenizer.eos_token_id}",
        "test_eval.py -k end_of_turn",
    ),
]
CAUGHT = {}  # number -> (what is wrong, the tests that failed)


class Failures:
    """A plugin: the names of the tests that fail, without their parameters."""

    def __init__(self):
        self.names, self.ran = [], 0

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed and name not in self.names:
            self.names.append(name)


def run_tests(arguments):
    """The Failures of some tests, run here."""
    failures, (file, *options) = Failures(), shlex.split(arguments)
    pytest.main(
        [str(Path(__file__).with_name(file)), *options, "-q", "--tb=no", "-p", "no:cacheprovider"],
        plugins=[failures],
    )
    return failures


def mutate(module, old, new, folder):
    """The code objects to exchange: {function: (as it is, with the mistake)}."""
    source = Path(MODULES[module].__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module}.py has {old!r} {source.count(old)} times, not once"
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    wrong, exchange = runpy.run_path(str(path)), {}
    for name, function in inspect.getmembers(MODULES[module], inspect.isfunction):
        if function.__module__ == MODULES[module].__name__:
            right, broken = inspect.unwrap(function), inspect.unwrap(wrong[name])
            if (
                right.__code__.co_code != broken.__code__.co_code
                or right.__code__.co_consts != broken.__code__.co_consts
            ):
                exchange[right] = right.__code__, broken.__code__
    return exchange


@pytest.mark.parametrize(
    "number, mutant", list(enumerate(MUTANTS, start=1)), ids=[mutant[0] for mutant in MUTANTS]
)
def test_every_mutant_fails_a_test(number, mutant, tmp_path):
    what, module, old, new, where = mutant
    exchange = mutate(module, old, new, tmp_path)
    try:
        for function, (_, broken) in exchange.items():
            function.__code__ = broken
        failures = run_tests(where)
    finally:
        for function, (right, _) in exchange.items():
            function.__code__ = right
    CAUGHT[number] = (what, failures.names)
    assert failures.names, (
        f"{what}: none of the {failures.ran} tests in {where} notices {new!r} in place of {old!r}"
    )


def test_the_table(capsys):
    """Printed last; and without a mutant the same tests pass, run in the same way: it is the mistakes that they notice."""
    for where in (OBJECTIVE, "test_sampling.py -k rotary", "test_train.py -k its_own_gold"):
        failures = run_tests(where)
        assert failures.ran and not failures.names, where
    with capsys.disabled():
        print("\n\n| | wrong version | noticed by |\n|---|---|---|")
        for number, (what, names) in sorted(CAUGHT.items()):
            print(
                f"| {number} | {what} | {', '.join(f'`{name}`' for name in names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} |"
            )
