r"""Rewards for math: rules (1 to 5), a text in and 1.0 or 0.0 out, and a model that learns to imitate them (6).

GRPO learns whatever the reward pays for, so a rule that can be fooled will be. Hence the answer must be
marked, the whole marked text is the answer, and what is not understood must be the same text. An answer is
cleaned, parsed and compared; text of a model is never run as code, and every text and number is bounded.

Conventions, each a choice (change one, and the tests will tell you what moved):
>>> extract_answer(r"\boxed{1} \boxed{2} <answer>3</answer>")   # box over tag over ####; of several the last
'2'
>>> accuracy_reward("The answer is 18.", "18"), is_equivalent("18 or 20", "18")   # no pay for a bare number, a hedge
(0.0, False)
>>> [is_equivalent("50%", gold) for gold in ("1/2", "0.5", "50")], is_equivalent("50", "50%")   # gold's % is needed
([True, True, True], False)
>>> is_equivalent(r"2 \cdot 3^2", "18"), is_equivalent("9+9", "18")   # a product or sum equals its value
(True, True)
>>> is_equivalent("2, 1", r"\{1, 2\}"), is_equivalent("(2, 1)", "(1, 2)")   # the order is free in lists only
(True, False)
>>> is_equivalent("2x+3", "y = 2x+3"), is_equivalent("x=5", "y=5")   # a name in front may be left out
(True, False)
>>> is_equivalent("18", "18 cm"), is_equivalent("18 cents", "18 dollars"), is_equivalent("5", "101_2")   # unit, base
(True, False, False)
"""

import cmath
import copy
import functools
import math
import operator
import random
import re
import runpy
import zlib
from dataclasses import dataclass
from fractions import Fraction

import torch

# What follows a question, as in the prompts of the released DeepSeekMath models.
MATH_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_ANSWER, MAX_LENGTH = (
    400,
    300,
)  # characters of a marked text, and of an answer after the clean-up
# Expressions within expressions; items of a list; bits of numerator and denominator together
MAX_DEPTH, MAX_ITEMS, MAX_BITS = 40, 50, 1000


class InputError(Exception):
    """Something that the user can mend; the text says what and how. The command line prints it as one line."""


# --- 1. Extraction -------------------------------------------------------------------------------


def extract_answer(completion):
    r"""The text that a completion marks as its answer, or None if there is none. str -> str | None.
    >>> extract_answer(r"so \boxed{18}."), extract_answer("<answer> 18 </answer>"), extract_answer("#### 18")
    ('18', '18', '18')
    >>> extract_answer("it is 18"), extract_answer(r"\boxed{18"), extract_answer(r"<think> \boxed{18}")
    (None, None, None)
    """
    completion = completion.rpartition("</think>")[2]
    if "<think>" in completion:
        return None
    *before, boxed = re.split(r"\\(?:boxed|fbox)\s*\{", completion)
    _, tag, tagged = completion.rpartition("</answer>")[0].rpartition("<answer>")
    _, mark, line = f"\n{completion}".rpartition("\n#### ")
    answer = tagged.partition("</answer>")[0] if tag else line.partition("\n")[0] if mark else ""
    if before:  # the last box counts; if its brace is never closed, there is no answer
        answer, depth = "", 1
        for brace in re.finditer(r"\\.|[{}]", boxed[: MAX_ANSWER + 1]):  # "\{" is no brace
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                answer = boxed[: brace.start()]
                break
    return answer.strip() if 0 < len(answer.strip()) <= MAX_ANSWER else None


# --- 2. Clean-up: one spelling for what means the same -------------------------------------------


