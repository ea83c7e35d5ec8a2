r"""Rewards for math: a rule (text in, 1.0 or 0.0 out) and a model that learns it.

GRPO learns whatever the reward pays for, so a rule that can be fooled will be fooled. Hence the
answer must be marked, and all of the marked text counts. If it cannot be parsed, it must be the
same text as the gold answer. No model output is ever run as code, and the size of every text and
number is bounded. To follow the default run, read section 1; section 4 is the grader itself.

Conventions, each a choice (change one, and the tests tell you what moved):

A box takes precedence over a tag, a tag over ####; the last one counts (for ####, the last with a
value).
>>> extract_answer(r"\boxed{1} \boxed{2} <answer>3</answer>")
'2'

A number without a mark earns nothing, nor does a hedge between two answers.
>>> accuracy_reward("The answer is 18.", "18"), is_equivalent("18 or 20", "18")
(0.0, False)

A percent sign is optional, unless the gold answer has one.
>>> [is_equivalent("50%", gold) for gold in ("1/2", "0.5", "50")], is_equivalent("50", "50%")
([True, True, True], False)

Arithmetic has to be done. If the gold answer is a plain number, then a sum, difference or product
earns nothing; otherwise a policy could just copy the question. Fractions, powers and roots are
forms of a number.
>>> is_equivalent("9+9", "18"), is_equivalent("36/2", "18"), is_equivalent("2^3", "8")
(False, True, True)

Letters stand for positive numbers (except e, i and \pi). Several in a row are a product: 2ab is
2ba.
>>> is_equivalent(r"\sqrt{x^3}", r"x\sqrt{x}"), is_equivalent("5 red balls", "5")
(True, False)

A word, date, ratio or call such as f(2x) matches only identical text.
>>> is_equivalent("on", "no"), is_equivalent("2020-07-04", "2009"), is_equivalent("f(2x)", "2f(x)")
(False, False, False)

Order does not matter in lists. Elsewhere it does, though x > 5 is 5 < x.
>>> is_equivalent("2, 1", r"\{1, 2\}"), is_equivalent("(2, 1)", "(1, 2)")
(True, False)

A name in front may be left out.
>>> is_equivalent("2x+3", "y = 2x+3"), is_equivalent("x=5", "y=5")
(True, False)

A unit from a closed list may be left out, too. The base of a number may not.
>>> is_equivalent("18", "18 cm"), is_equivalent("18 cents", "18 dollars")
(True, False)
>>> is_equivalent("5", "101_2")
False
"""

import ast
import copy
import functools
import operator
import random
import re
import runpy
import unicodedata
import zlib
from fractions import Fraction

import mpmath  # comes with torch
import torch

# What follows a question, as in the prompts of the released DeepSeekMath models.
MATH_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_ANSWER = 400  # characters of a marked text
MAX_LENGTH = 300  # characters of an answer after the clean-up
MAX_DEPTH = 40  # expressions within expressions
MAX_ITEMS = 50  # items of a list
MAX_BITS = 4000  # limit on |log2(value)|, and on the bits of an exact power


class InputError(Exception):
    """Tell the user what is wrong, and how to fix it. The command line prints it as one line."""


# --- 1. Extraction and rewards -------------------------------------------------------------------


def extract_answer(completion):
    r"""Return the text that a completion marks as its answer, or None if there is none.

    >>> extract_answer(r"so \boxed{18}."), extract_answer("<answer> 18 </answer>")
    ('18', '18')
    >>> extract_answer("#### 18"), extract_answer("it is 18")
    ('18', None)
    >>> extract_answer(r"\boxed{18"), extract_answer(r"<think> \boxed{18}")
    (None, None)
    """
    completion = completion.rpartition("</think>")[2]
    if "<think>" in completion:
        return None
    *before, boxed = re.split(r"\\(?:boxed|fbox)\s*\{", completion)
    _, tag, tagged = completion.rpartition("</answer>")[0].rpartition("<answer>")
    if before:
        answer = _up_to_closing_brace(boxed[: MAX_ANSWER + 1])
    elif tag:
        answer = tagged.partition("</answer>")[0]
    else:
        answer = _last_marked_line(completion)
    return answer.strip() if 0 < len(answer.strip()) <= MAX_ANSWER else None


def _last_marked_line(completion):
    """Return the text of the last "#### " line that has a value, else of the last one."""
    lines = re.findall(r"^#### (.*)$", completion, re.M)[-10:]
    for line in reversed(lines):
        expression, _ = _split_unit(_split_name(clean(line.strip()))[1])
        if value_of(expression):
            return line
    return lines[-1] if lines else ""


