"""Wrong versions of this project, each a real mistake: every one must fail a test.

A mistake is pinned to a function and a piece of its syntax tree; format and comments may change.
Its code takes the place of the right one, and tests run in this process. A table at the end says
which of them notice. To plant mistake NUMBER in a copy: make_assignment.py FOLDER --bug NUMBER.

    python -m pytest -q -s tests/test_mutants.py
"""

import ast
import contextlib
import functools
import inspect
import re
import sys
from pathlib import Path
from types import CodeType

import pytest
from helpers import forget

import eval as evaluation
import grpo
import reward
import train

MODULES = {"grpo": grpo, "reward": reward, "eval": evaluation, "train": train}
# [function | test file, and words for -k]
# what is wrong: expression or statement that the function has exactly once => its replacement
# and, behind @, options of a built-in run that then prints other numbers; without @ none does
LIST = r"""
[grpo.clipped_surrogate | objective surrogate or absurd]
no clip: ratio.clamp(1 - clip_low, 1 + clip_high) => ratio @ --mu 4
max in place of min where A < 0: torch.min(ratio * advantages, clipped_ratio * advantages)
    => torch.min(ratio, clipped_ratio) * advantages @ --mu 4
one clip range on both sides: 1 + clip_high => 1 + clip_low @ --mu 4 --clip-high 0.3
ratio from detached log-probs: logp - logp_old => logp.detach() - logp_old @ default
log-ratio without a bound: (logp - logp_old).clamp(max=MAX_LOG_RATIO) => (logp - logp_old)
[grpo.outcome_advantages | objective advantages or groups or rewards]
mean over the batch, not the group: r.mean(dim=1, keepdim=True) => r.mean() @ default
std over the batch, not the group: r.std(dim=1, keepdim=True) => r.std() @ default
std of a population, divisor G: r.std(dim=1, keepdim=True) => r.std(1, False, keepdim=True)
    @ default
float noise divided by its own std: advantages.masked_fill(equal, 0.0) => advantages
[grpo.process_advantages | objective steps or process]
steps normalised within a completion: range(0, len(rewards), group_size)
    => range(0, len(rewards), group_size := 1) @ --supervision process
steps before a token, not behind it: at_end.flip(1).cumsum(dim=1).flip(1) => at_end.cumsum(dim=1)
    @ --supervision process
[grpo.grpo_loss | objective kl or loss]
KL with the wrong sign: objective - kl_beta * kl => objective + kl_beta * kl @ default
[grpo.kl_estimate | objective kl]
KL of the other direction: logp_ref - logp => logp - logp_ref @ default
KL without a gradient: logp_ref - logp => logp_ref - logp.detach() @ default
k1 as the KL loss: torch.expm1(log_ratio) - log_ratio => -log_ratio @ default
[grpo.token_weights | objective weights or loss]
token mean for the mean over completions: mask.sum(dim=1, keepdim=True) => (mask.sum() / N)
    @ default
mean over the padding, too: mask.sum(dim=1, keepdim=True).clamp(min=1) => mask.shape[1] @ default
[grpo.grpo_loss | objective padding]
advantages of the padding are used: advantages.expand_as(weights).masked_fill(padding, 0.0)
    => advantages.expand_as(weights)
log-probs of the padding are multiplied by 0: logp.masked_fill(padding, 0.0) => logp
[train.update | train naive_loop and constant]
a denominator for each micro-batch: loss.backward() => (loss / micro.weights.sum()).backward()
    @ --micro-tokens 500
[grpo.completion_mask | objective eos]
mask by the pad value, which is EOS: is_eos.cumsum(dim=1) - is_eos == 0 => is_eos == 0 @ default
EOS left out of the loss: is_eos.cumsum(dim=1) - is_eos => is_eos.cumsum(dim=1) @ default
only one of several EOS ids: torch.isin(completion_ids, eos) => (completion_ids == eos[0])
[grpo.logp_and_entropy | sampling rescored]
no temperature in the log-probs: at_least_float32(head(states)) / temperature
    => at_least_float32(head(states)) @ --temperature 0.7
[grpo.token_logprobs | sampling rescored]
log-probs shifted by one: torch.cat([first, completions.last_hidden_state[:, :-1]], dim=1)
    => completions.last_hidden_state
[grpo.logp_and_entropy | sampling bf16]
log-softmax in bf16: at_least_float32(head(states)) => head(states)
[grpo.forward | sampling left_padding]
positions that count the padding: attention_mask.cumsum(dim=1)
    => torch.ones_like(attention_mask).cumsum(dim=1)
[grpo.bf16_weights | sampling rotary]
rotary frequencies in bf16: model.parameters() => [*model.parameters(), *model.buffers()]
[train.update | train naive_loop and constant]
old log-probs renewed with each update: epoch == 0 or config.sample_from == "reference" => True
    @ --mu 4
[train.sample_batch | train naive_loop and constant or its_own_gold]
groups in the wrong order: torch.tensor(outcomes, dtype=torch.float64).view(-1, G)
    => torch.tensor(outcomes).view(G, -1).T.contiguous() @ default
golds in the wrong order: [problem.answer for problem in problems for _ in range(G)]
    => [problem.answer for problem in problems] * G @ default
[train.train | train reference_is_the_policy]
the reference is updated every step: step % config.steps == 0 => True @ default
[train.sample_batch | train naive_loop and constant]
truncated rows stay in the denominator: in_loss & ~samples.truncated[:, None] => in_loss
    @ --max-new-tokens 20 --mask-truncated
[train.sample_batch | train naive_loop]
zero_var counted per completion: (advantages == 0).view(len(problems), -1).all(dim=1)
    => (advantages == 0) @ --supervision process
[grpo.grpo_loss | objective loss]
clip_share with the wrong bound: objective < unclipped => (logp - logp_old).abs() > clip_high
    @ --mu 4
clip_share over all tokens alike: (weights * clipped).sum() => clipped.float().mean() @ --mu 4
[train.step_optimizer | train naive_loop and lr-warmup]
the gradient of the step before is kept: optimizer.zero_grad() => None @ default
the gradient is not clipped: torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    => torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9) @ --max-grad-norm 0.1
the learning rate is not set: optimizer.param_groups[0]["lr"] = lr => pass @ default
[train.update | train naive_loop and constant]
only the first micro-batch is used: micro_batches(batch, config.micro_tokens)
    => micro_batches(batch, config.micro_tokens)[:1] @ --micro-tokens 500
--max-grad-norm ignored: config.max_grad_norm => 1.0 @ --max-grad-norm 0.1
--clip-low handed on as --clip-high: config.clip_low => config.clip_high @ --mu 4 --clip-high 0.3
kl and clip_share not divided by the weights: 1.0 if name == "loss" else total_weight => 1.0
    @ --aggregate constant
entropy not divided by the weights: (micro.weights * entropy).sum().item() / total_weight
    => (micro.weights * entropy).sum().item() @ --aggregate constant
kl and loss summed over mu: value / per_token / config.mu => value / per_token @ --mu 4
[train.train | train naive_loop and lr-warmup]
the learning rate starts anew with each iteration: learning_rate(
    step, total, config.lr, config.lr_warmup, config.lr_end) => learning_rate(
    step % config.steps, config.steps, config.lr, config.lr_warmup, config.lr_end)
    @ --iterations 2 --steps 30
weight decay: torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    => torch.optim.AdamW(policy.parameters(), fused=True) @ default
[train.warm_up | train warm_up]
--max-grad-norm ignored in the warm-up: config.max_grad_norm => 1.0 @ --max-grad-norm 0.1
warm-up averaged per solution, not per token: token_weights(mask, "token") => token_weights(mask)
    @ default
warm-up at the temperature of sampling: 1.0 => config.temperature @ --temperature 0.7
[train.gather_problems | train tenth]
the held-out tenth depends on the seed: random.Random(0) => random.Random(config.seed)
duplicates of held-out ones stay: problem.question not in hidden => problem not in held_out["in"]
[train.load_checkpoint | resume half_a_line]
the log is not cut back on resume: os.truncate(log, size) => None
[train.save_checkpoint | resume five_steps and mu]
the row of a checkpoint is dropped: {"row": row, "states": states}
    => {"row": {"step": row["step"], "seconds": row["seconds"]}, "states": states}
[eval.build_prompt | eval exactly_one_bos]
a second BOS: [bos, *itertools.dropwhile(lambda token: token == bos, ids)] => [bos, *ids]
[eval.eos_token_ids | eval end_of_turn]
the end of a turn is no EOS: ids - {None} => {tokenizer.eos_token_id}
[eval.pad_rows | sampling nan]
padding filled with the pad id: ids.where(mask, first) => ids
[eval.report | options temperature-1000]
--temperature of eval.py not passed on: options.temperature => 1.0
[reward._same_value | reward equal or different or copying
arithmetic that was not done is paid: all(map(_is_number, gold_sides)) => False
a unit against another unit is paid: unit != gold_unit => False
[reward._evaluate | reward equal or different
all letters are the same number: f"{letter} {point}" => f"{point}"
[reward._close | reward equal or different or exact
numbers compared as floats: -500 => -40
[reward._to_python | reward equal or different
opaque texts are computed: _OPAQUE.fullmatch(text) => None
[reward.LearnedReward.fit | reward_model naive_loop]
reward fitted without clipping: torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0) => None
"""