_CHARACTERS = str.maketrans(
    {
        **{0xFEE0 + code: code for code in range(0x21, 0x7F)},  # fullwidth forms
        "−": "-",
        "–": "-",
        "×": "*",
        "·": "*",
        "÷": "/",
        "≤": "<=",
        "≥": ">=",
        "∈": "=",
        "²": "^2",
        "³": "^3",
        "。": ".",
        "π": r"\pi ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "±": r"\pm ",
        **dict.fromkeys("$＄£€¥￥~", " "),
    }
)
_MACROS = {
    " ": " ",
    **{
        name: new
        for new, names in {  # x \in S is read as x = S
            "": "left right displaystyle !",
            " ": "quad qquad text mathrm mathbf boldsymbol , ; :",
            "*": "times cdot",
            "\\frac": "dfrac tfrac cfrac",
            "/": "div",
            "=": "in",
            "<": "lt",
            ">": "gt",
            "<=": "le leq leqslant",
            ">=": "ge geq geqslant",
            "°": "circ degree",
            "%": "%",
        }.items()
        for name in names.split()
    },
}
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [  # in this order, most with an example
        (r"^\\[(\[](.*)\\[)\]]$", r"\1"),  # \(18\)
        # "~" is the border of a text: 5\text{m} has a unit, 5m a factor.
        (r"\\(?:text[a-z]*|mbox|math(?:rm|bf)|boldsymbol|operatorname) ?\{([^{}]*)\}", r"~\1~"),
        (r"\{,\}|,\\! ?", ","),  # 1{,}000
        (r"√ ?(\d+|\([^()]*\))", r"\\sqrt{\1}"),
        (r"\\([A-Za-z]+|.)", lambda match: _MACROS.get(match[1], match[0])),  # \dfrac
        (r"\^ ?(?:°|\{ ?° ?\})|°|[ ~]?\bdegrees?\b", "~"),  # 90^\circ
        (r"[ ~]{2,}", lambda match: "~" if "~" in match[0] else " "),
        (r"[ ~]?\b(?:percent|per cent|pct)\b", "%"),
        (r"(\\(?!pi|end)[a-z]{2,3}) ?[({](\\?[a-z]+|\d)[)}](?! ?[\w\\({])", r"\1 \2"),  # \cot(x)
        (r"_ ?\{[ ~]?(\w+)[ ~]?\}", r"_\1 "),  # x_{1}
        (r"(?:\\\\ ?)?\\(begin|end)\{(?:[pbB]?matrix|array)\}(?: ?\{[lcr| ]*\})?", r"\\\1 "),
        (r",?[ ~](?:and|or)[ ~]", ", "),  # 1 and 2
        (r"^[ ~]+|[ ~]*\.?[ ~\\]*$", ""),  # 18\$
        (
            r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d /])",
            lambda match: match[0].replace(" ", ""),
        ),  # 10 000
        (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),  # \frac12
        (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),  # \frac{1}2
        (r"(?<![\w.^}])(\d+)[ ~]?(\\frac\{\d+\}\{\d+\})", r"{\1+\2}"),  # 1\frac{1}{2}
        (r"(?<![\w.^}])(\d+)[ ~](\d+/\d+)(?![\d.])", r"{\1+\2}"),  # 1 1/2
    ]
]


def clean(text):
    r"""One spelling for what means the same; values stay. "" if there is no text or too much. str -> str.
    >>> clean(r"$\$1,234.50$."), clean(r"\dfrac12"), clean("１８ degrees"), clean(r"\left(1,2\right)")
    ('1234.50', '\\frac{1}{2}', '18', '(1,2)')
    """
    if not text or len(text) > MAX_ANSWER:
        return ""
    text = " ".join(text.translate(_CHARACTERS).split())
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # (1,000) may be a point
        text = re.sub(
            r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)",
            lambda match: match[0].replace(",", ""),
            text,
        )
    return text if len(text) <= MAX_LENGTH else ""