def _up_to_closing_brace(text):
    """Return the text before the brace that closes a box, or "" if it is never closed."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text):  # not "\{"
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""


def accuracy_reward(completion, gold):
    r"""Return 1.0 if the marked answer of a completion is equivalent to `gold`, else 0.0.

    It is 0.0 if the completion or the gold answer is missing or not a string.

    >>> accuracy_reward(r"so it is \boxed{18}", "18"), accuracy_reward("18", "18")
    (1.0, 0.0)
    >>> accuracy_reward(None, "18"), accuracy_reward(r"\boxed{}", "")
    (0.0, 0.0)
    """
    try:
        return float(is_equivalent(extract_answer(completion), gold))
    except Exception:  # whatever a completion provokes, it earns nothing
        return 0.0


def final_answer(solution):
    """Return what follows the last "####" of a solution, as in GSM8K; all of it if there is none.

    >>> final_answer("48 / 2 = 24\\n####24"), final_answer(24), final_answer(None)
    ('24', '24', '')
    """
    return "" if solution is None else str(solution).rpartition("####")[2].strip()


def accuracy_rewards(prompts, completions, answer, **kwargs):
    r"""Return `accuracy_reward` of N completions. TRL's GRPOTrainer calls it with this signature.

    completions: N texts, or N lists of chat messages, of which the last counts. answer: N gold
    answers or solutions.

    >>> accuracy_rewards(["1+1?"], [[{"role": "assistant", "content": r"\boxed{2}"}]], ["#### 2"])
    [1.0]
    """
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(accuracy_reward(text, final_answer(gold)))
    return rewards


def load_reward(name):
    """Load the function FILE.py:FUNCTION, or accuracy_rewards for "". Raises InputError."""
    if not name:
        return accuracy_rewards
    path, _, function = name.rpartition(":")
    try:
        loaded = runpy.run_path(path)[function]
        if not callable(loaded):
            raise TypeError(f"{function} is not a function")
        return loaded
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        message = f"--reward {name}: {error!r}; want FILE.py:FUNCTION, see accuracy_rewards"
        raise InputError(message) from error


def ask_reward(reward, prompts, completions, answer):
    """Call any reward with three lists of N texts, and return its N numbers as floats.

    The reward gets copies of the lists, so it may change them. Raises InputError if it fails, or
    does not return N numbers that are finite even in float32.
    """
    try:
        numbers = reward(prompts=[*prompts], completions=[*completions], answer=[*answer])
        rewards = [float(number) for number in numbers]
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may fail in any way
        raise InputError(f"--reward failed: {error!r}") from error
    if len(rewards) != len(completions) or not all(abs(number) < 1e30 for number in rewards):
        raise InputError(f"--reward: want {len(completions)} finite numbers, not {rewards}"[:300])
    return rewards


# --- 2. Steps ------------------------------------------------------------------------------------


def step_rewards(completion):
    r"""Return 1.0 or 0.0 for each step that can be checked: a list of (end, reward).

    A step is a line or sentence with a calculation and its result; its end is an offset in
    characters. It earns 1.0 if all of its equations hold, up to rounding to the decimals shown.
    Process supervision pays for each correct step, and a policy can farm that with 1+1=2.

    >>> step_rewards("First 3 * 4 = 12. Then 10/3 = 3.33!\n12 + 5 = 18\nso 18")
    [(17, 1.0), (35, 1.0), (47, 0.0)]
    """
    rewards = []
    for step in re.finditer(r"(?:[^\n.;!?。]|[.;!?](?!\s))+[.;!?。]?", completion[:10_000]):
        if "=" not in step[0]:
            continue
        text = re.sub(r"<<[^<>]*>>|\\?[$€£¥]", "", step[0]).rstrip(".;!?。")
        text = clean(text).replace("~", " ")
        text = re.sub(r"(?<![A-Za-z]) ?x ?(?=[\d(.])", "*", text)  # 3 x 4
        # 3 cups + 2 cups = 5 cups
        text = re.sub(r"(?<=\d) ([a-z]{3,})(?= ?[-+*=])(?=.*\b\1\b)", "", text)
        # Not checked: 25% of 80; 4 remainder 3; 3:30; 1,2; \frac{1}{2} (4 + 6). In each,
        # the telltale part becomes %, and the text is cut there.
        text = re.sub(r"% of | [Rr](?:emainder)?\b|(?<=\d)[:,](?=\d)|(?<=\}) (?=\()", "%", text)
        checks = []
        # Cut at words and odd signs.
        for chain in re.split(r"[^ :]*[A-Za-z\\^_%{}][^ :]*|[^-+*/=().\d ]", text):
            sides = [side.strip() for side in chain.split("=")]  # 3*4 = 12 = 24/2
            # A chain without a calculation on its left, such as +5 = 9, is a fragment.
            if re.match(r"-?[\d.(].*[-+*/]", sides[0]) and all(map(value_of, sides)):
                checks += map(_holds, sides, sides[1:])
        if checks:
            rewards.append((step.end(), float(all(checks))))
    return rewards


def _holds(left, right):
    """Tell whether left = right. * and / may be rounded to `right`'s decimals: 10/3 = 3.33."""
    exact = value_of(left)[0]
    shown = value_of(right)[0]
    number = re.fullmatch(r"-?\d*(?:\.(\d*))?", right)
    if exact == shown or not number or not re.search("[*/]", left):
        return exact == shown
    half = Fraction(1, 2 * 10 ** len(number[1] or ""))
    error = abs(exact) - abs(shown)  # halves are rounded away from 0: 5/2 to 3, -5/2 to -3
    return exact * shown > 0 and -half <= error < half


# --- 3. The learned reward model of Algorithm 1 --------------------------------------------------