MUTANTS = []  # (what is wrong, function, tests, right piece, wrong piece)
FLAGS = {}  # number -> options of train.py under which a run prints other numbers
for line in re.sub(r"\n +", " ", LIST).strip().splitlines():
    if line.startswith("["):
        function, tests = line.strip("[]").split(" | ")
    else:
        what, pieces = line.split(": ", 1)
        pieces, _, flags = pieces.partition(" @ ")
        MUTANTS.append((what, function, tests, *pieces.split(" => ")))
        if flags:
            FLAGS[len(MUTANTS)] = flags.replace("default", "")
# What test_options.py looks at are whole runs.
SLOW = [number for number, mutant in enumerate(MUTANTS, 1) if mutant[2].startswith("options")]
FAST = [number for number, mutant in enumerate(MUTANTS, 1) if number not in SLOW]
CAUGHT = {}  # number -> the tests that failed


def find(source, function, piece):
    """Return the nodes of a function that are a piece of code; its format does not matter."""
    wanted = ast.parse(piece.strip()).body[0]
    wanted = wanted.value if isinstance(wanted, ast.Expr) else wanted
    scope = ast.parse(source)
    for name in function.split(".")[1:]:
        scope = next(node for node in scope.body if getattr(node, "name", "") == name)
    alike = [node for node in ast.walk(scope) if type(node) is type(wanted)]
    return [node for node in alike if ast.dump(node) == ast.dump(wanted)]