# Units: their short names, where they stand, and the words that are none, since they change the number in front.
_SHORT = dict(
    m="meter",
    cm="centimeter",
    mm="millimeter",
    km="kilometer",
    g="gram",
    mg="milligram",
    kg="kilogram",
    ml="milliliter",
    ft="foot",
    feet="foot",
    lb="pound",
    oz="ounce",
    s="second",
    min="minute",
    h="hour",
    hr="hour",
    mph="milehour",
    per="",
    square="2",
    sq="2",
    cubic="3",
) | {"in": "inch"}
_UNIT = re.compile(
    rf"""(?<=[\d}})\]%!i])                     # behind a number, a bracket or \pi
    (?: ~ (?: [A-Za-z][A-Za-z .,/~]+ | [mghsLNJWVKCF] )          # \text{{...}}
    | (?: [ ~/] [A-Za-z]{{3,}} | [ ~]? (?i: {"|".join(unit for unit in _SHORT if len(unit) > 1)} ) s? )
      (?: [ /][A-Za-z]+ )*                                        # 5 miles per hour, 5/day, 5km/h
    | [ ~]? [一-鿿]+ ) ~? (?: \^ \{{? [23] \}}? )? $""",
    re.X,
)  # Chinese characters; cm^2
_NO_UNIT = re.compile(
    r"\b(?:"
    + "|".join(
        r"""or and not? nor of but plus minus times over below negative never was
    half halves thirds? quarters? (?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths? tens dozens? hundreds?
    thousands? [a-z]+illions? squared cubed factorial choose root base mod sin cos tan log pi e i""".split()
    )
    + r")\b"
    "|[百万亿十半]|千(?![克米瓦])"
)


def _split_unit(text):
    """("18", "inch2") of "18 square inches" and "18 in^2";  ("18 x", "") of "18 x", for a letter is a factor."""
    match = _UNIT.search(text)
    if not match or _NO_UNIT.search(match[0].casefold()):
        return text, ""
    words = re.findall(
        "[a-z]+|[23]|[一-鿿]+", re.sub(r"(?<=ch)es\b|(?<=[a-z]{2})s\b", "", match[0].casefold())
    )
    words = sorted(
        (_SHORT.get(word, word) for word in words), key="23".__contains__
    )  # the order of others counts
    return text[: match.start()], "".join(words)


def _split_name(text):
    """("x", "5") of "x=5", ("x", "5,6") of "x=5, x=6"; ("", "2x = 5") of "2x = 5", which is an equation."""
    name = re.match(r"(\\?[A-Za-z]+(?:_\w+|\(\w\))?|\([a-z](?:, ?[a-z])+\))[ ~]*=", text)
    return (
        (name[1], re.sub(rf"(^|, ?){re.escape(name[1])}[ ~]*=", r"\1", text))
        if name
        else ("", text)
    )


# --- 3. The parser -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    r"""Several values. kind: brackets as written ("(]"), "," for a list or set, "\cup", "&" and "\\", "="."""

    kind: str
    items: tuple


def _items(value, kind):
    """The items of a group of this kind; any other value is its own only item."""
    return value.items if isinstance(value, Group) and value.kind == kind else (value,)


def _close(a, b):
    """Whether two values at one point of `parse` are the same: Fractions exactly, others to 1e-10 of their size."""
    # TRAP: as floats 9007199254740993 and ...2 are the same (test_numbers_are_exact).
    if Group in (type(a), type(b)) or type(a) is type(b) is Fraction:
        return a == b
    return cmath.isfinite(a) and cmath.isclose(a, b, rel_tol=1e-10)


def _power(base, exponent):
    """base ** exponent, exact where the exponent is whole; an odd root of a negative number is real."""
    top, degree = exponent.as_integer_ratio() if isinstance(exponent, Fraction) else (0, 1)
    if (
        isinstance(base, Fraction)
        and abs(top) * (base.numerator * base.denominator).bit_length() > MAX_BITS
    ):
        raise OverflowError("too large")
    if degree % 2 and degree > 1 and not isinstance(base, complex) and base < 0:
        return (-((-base) ** (1 / degree))) ** top
    return base**exponent