class LearnedReward(torch.nn.Module):
    """Reward completions with a network that learns to imitate the rule: Algorithm 1, line 12.

    It has the policy's architecture, with a scalar head in place of the vocabulary's, and is called
    like any other reward. It keeps the texts that it is asked about; the rule above labels them,
    and `renew` fits the network to the labels.

    PAPER: theirs starts from the base model and learns from data labelled beforehand. This one
    starts from the policy and learns from the rule.
    """

    def __init__(self, policy, tokenizer, lr, size, steps=False, bf16=False):
        """Copy the policy's body. lr: learning rate of a fit. size: new texts per fit.

        steps: whether it learns to judge steps, too. bf16: the body computes in bf16.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.lr = lr
        self.size = size
        self.steps = steps
        self.bf16 = bf16
        self.fresh = []  # texts of the next fit: (prompt, completion, answer)
        self.replay = []  # texts of earlier fits
        self.body = copy.deepcopy(policy.base_model)
        width = policy.get_output_embeddings().weight.shape[1]  # D
        self.head = torch.nn.Linear(width, 1, device=policy.device)

    def forward(self, prompts, completions, answer):
        """Return the probability that each completion is right: N floats."""
        self.fresh = [*self.fresh, *zip(prompts, completions, answer, strict=True)][-self.size :]
        ends = [[len(completion)] for completion in completions]
        return [right for (right,) in self.judge(prompts, completions, ends)]

    @torch.no_grad()
    def judge(self, prompts, completions, ends, size=32):
        """Return the probability of "right" at each end (a character offset) of each completion."""
        rows = list(zip(prompts, completions, ends, strict=True))
        chunks = [self.logits(rows[i : i + size]) for i in range(0, len(rows), size)]
        right = torch.cat(chunks).sigmoid().split([len(places) for places in ends])
        return [part.tolist() for part in right]

    def logits(self, rows):
        """Return the logits at all ends of n rows (prompt, completion, ends), a flat tensor."""
        prompts = [self.frame(prompt) for prompt, _, _ in rows]
        texts = [prompt + row[1] for prompt, row in zip(prompts, rows, strict=True)]
        # Padding is on the right, where causal attention never looks.
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
        )
        ids = torch.tensor(batch.input_ids, device=self.body.device)  # (n, S)
        # TRAP: within one autocast, weights are cast once. With one around the whole fit, each step
        # would use the first weights (test_each_step_of_a_fit_sees_the_one_before).
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            states = self.body(input_ids=ids, use_cache=False).last_hidden_state  # (n, S, D)
        states = states.to(self.head.weight.dtype)
        at_ends = []
        for row, (_, _, ends) in enumerate(rows):
            spans = batch.offset_mapping[row]
            tokens = [_last_token(spans, len(prompts[row]) + end) for end in ends]
            at_ends.append(states[row, tokens])  # (ends, D)
        return self.head(torch.cat(at_ends)).squeeze(1)

    def frame(self, prompt):
        """Put a question into the chat template, as for the policy, but without a request."""
        if not self.tokenizer.chat_template:
            return prompt + "\n"
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def renew(self):
        """Fit to the fresh texts, plus one old text per nine fresh: the paper's 10% replay."""
        old = random.sample(self.replay, min(len(self.replay), len(self.fresh) // 9))
        self.fit(self.fresh + old)
        self.replay += self.fresh
        self.fresh = []

    def fit(self, texts, epochs=3, size=8):
        """Train on (prompt, completion, answer): each once per epoch, `size` of them per step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        order = []
        for _ in range(epochs):
            order += random.sample(texts, len(texts))
        for i in range(0, len(order), size):
            rows = []
            labels = []
            for prompt, completion, answer in order[i : i + size]:
                steps = step_rewards(completion) if self.steps else []
                rows.append((prompt, completion, [end for end, _ in steps] + [len(completion)]))
                labels += [right for _, right in steps]
                labels += accuracy_rewards([prompt], [completion], [answer])
            logits = self.logits(rows)
            labels = logits.new_tensor(labels)
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = self.lr * (1 - i / len(order))  # falls to 0
            optimizer.step()
            optimizer.zero_grad()

    def get_extra_state(self):
        """Let state_dict, and so a checkpoint, hold the texts as well."""
        return {"fresh": self.fresh, "replay": self.replay}

    def set_extra_state(self, state):
        """Restore the texts."""
        self.fresh = state["fresh"]
        self.replay = state["replay"]


def _last_token(spans, end):
    """Return the last token that begins before character `end`; spans: where each token is."""
    return max(i for i, (start, stop) in enumerate(spans) if start < min(stop, end))


# --- 4. Inside the grader. A reader of the training loop may stop here. --------------------------

# Read it from the bottom up. `is_equivalent` cleans both texts (`clean`): different spellings of
# the same thing become one. `_same_answer` strips names, `_same` takes lists, intervals and the
# like apart, `_same_value` strips units. What is left is an expression. Python's own parser makes a
# tree of it (`_tree`; `ast.parse` runs nothing), and `_evaluate` evaluates that, if it knows every
# kind of node in it. Anything else is opaque: it matches only identical text.

_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# Between two semicolons: characters, and what they become.
_CHARACTERS = dict.fromkeys(map(ord, "\u200b\ufeff`"))  # nothing
for _line in r"""− – ‐ -;· ⋅ ∙ *;÷ ⁄ ∕ /;∣ |;。 .;≤ ⩽ ≦ <=;≥ ⩾ ≧ >=;≠ \ne;± \pm;× \times
∈ \in;∪ \cup;∩ \cap;∅ \emptyset;∞ \infty;⟨ \langle;⟩ \rangle;π \pi;α \alpha;β \beta;γ \gamma
δ \delta;ε \epsilon;θ \theta;κ \kappa;λ \lambda;μ \mu;ν \nu;ξ \xi;ρ \rho;σ \sigma;τ \tau
φ \phi;χ \chi;ψ \psi;ω \omega""".replace("\n", ";").split(";"):
    *_old, _new = _line.split()
    _CHARACTERS |= dict.fromkeys(map(ord, _old), _new + " " if "\\" in _new else _new)
_ELEMENTARY = ["arcsin", "arccos", "arctan", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log"]
_ELEMENTARY += ["exp"]
_CALLED = "|".join(_ELEMENTARY)
_SPELLINGS = [  # in this order: a pattern, what it becomes, an example
    (r"^(\*\*|[\"'])(.+)\1$", r"\2"),  # **18**
    (r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r" \1 "),  # $18$
    (r"\\\(|\\\)|^\\\[|\\\]$", " "),  # \(18\)
    (r"\\\$", "$"),  # \$18
    (r"\\pounds(?![a-z])", "£"),  # \pounds 18
    (r"\{([,:])\}|,\\! ?", lambda match: match[1] or ","),  # 1{,}000 and 1,\!000
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),  # {1\over2}
    # "~" is the edge of a \text{}: 5\text{m} has a unit, 5m a factor.
    (r"\\(?:text[a-z]*|mbox|mathrm|operatorname) ?\{([^{}]*)\}", r"~\1~"),  # \text{cm}
    (r"\{ ?\\rm ([^{}]*)\}", r"~\1~"),  # {\rm cm}
    (r"\\(?:math(?:bf|it|bb)|boldsymbol) ?\{([^{}]*)\}", r" \1 "),  # \mathbf{v}
    (r"\\(?:(?:left|right|displaystyle|mathrm|boldsymbol|rm)(?![A-Za-z])|!)", ""),  # \left(1\right)
    (r"(?<!\\)\\(?:q?quad(?![a-z])|[,;: ])", " "),  # 2\,x
    (r"\\[dtc]frac|\\nicefrac", r"\\frac"),  # \dfrac12
    (r"\\cdot(?![a-z])", "*"),  # 2 \cdot x
    (r"(?<=[\d)}\]]) ?\\times(?![a-z])|\\times ?(?=[\d(\\])", "*"),  # 2\times x, not a\times b
    (r"\\div(?![a-z])", "/"),  # x \div 2
    (r"\\(?:le|leq|leqslant)(?![a-z])", "<="),  # x \le 2
    (r"\\(?:ge|geq|geqslant)(?![a-z])", ">="),  # x \ge 2
    (r"\\lt(?![a-z])", "<"),  # x \lt 2
    (r"\\gt(?![a-z])", ">"),  # x \gt 2
    (r"\\neq|\\not ?=|!=", r"\\ne "),  # x \neq 2
    (r"\\in(?![a-z])", "="),  # x \in S is x = S: the name may be left out
    (r"\\varepsilon", r"\\epsilon"),
    (r"\\varnothing|\\\{ *\\\}", r"\\emptyset"),  # \{\}
    (r"\\[lr]?[vV]ert(?![a-z])", "|"),  # \vert x\vert
    (r"^\|([^|]+)\|$", r"\\abs{\1}"),  # |-5|
    (r"\^ ?\{? ?\\circ ?\}?|\\degree|[ ~]*\bdeg(?:rees?)?\b", "°"),  # 90^\circ
    (r"\\%|[ ~]*\b(?:percent|per cent|pct)\b|~ ?\\?% ?~", "%"),  # 50\%
    (r"\b([ap])\.m\b\.?", r"\1m"),  # 5 a.m.
    (r",?[ ~]+(?:and|or)[ ~]+", ", "),  # 1 and 2
    (r"_ ?\{[ ~]*(\w+)[ ~]*\}", r"_\1 "),  # x_{1}
    (r"√ ?(\d+|\([^()]*\))", r"\\sqrt{\1}"),  # √5
    (r"(?<![A-Za-z\\])(?=(?:sqrt|pi)(?![A-Za-z]))", r"\\"),  # sqrt{5}
    (rf"(?<![A-Za-z\\])[ ~]*({_CALLED})(?![A-Za-z])~?(?=[ ~]*[\w(\[{{\\^])", r"\\\1"),  # ln 2
    (r"\\(sin|cos|tan) ?\^ ?(?:-1|\{ ?-1 ?\})", r"\\arc\1"),  # \tan^{-1} x
    (r"\\log_(\w+)", r"\\log[\1]"),  # \log_2 3
    (r"\\((?:sin|cos|tan|cot|sec|csc) ?[({]? ?)([\d.]+) ?°", r"\\\1\\degree{\2}"),  # \sin 30°
    # \begin{pmatrix}1&2\end{pmatrix}
    (r"\\(begin|end) ?\{(?:[pbB]?matrix|smallmatrix|array)\}(?: ?\{[lcr| ]*\})?", r"\\\1 "),
    (r"\\cr(?![a-z])", r"\\\\"),  # the next row of a matrix
    (r"[ ~]{2,}", lambda match: "~" if "~" in match[0] else " "),
    (r"^[ ~=]+|[ ~]*\.?[ ~\\]*$", ""),  # 18.
    (r"^([A-Za-z ~]{3,}|[A-Za-z](?=:))[!:]$", r"\1"),  # Yes!
    # 1 000 000
    (r"(?<![\d.])\d{1,3}(?:[ ~]\d{3})+(?![\d /])", lambda match: re.sub("[ ~]", "", match[0])),
    (r"(\\(?:frac|sqrt(?:\[\d+\])?|binom)) ?(\d|[A-Za-z](?![A-Za-z]* ?\{))", r"\1{\2}"),  # \frac12
    (r"(\\(?:frac|binom) ?\{[^{}]*\}) ?(\d|[A-Za-z]|\\pi)", r"\1{\2}"),  # \frac{1}2
    (r"\{ ?(\w+) ?\\choose ?(\w+) ?\}", r"\\binom{\1}{\2}"),  # {5 \choose 2}
    (r"(?<=\}) (?=\{)", ""),  # \frac{1} {2}
    (r"([$€£¥]) ?(-?(?:[\d.,]*\d|\\frac\{[^{}]*\}\{[^{}]*\}))", r"\2 \1"),  # $18 is 18 $
    (r"(?<![\w.^}])(\d+)[ ~]*(\\frac\{\d+\}\{\d+\})", r"\\mixed{\1}{\2}"),  # 1\frac{1}{2}
    (r"(?<![\w.^}])(\d+)[ ~]+(\d+/\d+)(?![\d.])", r"\\mixed{\1}{\2}"),  # 1 1/2
    (r"(?<![\w.^])(\d+\.?\d*) ?\* ?10 ?\^ ?\{?(-?\d+)\}?", r"\\sci{\1}{\2}"),  # 2 * 10^3
    (r"(\d+|(?<![A-Za-z])[A-Za-z]|\([^()]*\))!(?!!)", r"\\factorial{\1}"),  # 5!
    # \sin 2x is \sin{2x}
    (
        rf"\\((?:{_CALLED})(?:\[\w+\])?) ?(?![({{])"
        r"((?: ?(?:[\d.]+|[A-Za-z](?![A-Za-z])(?:_\w+)?|\\pi(?![a-z])|\\degree\{[\d.]+\})"
        r"|\\(?:alpha|beta|theta|phi|omega)(?![a-z]))+)",
        r"\\\1{\2}",
    ),
]
# 2abc is a product of letters; a lone word, or one of five letters or more, is opaque.
_OPAQUE = re.compile(
    r""".*(?: : | \.\. | \\[lc]?dots | \d\.\d*\(                           # ratios, 0.(3)
    | \{d\w?\}\{d\w\} | \bd\w?/d\w                                         # d/dx
    | (?<![A-Za-z\\]) (?:[fghFGHP] | [A-Za-z]{2,} | \\(?:var)?phi | \\psi)
      (?:_\w+)? (?:\^\{?-?\w+\}?)? \ ?\(                                   # f(2x)
    | (?<![A-Za-z\\_]) [A-Za-z]{5,}                                        # words
    ).* | [A-Za-z~ ]*[A-Za-z]{2}[A-Za-z~ ]*""",
    re.X | re.S,
)
# Dates, scores, sizes: 2020-07-04, 3-1, 2*3, 7/4/2020. They have no value, even in gold answers.
_SEVERAL_NUMBERS = re.compile(r"\d+(?: ?[-*] ?\d+)+|\d+/\d+/\d{2,}|\d{4}/\d+/\d+")


def clean(text):
    r"""Unify the spelling of signs and commands in a text; "" if there is no text or too much.

    >>> clean(r"$1,234.50$."), clean(r"\dfrac12"), clean("１８"), clean(r"\left(1\right)")
    ('1234.50', '\\frac{1}{2}', '18', '(1)')
    """
    if not text or len(text) > MAX_ANSWER:
        return ""
    text = re.sub("[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0].translate(_POWERS)}}}", text)
    text = re.sub("(?=[¼-¾⅐-⅞])", " ", text)  # 2⅓ is 2 1/3
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    text = " ".join(text.split())
    for pattern, new in _SPELLINGS:
        text = re.sub(pattern, new, text)
    if not re.search(r"[(\[]|\\\{", text):  # (1,000) may be a point
        thousands = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)"
        text = re.sub(thousands, lambda match: match[0].replace(",", ""), text)
    return text.strip() if len(text) <= MAX_LENGTH else ""


# Units: a closed list, each with its spellings. The last line is for compound units: a square
# inch is inch2.
_UNITS = {}
for _line in """meter m metre 米|centimeter cm centimetre 厘米|millimeter mm millimetre 毫米
kilometer km kilometre 千米 公里|decimeter dm 分米|inch in|foot ft feet|yard yd|mile mi
hectare 公顷|acre|gram g 克|kilogram kg 千克 公斤|milligram mg|ton tonne 吨
pound lb £|ounce oz|liter l L litre 升|milliliter ml millilitre 毫升|gallon gal|quart|pint
second s sec 秒|minute min 分钟|hour h hr 小时|day 天 日|week 周|month 月|year yr 年
am|pm|mile/hour mph|newton N|joule J|watt W|volt V|kelvin K|mole mol|° 度|fahrenheit F|celsius C
radian rad|dollar $|cent|euro €|penny pence|yen|yuan ¥ 元|jiao 角|fen 分
unit|people person|人|student|child children|apple|book|ball|box|card|coin|cookie|cup|egg|flower
game|glass|item|page|piece|point|ride|slice|step|ticket|time|toy|tree|way|word
个|只|本|支|条|张|块|件|棵|朵|岁|页|次|包|盒|袋|箱|瓶|辆|名
/ per|2 square sq 平方|3 cubic cu 立方""".replace("\n", "|").split("|"):
    for _word in _line.split():
        plurals = ("", "s", "es") if len(_word) > 1 else ("",)
        _UNITS |= {_word + end: _line.split()[0] for end in plurals}
_SYMBOLS = "".join(re.findall(r"\b[A-Za-z]\b", " ".join(_UNITS)))
_WORDS = "|".join(
    re.escape(word)
    for word in sorted(_UNITS, key=len, reverse=True)
    if word not in ("/", "per", "2", "3", *_SYMBOLS)
)
_UNIT = re.compile(
    rf"""(?<=[\d)}}\]%!°a-z])                       # after a value
    (?! [ ]*/?[ ]*[A-Za-z](?![A-Za-z]) )            # 18 m is a product; in \text it is a unit
    (?: [ ~]* (?:/|\*|per\b)? [ ~]*
        (?: (?<![A-Za-z]) (?: (?i:{_WORDS})\.? | [{_SYMBOLS}] ) (?![A-Za-z]) | ° )
        (?: [ ~]*\^\{{?[23]\}}? )?
    ){{1,4}} [ ~]*$""",
    re.X,
)


def _split_unit(text):
    r"""Split "18 square inches", or "18 in^2", into ("18", "inch2"); "18 apes" has no unit."""
    match = _UNIT.search(text, max(0, len(text) - 60))  # no unit is longer
    if not match:
        return text, ""
    words = re.findall(rf"(?i:{_WORDS}|per)|[A-Za-z/23]", match[0])
    unit = "".join(_UNITS.get(word) or _UNITS[word.casefold()] for word in words)
    unit = re.sub(r"(^|/)([23])([^/]+)", r"\1\3\2", unit)  # 2meter, a square meter, is meter2
    return text[: match.start()].rstrip(" ~"), unit


# Names: x, A_1, \theta, f(x), (x, y).
_NAME = r"(?:\\?[A-Za-z]+(?:_\w+|_\{[^{}]*\})?[ ~]?(?:\([\w, ]*\))?|\([a-z](?:, ?[a-z])+\))[ ~]*"


def _split_name(text):
    """Split "x=5" into ("x", "5"), and "x=5, x=6" into ("x", "5, 6").

    "2x = 5" is an equation and gives ("", "2x = 5").
    """
    name = re.match(rf"~?({_NAME})=", text)
    if not name:
        return "", text
    bare = re.sub(rf"(^~?|, ?){re.escape(name[1])}=", r"\1", text)
    return name[1].strip(" ~"), bare.strip(" ~")


# Roots, pi, letters and the like have 600 bits, and are equal if 500 of them agree.
_MP = mpmath.MPContext()
_MP.prec = 600


def _power(base, exponent):
    """Raise to a power, exactly if both are rational; odd roots of negatives are real."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = (base.numerator * base.denominator).bit_length()
        if abs(exponent.numerator) * bits > MAX_BITS:
            raise OverflowError("too large")
        if exponent.denominator == 1:
            return base**exponent
        if exponent.denominator % 2 and base < 0:
            return (-_power(-base, Fraction(1, exponent.denominator))) ** exponent.numerator
    return _MP.power(base, exponent)