def plant(source, function, right, wrong):
    """Return the source of a module with a mistake; all else keeps its format."""
    found = find(source, function, right)
    assert len(found) == 1, f"{function} has {right} {len(found)} times, not once"
    lines = source.encode().splitlines(keepends=True)  # ast counts bytes
    start = sum(map(len, lines[: found[0].lineno - 1])) + found[0].col_offset
    end = sum(map(len, lines[: found[0].end_lineno - 1])) + found[0].end_col_offset
    text = b"".join(lines)
    planted = (text[:start] + wrong.encode() + text[end:]).decode()
    assert find(planted, function, wrong), f"{wrong} needs parentheses"
    return planted


@contextlib.contextmanager
def mistake(function, right, wrong):
    """Exchange the code of a function, in place, for that with the mistake."""
    module, *names = function.split(".")
    file = MODULES[module].__file__
    planted = plant(Path(file).read_text(encoding="utf-8"), function, right, wrong)
    code = compile(planted, file, "exec")
    for name in names:
        inner = [part for part in code.co_consts if isinstance(part, CodeType)]
        code = next(part for part in inner if part.co_name == name)
    target = inspect.unwrap(functools.reduce(getattr, names, MODULES[module]))
    before = target.__code__
    forget()
    target.__code__ = code
    try:
        yield
    finally:
        target.__code__ = before
        forget()  # what the grader remembers may be of the mistake


class Failures:
    """A plugin of pytest: how many tests ran, and the names of those that failed."""

    def __init__(self):
        self.ran = 0
        self.names = []

    def pytest_runtest_logreport(self, report):
        self.ran += report.when == "call"
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        # A NameError would be a slip in the list above.
        if report.failed and name not in self.names and "NameError" not in report.longreprtext:
            self.names.append(name)


def run_tests(tests):
    """Run tests in this process, up to the third that fails."""
    file, _, words = tests.partition(" ")
    path = Path(__file__).with_name(f"test_{file}.py")
    options = "-q --tb=line --maxfail=3 -p no:cacheprovider -p no:unraisableexception"
    failures = Failures()
    loaded = sys.modules.pop(path.stem, None)  # what it remembers is of the right code
    pytest.main([str(path), *options.split(), "-k", words], plugins=[failures])
    if loaded:
        sys.modules[path.stem] = loaded
    return failures


@pytest.mark.parametrize("number", FAST + [pytest.param(n, marks=pytest.mark.slow) for n in SLOW])
def test_every_mutant_fails_a_test(number):
    what, function, tests, right, wrong = MUTANTS[number - 1]
    with mistake(function, right, wrong):
        failures = run_tests(tests)
    CAUGHT[number] = failures.names
    assert failures.names, f"none of {failures.ran} tests, test_{tests}, notices: {what}"


def test_the_table(capsys):
    """Without a mutant the same tests pass, run in the same way: the mistakes are what fails."""
    for tests in ("objective", "sampling rotary", "train its_own_gold"):
        failures = run_tests(tests)
        assert failures.ran and not failures.names, tests
    with capsys.disabled():
        print("\n\n| | wrong version | noticed by |\n|---|---|---|")
        for number, names in sorted(CAUGHT.items()):
            print(f"| {number} | {MUTANTS[number - 1][0]} | {', '.join(names)} |")