_BINDING = {"\\\\": 1, "&": 2, ",": 3, "=": 4, "\\cup": 5, "+": 6, "-": 6, "*": 7, "/": 7, "^": 8}
_ARITHMETIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": _power,
}
_KINDS = {
    "": "",
    "{}": "",
    "\\begin\\end": "",
    "\\{\\}": ",",  # of brackets; "": they only hold together
    **{kind: kind for kind in ("()", "[]", "[)", "(]", "\\langle\\rangle")},
}
_LETTER = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|Delta|epsilon|varepsilon|theta|lambda|mu|rho|sigma|tau|phi|omega"
    r"|ell|infty)(?![a-z]))"
)
_NAME = rf"{_LETTER}(?:_(?:\d+|[A-Za-z]+))?"  # x or x_1
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
_FACTOR = re.compile(
    r"[({]|\\frac|\\?sqrt|\\?pi|" + _NAME, re.A
)  # may follow another one without a sign
_TOKEN = re.compile(
    r"[ ~]*(\\?(?:pi|sqrt)(?![A-Za-z])|[A-Za-z]{4,}|[A-Z]{2,}"
    rf"|{_NAME}|{_NUMBER}|\\[A-Za-z]+|\\?.|$)",
    re.A | re.S,
)


def _expression(tokens, point, loosest, depth):
    """Takes an expression off the end of `tokens`, which stand from right to left, and returns its value.

    Recursive descent with precedence climbing: reads on as long as operators bind more tightly than `loosest`, and
    computes at once, with Fractions if possible; `point` (0, 1 or 2) says which numbers the letters stand for.
    """
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if tokens[-1] in ("+", "-"):
        sign = _ARITHMETIC[tokens.pop()]  # -x is 0 - x
        value = sign(
            Fraction(0), _expression(tokens, point, max(loosest, _BINDING["+"]), depth + 1)
        )
    else:
        value = _atom(tokens, point, depth + 1)
    while tokens[-1] in ("%", "!"):  # the range finds 0, 1, ..., 100, and raises at all else
        value = (
            value / 100
            if tokens.pop() == "%"
            else Fraction(math.factorial(range(101).index(value)))
        )
    while True:
        if (
            isinstance(value, Fraction)
            and (value.numerator * value.denominator).bit_length() > MAX_BITS
        ):
            raise OverflowError("too large")
        infix = "*" if _FACTOR.fullmatch(tokens[-1]) else tokens[-1]  # 2x is 2*x
        if _BINDING.get(infix, 0) <= loosest:
            return value
        if infix == tokens[-1]:
            tokens.pop()
        right = _expression(
            tokens, point, _BINDING[infix] - (infix == "^"), depth + 1
        )  # 2^3^2 is 2^(3^2)
        if infix in _ARITHMETIC:
            value = _ARITHMETIC[infix](value, right)
        elif infix != "=":
            value = Group(infix, (*_items(value, infix), right))
        elif not _close(value, right):  # of 9+9 = 18 one side is enough
            value = Group("=", (value - right,))


def _atom(tokens, point, depth):
    """Takes a number, a letter, a macro or a bracket off the end of `tokens`, and returns its value."""
    token = tokens.pop()
    if re.fullmatch(_NUMBER, token, re.A) and len(token) <= 100:
        return Fraction(token)
    if token in ("i", "pi", "\\pi"):
        return 1j if token == "i" else math.pi
    if token == "\\frac":
        return _atom(tokens, point, depth) / _atom(tokens, point, depth)
    if token in ("\\sqrt", "sqrt"):
        (degree,) = _atom(tokens, point, depth).items if tokens[-1] == "[" else (2,)
        return _power(_atom(tokens, point, depth), 1 / Fraction(degree))
    if re.fullmatch(
        _NAME, token, re.A
    ):  # each letter (\infty, too) is a fixed number, at the last point negative
        return (1, 1, -1)[point] * (0.5 + zlib.crc32(f"{token} {point}".encode()) / 2**32)
    inside = _expression(
        tokens, point, 0, depth
    )  # any other token has to open a bracket, or a KeyError follows
    kind, items = _KINDS[token + tokens.pop()], _items(inside, ",")
    if (
        not kind
        or (kind == "()" and len(items) == 1)
        or getattr(inside, "kind", "") in ("&", "\\\\")
    ):
        return inside
    return Group(kind, items)