def _factorial(value):
    """Return n!, as gamma(n + 1) if n contains a letter."""
    if abs(value) > 400:
        raise OverflowError("too large")
    return _MP.factorial(value)


# Fraction - mpf and Fraction / mpf raise TypeError; + and * work.
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: lambda a, b: a + -b,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a * (1 / b),
    ast.Pow: _power,
}
_FUNCTIONS = {
    "frac": _OPERATORS[ast.Div],
    "mixed": operator.add,  # 1\frac{1}{2}
    "sci": lambda a, b: a * _power(Fraction(10), b),  # 2 * 10^3
    "sqrt": lambda value, degree=Fraction(2): _power(value, 1 / degree),
    "abs": abs,
    "factorial": _factorial,
    "binom": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n + -k)),
    "degree": lambda angle: angle * _MP.pi / 180,
    **{name: getattr(_MP, name.replace("arc", "a")) for name in _ELEMENTARY},  # asin
    "log": lambda value, base: _MP.log(value, base),  # without a base it may mean two things
}
_CONSTANTS = {r"\pi": +_MP.pi, "e": +_MP.e, "i": _MP.mpc(0, 1)}
_LETTERS = """alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau
phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar infty"""
# How Python writes the signs. Braces stay ({x} is a set of one item), so mismatched brackets
# such as {x) are a syntax error.
_SIGNS = {sign: sign for sign in "+-*/()[],"}
_SIGNS |= {"{": "({", "}": "})", "}{": "},{", "^": "**", "%": '/"100"'}
_TOKEN = re.compile(
    rf"""(\d+\.?\d* | \.\d+)                                    # a number
    | ((?: \\(?:{"|".join(_LETTERS.split())})(?![A-Za-z]) | [A-Za-z])
       (?:_\w+ | _\{{[^{{}}]*\}})?)                             # a letter
    | \\({"|".join(_FUNCTIONS)})(?![A-Za-z])                    # a function
    | (\}}\{{ | \\?[^ ~])                                       # a sign
    """,
    re.A | re.S | re.X,
)