@functools.lru_cache(maxsize=1000)  # the answers of a group are compared with one gold
def parse(text):
    r"""A list: the values of a cleaned text at three points (at each its letters stand for other numbers), or None.
    >>> parse(r"\frac{3}{4}")[0], parse("1/0"), parse("1 8"), parse("9^{9^{9^9}}")
    (Fraction(3, 4), None, None, None)
    """
    if re.search(
        r"\\pm|\\mp", text
    ):  # 1 \pm 2 is the list of 1 + 2 and 1 - 2; what both hold counts once
        plus, minus = (
            parse(text.replace("\\pm", a).replace("\\mp", b)) or [] for a, b in ("+-", "-+")
        )
        both = [(_items(p, ","), _items(m, ",")) for p, m in zip(plus, minus)]
        return [
            Group(",", (*p, *(b for b in m if not any(_close(a, b) for a in p)))) for p, m in both
        ] or None
    tokens = ["", *_TOKEN.findall(text)][
        ::-1
    ]  # the last token is "": a whole text is a bracket from "" to ""
    try:
        return [_atom(tokens.copy(), point, 0) for point in range(3)]
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None


# --- 4. Comparison -------------------------------------------------------------------------------


def _same(a, b):
    """Whether two values, each given at the three points of `parse`, agree at all of them."""
    kinds = {getattr(value, "kind", None) for value in (*a, *b)}
    if kinds == {None}:
        return all(map(_close, a, b))
    if len(kinds) > 1 or len(a[0].items) != len(b[0].items) or len(a[0].items) > MAX_ITEMS:
        return False
    a, b = (
        [*zip(*(group.items for group in values))] for values in (a, b)
    )  # items, each at all points
    if kinds == {"="}:  # left - right, the same up to a factor
        factors = [x / y if y else 0 for x, y in zip(a[0], b[0])]
        return all(factor and _close(factor, factors[0]) for factor in factors)
    if not kinds <= {",", "\\cup"}:
        return all(map(_same, a, b))
    for item in a:
        match = next((other for other in b if _same(item, other)), None)
        if match is None:
            return False
        b.remove(match)
    return True


@functools.lru_cache(maxsize=10_000)
def is_equivalent(answer, gold):
    r"""Whether two answers mean the same. str, str -> bool.
    >>> is_equivalent(r"1\frac12", "1.5"), is_equivalent(r"\sqrt 8", r"2\sqrt{2}"), is_equivalent("2x=4y", "x-2y=0")
    (True, True, True)
    >>> is_equivalent("18", "18.0000001"), is_equivalent("0.333", "1/3"), is_equivalent("(1,2]", "[1,2]")
    (False, False, False)
    """
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold:
        return False
    words = [re.sub(r"^\(([A-Za-z])\)$|[ ~]", r"\1", text).casefold() for text in (answer, gold)]
    if words[0] == words[1] and words[0].isalpha():
        return True
    (answer, unit), (gold, gold_unit) = _split_unit(answer), _split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    (name, value), (gold_name, gold_value) = _split_name(answer), _split_name(gold)
    # With the same name only what follows it counts, exactly; else y = 2x may be an equation, or the y be left out.
    pairs = [(answer, gold)] if name != gold_name else []
    if name == gold_name or not name or not gold_name:
        pairs.append((value, gold_value))
        if "%" not in gold:  # read as a unit
            pairs.append((re.sub(r"^(-?[^-+*/,%]*)%$", r"\1", value), gold_value))
    return any(
        _TOKEN.findall(a) == _TOKEN.findall(b)
        or parse(a)
        and parse(b)
        and _same(parse(a), parse(b))
        for a, b in pairs
    )  # the same text, but for spaces, or the same value


# --- 5. Rewards ----------------------------------------------------------------------------------


def accuracy_reward(completion, gold):
    r"""1.0 if the marked answer of `completion` is equivalent to `gold`, else (and if either is missing) 0.0.
    >>> accuracy_reward(r"so it is \boxed{18}", "18"), accuracy_reward("18", "18"), accuracy_reward(None, "18")
    (1.0, 0.0, 0.0)
    """
    try:
        return float(is_equivalent(extract_answer(completion), gold))
    except Exception:  # whatever a completion provokes, it earns nothing
        return 0.0


def final_answer(solution):
    """What stands behind the last "#### " of a solution, as in GSM8K, or all of it; "" if there is none."""
    return "" if solution is None else str(solution).rpartition("#### ")[2].strip()


def accuracy_rewards(prompts, completions, answer, **kwargs):
    r"""`accuracy_reward` of N completions, with the signature that TRL's GRPOTrainer calls. -> N floats.

    completions: N texts, or N lists of chat messages, of which the last counts; answer: N golds or solutions.
    >>> accuracy_rewards(["1+1?"], [[{"role": "assistant", "content": r"\boxed{2}"}]], ["1+1=2\n#### 2"])
    [1.0]
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return [
        accuracy_reward(text, final_answer(gold)) for text, gold in zip(texts, answer, strict=True)
    ]


def load_reward(name):
    """Load the function FILE.py:FUNCTION, or accuracy_rewards for "". Raises InputError."""
    if not name:
        return accuracy_rewards
    path, _, function = name.rpartition(":")
    try:
        return runpy.run_path(path)[function]
    except Exception as error:  # a user's file may fail in any way
        message = f"--reward {name}: {error!r}; want FILE.py:FUNCTION, see accuracy_rewards"
        raise InputError(message) from error


def ask_reward(reward, prompts, completions, answer):
    """Call any reward with N texts of each kind, and check its answer: N finite floats.

    It gets copies of the lists, which it may change. Raises InputError if it fails.
    """
    copies = {"prompts": [*prompts], "completions": [*completions], "answer": [*answer]}
    try:
        rewards = [float(number) for number in reward(**copies)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a user's function may fail in any way
        raise InputError(f"--reward failed: {error!r}") from error
    if len(rewards) != len(completions) or not all(map(math.isfinite, rewards)):
        raise InputError(f"--reward: want {len(completions)} finite numbers, not {rewards}"[:300])
    return rewards


def step_rewards(completion):
    r"""1.0 or 0.0 for each step of a solution that can be checked: a list of (end, reward), end in characters.

    A step is a line or a sentence in which a calculation has a result. It earns 1.0 if all of its equations
    hold, up to rounding to the decimals shown. In an experiment such a rule saw a slip in 4.6% of wrong solutions
    of GSM8K, with 94% precision. A bonus per right step, as process supervision pays it, can be farmed with 1+1=2.
    >>> step_rewards("First 3 * 4 = 12. Then 10/3 = 3.33!\n12 + 5 = 18\nso 18")
    [(17, 1.0), (35, 1.0), (47, 0.0)]
    """
    rewards = []
    for step in re.finditer(r"(?:[^\n.;!?。]|[.;!?](?!\s))+[.;!?。]?", completion[:10_000]):
        text = clean(re.sub(r"<<[^<>]*>>", "", step[0])).replace("~", " ")
        text = re.sub(r"(?<![A-Za-z]) ?x ?(?=[\d(.])", "*", text)  # 3 x 4
        text = re.sub(
            r"(?<=\d) ([a-z]{3,})(?= ?[-+*=])(?=.*\b\1\b)", "", text
        )  # 3 cups + 2 cups = 5 cups
        # Not checked: 25% of 80, 4 remainder 3, 3:30, 1,2, \frac{1}{2} (4 + 6). They become %, a cut below.
        text = re.sub(r"% of | [Rr](?:emainder)?\b|(?<=\d)[:,](?=\d)|(?<=\}) (?=\()", "%", text)
        checks = []
        for chain in re.split(
            r"[^ :]*[A-Za-z\\^_%{}][^ :]*|[^-+*/=().\d ]", text
        ):  # cut at words and odd signs
            sides = [
                side.strip() for side in chain.split("=")
            ]  # 3*4 = 12 = 24/2; +5 = 9 is half of a chain
            if re.match(r"-?[\d.(].*[-+*/]", sides[0]) and all(map(parse, sides)):
                checks += map(_holds, sides, sides[1:])
        if checks:
            rewards.append((step.end(), float(all(checks))))
    return rewards


def _holds(left, right):
    """Whether left = right; where left has * or /, up to rounding to the decimals that right shows: 10/3 = 3.33."""
    error = parse(left)[0] - parse(right)[0]
    number = re.fullmatch(r"-?\d*(?:\.(\d*))?", right)
    half = Fraction(1, 2 * 10 ** len(number[1] or "")) if number and re.search("[*/]", left) else 0
    return error == 0 or -half <= error < half


# --- 6. The learned reward model of Algorithm 1 --------------------------------------------------


class LearnedReward(torch.nn.Module):
    """Reward completions by a network that learns to imitate the rule: Algorithm 1, line 12.

    It is the policy's architecture with a scalar head in place of the vocabulary's, and is called
    as any other reward is. It keeps the texts that it is asked about; `renew` fits it to them,
    labelled by the rule above.

    PAPER: theirs starts from the base model and learns from data labelled beforehand. This one
    starts from the policy and learns from the rule.
    """

    def __init__(self, policy, tokenizer, lr, size, steps=False):
        """lr: of the fits; size: how many new texts a fit takes; steps: judge steps, too."""
        super().__init__()
        self.tokenizer = tokenizer
        self.lr = lr
        self.size = size
        self.steps = steps
        self.fresh = []  # (prompt, completion, answer), not fitted to yet
        self.replay = []  # those of earlier fits
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
        """Return the probability of "right" at each end, in characters, of each completion."""
        rows = list(zip(prompts, completions, ends, strict=True))
        chunks = [self.logits(rows[i : i + size]) for i in range(0, len(rows), size)]
        right = torch.cat(chunks).sigmoid().split([len(places) for places in ends])
        return [part.tolist() for part in right]

    def logits(self, rows):
        """Run the network on (prompt, completion, ends): the logits at all ends, in a row."""
        prompts = [self.frame(prompt) for prompt, _, _ in rows]
        texts = [prompt + row[1] for prompt, row in zip(prompts, rows, strict=True)]
        # Padding stands on the right, where causal attention never looks.
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right")
        ids = torch.tensor(batch.input_ids, device=self.head.weight.device)  # (n, S)
        states = self.body(input_ids=ids, use_cache=False).last_hidden_state  # (n, S, D)
        at_ends = []
        for row, (_, _, ends) in enumerate(rows):
            tokens = [batch.char_to_token(row, len(prompts[row]) + end - 1) for end in ends]
            at_ends.append(states[row, tokens])  # (ends, D)
        return self.head(torch.cat(at_ends)).squeeze(1)

    def frame(self, prompt):
        """Write a question as the policy sees it, without the request that follows it."""
        if not self.tokenizer.chat_template:
            return prompt + "\n"
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def renew(self):
        """Fit to the fresh texts and, in ten, one old text: the paper's replay of 10%."""
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
            rows, labels = [], []
            for prompt, completion, answer in order[i : i + size]:
                steps = step_rewards(completion) if self.steps else []
                rows.append((prompt, completion, [end for end, _ in steps] + [len(completion)]))
                labels += [right for _, right in steps]
                labels += accuracy_rewards([prompt], [completion], [answer])
            logits = self.logits(rows)
            labels = torch.tensor(labels, device=logits.device)
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = self.lr * (1 - i / len(order))  # falls to 0
            optimizer.step()
            optimizer.zero_grad()

    def get_extra_state(self):
        """Let state_dict, and so a checkpoint, hold the texts as well."""
        return {"fresh": self.fresh, "replay": self.replay}

    def set_extra_state(self, state):
        self.fresh = state["fresh"]
        self.replay = state["replay"]