def _to_python(text):
    r"""Write a cleaned expression as Python would: 2\frac{x}{3} is '2'*frac({'x'},{'3'}).

    Letters become strings. So do numbers, since Fraction reads strings exactly. Raises ValueError
    or KeyError.
    """
    if _OPAQUE.fullmatch(text):
        raise ValueError("opaque")
    python = []
    after_factor = False
    for number, letter, function, sign in _TOKEN.findall(text):
        if after_factor and number:
            raise ValueError("1 8, or x1")
        if after_factor and (letter or function or sign in ("(", "{")):
            python.append("*")  # 2x
        literal = number or letter
        python.append(repr(literal) if literal else function or _SIGNS[sign])
        after_factor = bool(literal) or sign in (")", "}", "%")
    return "".join(python)


def _evaluate(node, point, depth=0):
    """Evaluate a tree. point (0, 1 or 2): selects values between 2 and 3 for the letters."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")

    def inside(child):
        return _evaluate(child, point, depth + 1)

    match node:
        case ast.Constant(value=str(number)) if number[0] in ".0123456789":
            value = Fraction(number)
        case ast.Constant(value=str(letter)):
            unknown = 2 + _MP.mpf(zlib.crc32(f"{letter} {point}".encode())) / 2**32
            value = _CONSTANTS.get(letter, unknown)
        case ast.Set(elts=[child]) | ast.UnaryOp(op=ast.UAdd(), operand=child):
            value = inside(child)
        case ast.UnaryOp(op=ast.USub(), operand=child):
            value = -inside(child)
        case ast.BinOp(left=left, op=sign, right=right):
            value = _OPERATORS[type(sign)](inside(left), inside(right))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            value = _FUNCTIONS[name](*map(inside, arguments))
        # \sqrt[3]{8} or \log[2]{8}
        case ast.Call(func=ast.Subscript(value=ast.Name(id=name), slice=index), args=[child]):
            value = _FUNCTIONS[name](inside(child), inside(index))
        case _:
            raise ValueError("not an expression")
    if value and abs(_MP.mag(value)) > MAX_BITS:
        raise OverflowError("too large")
    return value


@functools.lru_cache(maxsize=1000)
def _tree(text):
    """Parse a cleaned expression: a tree, or None. Nothing is run."""
    try:
        return ast.parse(_to_python(text), mode="eval").body
    except (LookupError, ValueError, SyntaxError, MemoryError, RecursionError):
        return None


@functools.lru_cache(maxsize=1000)  # the answers of a group are compared with one gold
def value_of(text):
    r"""Return the values of a cleaned expression at three points, or None if it has no value.

    The letters have different values at each point.

    >>> value_of(r"\frac{3}{4}")[0], value_of("1/0"), value_of("1 8"), value_of("9^{9^{9^9}}")
    (Fraction(3, 4), None, None, None)
    """
    try:
        return [_evaluate(_tree(text), point) for point in range(3)]
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return None


def _close(a, b):
    """Compare two values: Fractions exactly, others to 500 bits."""
    # TRAP: as floats 9007199254740993 and ...2 are the same (test_numbers_are_exact).
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return _MP.almosteq(_MP.convert(a), _MP.convert(b), rel_eps=_MP.ldexp(1, -500), abs_eps=0)


def _split(text, separators):
    """Split where no bracket is open: (parts, separators found).

    Raises ValueError where a bracket is closed before it was opened.
    """
    parts = [""]
    found = []
    depth = 0
    pieces = rf"\\begin|\\end|\\langle|\\rangle|{separators}|\\.|."
    for piece in re.findall(pieces, text, re.S):
        if piece in ("(", "[", "{", "\\{", "\\begin", "\\langle"):
            depth += 1
        elif piece in (")", "]", "}", "\\}", "\\end", "\\rangle"):
            depth -= 1
        if depth < 0:
            raise ValueError("closed before it was opened")
        if depth == 0 and re.fullmatch(separators, piece):
            parts.append("")
            found.append(piece)
        else:
            parts[-1] += piece
    return [part.strip(" ~") for part in parts], found


@functools.lru_cache(maxsize=1000)
def _structure(text):
    r"""Take a cleaned text apart: (kind, items), or ("", [text]) if it is an expression.

    kind: "," of a list or set, "(]" of an interval, "matrix 2", "\cup", "<".
    """
    if re.search(r"\\(?:pm|mp)(?![a-z])", text):
        return ",", _plus_and_minus(text)
    matrix = re.fullmatch(r"[(\[]?\\begin (.*?)(?:\\\\ ?)?\\end ?[)\]]?", text)
    if matrix:
        rows = matrix[1].split("\\\\")
        return f"matrix {len(rows)}", [item for row in rows for item in _split(row, "&")[0]]
    for separator in (r"\\cup(?![a-z])", ","):
        items, found = _split(text, separator)
        if found:
            return found[0], items
    kind, items = _bracket(text)
    if kind:
        return kind, items
    items, found = _split(text, r"<=|>=|<|>|\\ne(?![a-z])")
    if found and all(sign[0] == ">" for sign in found):  # x > 5 is 5 < x
        found = [sign.replace(">", "<") for sign in reversed(found)]
        items = items[::-1]
    return "".join(found), items


def _plus_and_minus(text):
    r"""Read 1 \pm 2 as the list of 1 + 2 and 1 - 2; 1 \pm 2, 5 has three items."""
    items = []
    for plus, minus in ("+-", "-+"):
        signed = re.sub(r"\\pm(?![a-z])", plus, re.sub(r"\\mp(?![a-z])", minus, text))
        kind, parts = _structure(signed)
        for item in parts if kind == "," else [signed]:
            if not any(_same(item, other) for other in items):
                items.append(item)
    return items


def _bracket(text):
    r"""Take (1, 2] or \{1\} apart, or return ("", []); (18) is an expression."""
    match = re.fullmatch(r"(\\\{|\\langle|[(\[])(.*)(\\\}|\\rangle|[)\]])", text)
    if not match:
        return "", []
    try:
        items, commas = _split(match[2], ",")
    except ValueError:  # (1)+(2)
        return "", []
    kind = match[1] + match[3]
    if kind == r"\{\}":
        return ",", items
    return (kind, items) if commas and "{" not in kind and "}" not in kind else ("", [])


@functools.lru_cache(maxsize=1000)
def _bare(text):
    """Drop the spaces, except those between two digits."""
    return re.sub(r"(?<!\d)[ ~]+|[ ~]+(?!\d)", "", text)


def _same(a, b):
    """Tell whether two cleaned texts are the same, or have the same parts or value. b: gold."""
    if _bare(a) == _bare(b):
        return True
    kind, items = _structure(a)
    other_kind, others = _structure(b)
    if kind != other_kind or len(items) != len(others) or len(items) > MAX_ITEMS:
        return False
    if not kind:
        return _same_value(a, b)
    if kind not in (",", "\\cup"):
        return all(map(_same, items, others))
    others = list(others)
    for item in items:  # in any order
        match = next((other for other in others if _same(item, other)), None)
        if match is None:
            return False
        others.remove(match)
    return True


@functools.lru_cache(maxsize=1000)
def _sides(text):
    """Split "9+9 = 18 cm" into ("cm", ["9+9", "18"]); no sides if the text is several numbers."""
    text, unit = _split_unit(text)
    if _SEVERAL_NUMBERS.fullmatch(text):
        return unit, []
    return unit, _split(text, "=")[0]


def _same_value(a, b):
    """Tell whether two expressions or equations have the same value; b is the gold one."""
    unit, sides = _sides(a)
    gold_unit, gold_sides = _sides(b)
    if not sides or not gold_sides or (unit and gold_unit and unit != gold_unit):
        return False
    if len(sides) == len(gold_sides) == 2:
        return _same_equation(sides, gold_sides)
    first, *others = [value_of(side) for side in (*sides, *gold_sides)]
    for other in others:  # all sides must be equal, including those of 9+9 = 18
        if not first or not other or not all(map(_close, first, other)):
            return False
    # Arithmetic that was not done earns nothing, or a policy would copy the question.
    copied = all(map(_is_number, gold_sides)) and all(map(_is_undone, sides))
    return not copied


def _same_equation(sides, others):
    """Tell whether two equations are the same up to a factor: x = 2y and 2x = 4y."""
    if sides[0] == others[0] and re.fullmatch(_NAME, sides[0]):  # A = (1, 2), in a list
        return _same(sides[1], others[1])
    x, y = (value_of(f"({left})-({right})") for left, right in (sides, others))
    if not x or not y or 0 in x or 0 in y:
        return False
    factors = [p * (1 / q) for p, q in zip(x, y, strict=True)]
    return all(_close(factor, factors[0]) for factor in factors)


def _is_undone(text):
    """Tell whether something is left to add, subtract or multiply: 9+9, not 36/2 or 2^3."""
    undone = (ast.Add, ast.Sub, ast.Mult)
    return any(isinstance(node, undone) for node in ast.walk(_tree(text)))


def _is_number(text):
    """Tell whether an expression is a plain number: 18, 0.5, 1/2, 1 1/2, 50%, 2e3."""
    bare = re.sub(r"\\(?:frac|mixed|sci)", "", text)
    return bool(re.fullmatch(r"[-+\d./{}() %]+", bare)) and not _is_undone(text)


@functools.lru_cache(maxsize=10_000)
def is_equivalent(answer, gold):
    r"""Tell whether two answers mean the same.

    >>> is_equivalent(r"1\frac12", "1.5"), is_equivalent(r"\sqrt 8", r"2\sqrt{2}")
    (True, True)
    >>> is_equivalent("2x=4y", "x-2y=0"), is_equivalent("18", "18.0000001")
    (True, False)
    >>> is_equivalent("0.333", "1/3"), is_equivalent("(1,2]", "[1,2]")
    (False, False)
    """
    answer = clean(answer)
    gold = clean(gold)
    if not answer or not gold:
        return False
    if _word(answer) and _word(answer) == _word(gold):
        return True
    # Read 2e-1 as 0.2 in both texts, or as 2 times e minus 1 in both.
    scientific = r"(?<![\w.])(\d+\.?\d*)[eE]([-+]?\d{1,4})(?![\d.])"
    numbers = [re.sub(scientific, r"\\sci{\1}{\2}", text) for text in (answer, gold)]
    try:
        return any(_same_answer(*pair) for pair in {(answer, gold), tuple(numbers)})
    except ValueError:  # brackets that do not match
        return False


def _word(text):
    """Return a word in lower case, without spaces, with (A) as a; "" for anything else."""
    word = re.sub(r"^\(([A-Za-z])\)$|[ ~]", r"\1", text).casefold()
    return word if re.fullmatch(r"[^\W\d_]+|(?=.*[a-z]{4})[a-z.-]+", word) else ""


def _same_answer(answer, gold):
    """Compare two cleaned texts as they are, and without name or percent sign."""
    name, value = _split_name(answer)
    gold_name, gold_value = _split_name(gold)
    # If both have the same name, only what follows is compared. If not, y = 2x may be an equation,
    # or 2x with a name.
    pairs = [(answer, gold)] if name != gold_name else []
    if name == gold_name or not name or not gold_name:
        pairs.append((value, gold_value))
        # 50% may stand for 50, as if % were a unit.
        if "%" not in gold and not _split_unit(gold)[1]:
            pairs.append((re.sub(r"^(-?[^-+*/,%]*)%$", r"\1", value), gold_value))
    return any(_same(*pair) for pair in pairs)
