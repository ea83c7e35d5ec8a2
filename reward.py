r"""Rewards for math: a rule, text in and 1.0 or 0.0 out (1 to 5), and a model that learns it (6).

GRPO learns whatever the reward pays for, so a rule that can be fooled will be fooled. Hence the
answer must be marked, the whole marked text is the answer, and what is not understood must be the
same text as the gold answer. An answer is cleaned, parsed and compared. No text of a model is ever
run as code, and the size of every text and number is bounded.

Conventions, each a choice (change one, and the tests tell you what moved):

A box counts before a tag, a tag before ####; of several, the last one counts.
>>> extract_answer(r"\boxed{1} \boxed{2} <answer>3</answer>")
'2'

A number without a mark earns nothing, and neither does a hedge.
>>> accuracy_reward("The answer is 18.", "18"), is_equivalent("18 or 20", "18")
(0.0, False)

A percent sign is optional, unless the gold answer has one.
>>> [is_equivalent("50%", gold) for gold in ("1/2", "0.5", "50")], is_equivalent("50", "50%")
([True, True, True], False)

A product or sum equals its value.
>>> is_equivalent(r"2 \cdot 3^2", "18"), is_equivalent("9+9", "18")
(True, True)

Order is free in lists only.
>>> is_equivalent("2, 1", r"\{1, 2\}"), is_equivalent("(2, 1)", "(1, 2)")
(True, False)

A name in front may be left out.
>>> is_equivalent("2x+3", "y = 2x+3"), is_equivalent("x=5", "y=5")
(True, False)

A unit may be left out, too; the base of a number may not.
>>> is_equivalent("18", "18 cm"), is_equivalent("18 cents", "18 dollars")
(True, False)
>>> is_equivalent("5", "101_2")
False
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
MAX_ANSWER = 400  # characters of a marked text
MAX_LENGTH = 300  # characters of an answer after the clean-up
MAX_DEPTH = 40  # expressions within expressions
MAX_ITEMS = 50  # items of a list
MAX_BITS = 1000  # bits of numerator and denominator together


class InputError(Exception):
    """Tell the user what to mend, and how. The command line prints the text as one line."""


# --- 1. Extraction -------------------------------------------------------------------------------


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
        _, mark, line = f"\n{completion}".rpartition("\n#### ")
        answer = line.partition("\n")[0] if mark else ""
    return answer.strip() if 0 < len(answer.strip()) <= MAX_ANSWER else None


def _up_to_closing_brace(text):
    """Return the text in front of the brace that closes a box, or "" if it is never closed."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text):  # "\{" is no brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""


# --- 2. Clean-up: one spelling for what means the same -------------------------------------------


_CHARACTERS = {
    **{0xFEE0 + code: code for code in range(0x21, 0x7F)},  # fullwidth forms
    **str.maketrans("−–×·÷∈。", "--**/=."),
    **str.maketrans({"≤": "<=", "≥": ">=", "²": "^2", "³": "^3"}),
    **str.maketrans({"π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "±": r"\pm "}),
    **dict.fromkeys(map(ord, "$＄£€¥￥~"), " "),
}
_MACROS = {" ": " "}
for _new, _names in {
    "": "left right displaystyle !",
    " ": "quad qquad text mathrm mathbf boldsymbol , ; :",
    "*": "times cdot",
    "\\frac": "dfrac tfrac cfrac",
    "/": "div",
    "=": "in",  # x \in S is read as x = S
    "<": "lt",
    ">": "gt",
    "<=": "le leq leqslant",
    ">=": "ge geq geqslant",
    "°": "circ degree",
    "%": "%",
}.items():
    _MACROS |= dict.fromkeys(_names.split(), _new)
_REWRITES = [  # in this order; most with an example
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
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d /])", lambda match: match[0].replace(" ", "")),  # 10 000
    (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),  # \frac12
    (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),  # \frac{1}2
    (r"(?<![\w.^}])(\d+)[ ~]?(\\frac\{\d+\}\{\d+\})", r"{\1+\2}"),  # 1\frac{1}{2}
    (r"(?<![\w.^}])(\d+)[ ~](\d+/\d+)(?![\d.])", r"{\1+\2}"),  # 1 1/2
]


def clean(text):
    r"""Return one spelling for all texts that mean the same, or "" if there is no text or too much.

    >>> clean(r"$\$1,234.50$."), clean(r"\dfrac12"), clean("１８ degrees"), clean(r"\left(1\right)")
    ('1234.50', '\\frac{1}{2}', '18', '(1)')
    """
    if not text or len(text) > MAX_ANSWER:
        return ""
    text = " ".join(text.translate(_CHARACTERS).split())
    for pattern, new in _REWRITES:
        text = re.sub(pattern, new, text)
    if not re.search(r"[(\[]|\\\{", text):  # (1,000) may be a point
        thousands = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)"
        text = re.sub(thousands, lambda match: match[0].replace(",", ""), text)
    return text if len(text) <= MAX_LENGTH else ""


# Units: their short names, where they stand, and the words that are none, since they change the
# number in front.
_SHORT = dict(
    re.findall(
        r"(\w+)=(\w*)",
        """m=meter cm=centimeter mm=millimeter km=kilometer g=gram mg=milligram kg=kilogram
        ml=milliliter ft=foot feet=foot lb=pound oz=ounce s=second min=minute h=hour hr=hour
        mph=milehour per= square=2 sq=2 cubic=3 in=inch""",
    )
)
_SHORT_NAMES = "|".join(name for name in _SHORT if len(name) > 1)
_UNIT = re.compile(
    rf"""(?<=[\d}})\]%!i])                                  # behind a number, a bracket or \pi
    (?: ~ (?: [A-Za-z][A-Za-z .,/~]+ | [mghsLNJWVKCF] )   # \text{{...}}
    | (?: [ ~/] [A-Za-z]{{3,}} | [ ~]? (?i: {_SHORT_NAMES} ) s? )
      (?: [ /][A-Za-z]+ )*                                # 5 miles per hour, 5/day, 5km/h
    | [ ~]? [一-鿿]+                                      # Chinese characters
    ) ~? (?: \^ \{{? [23] \}}? )? $                       # cm^2""",
    re.X,
)
_NO_UNIT = re.compile(
    r"""\b (?: or|and|not?|nor|of|but|plus|minus|times|over|below|negative|never|was|half|halves
    | thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|tens|dozens?
    | hundreds?|thousands?|[a-z]+illions?|squared|cubed|factorial|choose|root|base|mod
    | sin|cos|tan|log|pi|e|i ) \b | [百万亿十半] | 千(?![克米瓦])""",
    re.X,
)


def _split_unit(text):
    """Split "18 square inches", or "18 in^2", into ("18", "inch2").

    "18 x" has no unit and gives ("18 x", ""), for a letter is a factor.
    """
    match = _UNIT.search(text)
    if not match or _NO_UNIT.search(match[0].casefold()):
        return text, ""
    singular = re.sub(r"(?<=ch)es\b|(?<=[a-z]{2})s\b", "", match[0].casefold())
    words = [_SHORT.get(word, word) for word in re.findall("[a-z]+|[23]|[一-鿿]+", singular)]
    words.sort(key="23".__contains__)  # square meters are meter2; the order of other words counts
    return text[: match.start()], "".join(words)


def _split_name(text):
    """Split "x=5" into ("x", "5"), and "x=5, x=6" into ("x", "5,6").

    "2x = 5" is an equation and gives ("", "2x = 5").
    """
    name = re.match(r"(\\?[A-Za-z]+(?:_\w+|\(\w\))?|\([a-z](?:, ?[a-z])+\))[ ~]*=", text)
    if not name:
        return "", text
    return name[1], re.sub(rf"(^|, ?){re.escape(name[1])}[ ~]*=", r"\1", text)


# --- 3. The parser -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    r"""Hold several values of one kind.

    kind: brackets as written ("(]"), "," for a list or set, "\cup", "&" and "\\", or "=".
    """

    kind: str
    items: tuple


def _items(value, kind):
    """Return the items of a group of this kind; any other value is its own only item."""
    return value.items if isinstance(value, Group) and value.kind == kind else (value,)


def _close(a, b):
    """Compare two values at one point of `parse`: Fractions exactly, others to 1e-10."""
    # TRAP: as floats 9007199254740993 and ...2 are the same (test_numbers_are_exact).
    if Group in (type(a), type(b)) or type(a) is type(b) is Fraction:
        return a == b
    return cmath.isfinite(a) and cmath.isclose(a, b, rel_tol=1e-10)


def _bits(value):
    """Return the size of a Fraction in bits; 0 for floats, whose size is fixed, and for groups."""
    return (value.numerator * value.denominator).bit_length() if isinstance(value, Fraction) else 0


def _power(base, exponent):
    """Raise to a power, exactly if the exponent is whole; odd roots of negatives are real."""
    top, degree = exponent.as_integer_ratio() if isinstance(exponent, Fraction) else (0, 1)
    if abs(top) * _bits(base) > MAX_BITS:
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
# The kind of a group in these brackets. "": they only hold together.
_KINDS = {"": "", "{}": "", "\\begin\\end": "", "\\{\\}": ","}
_KINDS |= {kind: kind for kind in ("()", "[]", "[)", "(]", "\\langle\\rangle")}
_LETTER = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|Delta|epsilon|varepsilon|theta|lambda|mu|rho|sigma"
    r"|tau|phi|omega|ell|infty)(?![a-z]))"
)
_NAME = rf"{_LETTER}(?:_(?:\d+|[A-Za-z]+))?"  # x or x_1
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
# What may follow another factor without a sign:
_FACTOR = re.compile(rf"[({{]|\\frac|\\?sqrt|\\?pi|{_NAME}", re.A)
_TOKEN = re.compile(
    r"[ ~]*(\\?(?:pi|sqrt)(?![A-Za-z])|[A-Za-z]{4,}|[A-Z]{2,}"
    rf"|{_NAME}|{_NUMBER}|\\[A-Za-z]+|\\?.|$)",
    re.A | re.S,
)


def _expression(tokens, point, loosest, depth):
    """Pop one expression; `tokens` is stored reversed. Returns its value.

    Recursive descent with precedence climbing: it reads on as long as operators bind more tightly
    than `loosest`, and computes at once, with Fractions if possible. `point` (0, 1 or 2) says which
    numbers the letters stand for.
    """
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if tokens[-1] in ("+", "-"):  # -x is 0 - x
        sign = _ARITHMETIC[tokens.pop()]
        operand = _expression(tokens, point, max(loosest, _BINDING["+"]), depth + 1)
        value = sign(Fraction(0), operand)
    else:
        value = _atom(tokens, point, depth + 1)
    while tokens[-1] in ("%", "!"):
        if tokens.pop() == "%":
            value = value / 100
        else:  # the range finds 0, 1, ..., 100, and raises for anything else
            value = Fraction(math.factorial(range(101).index(value)))
    while True:
        if _bits(value) > MAX_BITS:
            raise OverflowError("too large")
        infix = "*" if _FACTOR.fullmatch(tokens[-1]) else tokens[-1]  # 2x is 2*x
        if _BINDING.get(infix, 0) <= loosest:
            return value
        if infix == tokens[-1]:
            tokens.pop()
        tightness = _BINDING[infix] - (infix == "^")  # 2^3^2 is 2^(3^2)
        right = _expression(tokens, point, tightness, depth + 1)
        if infix in _ARITHMETIC:
            value = _ARITHMETIC[infix](value, right)
        elif infix != "=":
            value = Group(infix, (*_items(value, infix), right))
        elif not _close(value, right):  # of 9+9 = 18 one side is enough
            value = Group("=", (value - right,))


def _atom(tokens, point, depth):
    """Pop a number, a letter, a macro or a bracket; `tokens` is stored reversed."""
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
    if re.fullmatch(_NAME, token, re.A):
        # A letter, \infty too, is a fixed number: 0.5 to 1.5, negative at the last point.
        value = 0.5 + zlib.crc32(f"{token} {point}".encode()) / 2**32
        return -value if point == 2 else value
    # Any other token has to open a bracket; _KINDS raises KeyError otherwise.
    inside = _expression(tokens, point, 0, depth)
    kind = _KINDS[token + tokens.pop()]
    items = _items(inside, ",")
    if not kind or kind == "()" and len(items) == 1 or getattr(inside, "kind", "") in ("&", "\\\\"):
        return inside
    return Group(kind, items)


@functools.lru_cache(maxsize=1000)  # the answers of a group are compared with one gold
def parse(text):
    r"""Return a list, the values of a cleaned text at three points, or None if it has no value.

    The letters stand for other numbers at each point.

    >>> parse(r"\frac{3}{4}")[0], parse("1/0"), parse("1 8"), parse("9^{9^{9^9}}")
    (Fraction(3, 4), None, None, None)
    """
    if re.search(r"\\pm|\\mp", text):
        return _parse_plus_minus(text)
    # The last token is "": a whole text is a bracket from "" to "".
    tokens = ["", *_TOKEN.findall(text)][::-1]
    try:
        return [_atom(tokens.copy(), point, 0) for point in range(3)]
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None


def _parse_plus_minus(text):
    r"""Parse 1 \pm 2 as the list of 1 + 2 and 1 - 2; what both hold counts once."""
    plus = parse(text.replace("\\pm", "+").replace("\\mp", "-")) or []
    minus = parse(text.replace("\\pm", "-").replace("\\mp", "+")) or []
    values = []
    for upper, lower in zip(plus, minus, strict=False):  # at each point
        first = _items(upper, ",")
        items = list(first)
        for value in _items(lower, ","):
            if not any(_close(other, value) for other in first):
                items.append(value)
        values.append(Group(",", tuple(items)))
    return values or None


# --- 4. Comparison -------------------------------------------------------------------------------


def _same(a, b):
    """Tell whether two values, each given at the three points of `parse`, agree at all of them."""
    kinds = {getattr(value, "kind", None) for value in (*a, *b)}
    if kinds == {None}:
        return all(map(_close, a, b))
    if len(kinds) > 1 or len(a[0].items) != len(b[0].items) or len(a[0].items) > MAX_ITEMS:
        return False
    a = list(zip(*(group.items for group in a), strict=False))  # items, each at all points
    b = list(zip(*(group.items for group in b), strict=False))
    if kinds == {"="}:  # left - right, the same up to a factor
        factors = [x / y if y else 0 for x, y in zip(a[0], b[0], strict=True)]
        return all(factor and _close(factor, factors[0]) for factor in factors)
    if not kinds <= {",", "\\cup"}:
        return all(map(_same, a, b))
    for item in a:  # in any order
        match = next((other for other in b if _same(item, other)), None)
        if match is None:
            return False
        b.remove(match)
    return True


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
    words = [re.sub(r"^\(([A-Za-z])\)$|[ ~]", r"\1", text).casefold() for text in (answer, gold)]
    if words[0] == words[1] and words[0].isalpha():
        return True
    answer, unit = _split_unit(answer)
    gold, gold_unit = _split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    name, value = _split_name(answer)
    gold_name, gold_value = _split_name(gold)
    # With the same name only what follows it counts, exactly. Otherwise y = 2x may be an equation,
    # or the y may be left out.
    pairs = [(answer, gold)] if name != gold_name else []
    if name == gold_name or not name or not gold_name:
        pairs.append((value, gold_value))
        if "%" not in gold:  # read as a unit
            pairs.append((re.sub(r"^(-?[^-+*/,%]*)%$", r"\1", value), gold_value))
    return any(_same_text_or_value(a, b) for a, b in pairs)


def _same_text_or_value(a, b):
    """Tell whether two cleaned texts are the same, but for spaces, or have the same value."""
    same_text = _TOKEN.findall(a) == _TOKEN.findall(b)
    return same_text or bool(parse(a) and parse(b)) and _same(parse(a), parse(b))


# --- 5. Rewards ----------------------------------------------------------------------------------


def accuracy_reward(completion, gold):
    r"""Return 1.0 if the marked answer of a completion is equivalent to `gold`, else 0.0.

    A completion or gold answer that is missing earns 0.0, too.

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
    """Return what follows the last "#### " of a solution, as in GSM8K, or all of it without one.

    >>> final_answer("48 / 2 = 24\\n#### 24"), final_answer(24), final_answer(None)
    ('24', '24', '')
    """
    return "" if solution is None else str(solution).rpartition("#### ")[2].strip()


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


def step_rewards(completion):
    r"""Return 1.0 or 0.0 for each step that can be checked: a list of (end, reward).

    A step is a line or a sentence in which a calculation has a result; its end is in characters. It
    earns 1.0 if all of its equations hold, up to rounding to the decimals shown. In an experiment
    such a rule found a slip in 4.6% of the wrong solutions of GSM8K, with 94% precision. Process
    supervision pays per right step, and a policy can farm that with 1+1=2.

    >>> step_rewards("First 3 * 4 = 12. Then 10/3 = 3.33!\n12 + 5 = 18\nso 18")
    [(17, 1.0), (35, 1.0), (47, 0.0)]
    """
    rewards = []
    for step in re.finditer(r"(?:[^\n.;!?。]|[.;!?](?!\s))+[.;!?。]?", completion[:10_000]):
        text = clean(re.sub(r"<<[^<>]*>>", "", step[0])).replace("~", " ")
        text = re.sub(r"(?<![A-Za-z]) ?x ?(?=[\d(.])", "*", text)  # 3 x 4
        # 3 cups + 2 cups = 5 cups
        text = re.sub(r"(?<=\d) ([a-z]{3,})(?= ?[-+*=])(?=.*\b\1\b)", "", text)
        # Not checked: 25% of 80, 4 remainder 3, 3:30, 1,2, \frac{1}{2} (4 + 6). They become %,
        # where the text is cut.
        text = re.sub(r"% of | [Rr](?:emainder)?\b|(?<=\d)[:,](?=\d)|(?<=\}) (?=\()", "%", text)
        checks = []
        # Cut at words and odd signs.
        for chain in re.split(r"[^ :]*[A-Za-z\\^_%{}][^ :]*|[^-+*/=().\d ]", text):
            sides = [side.strip() for side in chain.split("=")]  # 3*4 = 12 = 24/2
            # A chain without a calculation on its left, such as +5 = 9, is half of one.
            if re.match(r"-?[\d.(].*[-+*/]", sides[0]) and all(map(parse, sides)):
                checks += map(_holds, sides, sides[1:])
        if checks:
            rewards.append((step.end(), float(all(checks))))
    return rewards


def _holds(left, right):
    """Tell whether left = right; * and / may be rounded to the decimals of right: 10/3 = 3.33."""
    error = parse(left)[0] - parse(right)[0]
    number = re.fullmatch(r"-?\d*(?:\.(\d*))?", right)
    half = Fraction(1, 2 * 10 ** len(number[1] or "")) if number and re.search("[*/]", left) else 0
    return error == 0 or -half <= error < half


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
    """Call any reward with three lists of N texts, and return its N numbers as floats.

    The reward gets copies of the lists, so it may change them. Raises InputError if it fails, or
    does not return N numbers that are finite, in float32 too.
    """
    try:
        numbers = reward(prompts=[*prompts], completions=[*completions], answer=[*answer])
        rewards = [float(number) for number in numbers]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a user's function may fail in any way
        raise InputError(f"--reward failed: {error!r}") from error
    if len(rewards) != len(completions) or not all(abs(number) < 1e30 for number in rewards):
        raise InputError(f"--reward: want {len(completions)} finite numbers, not {rewards}"[:300])
    return rewards


# --- 6. The learned reward model of Algorithm 1 --------------------------------------------------


class LearnedReward(torch.nn.Module):
    """Reward completions by a network that learns to imitate the rule: Algorithm 1, line 12.

    It has the policy's architecture, with a scalar head in place of the vocabulary's, and is called
    like any other reward. It keeps the texts that it is asked about; the rule above labels them,
    and `renew` fits the network to the labels.

    PAPER: theirs starts from the base model and learns from data labelled beforehand. This one
    starts from the policy and learns from the rule.
    """

    def __init__(self, policy, tokenizer, lr, size, steps=False):
        """Copy the policy's body. lr: learning rate of a fit. size: new texts that a fit takes.

        steps: whether it learns to judge steps, too.
        """
        super().__init__()
        self.tokenizer = tokenizer
        self.lr = lr
        self.size = size
        self.steps = steps
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
        """Return the probability of "right" at each end, in characters, of each completion."""
        rows = list(zip(prompts, completions, ends, strict=True))
        chunks = [self.logits(rows[i : i + size]) for i in range(0, len(rows), size)]
        right = torch.cat(chunks).sigmoid().split([len(places) for places in ends])
        return [part.tolist() for part in right]

    def logits(self, rows):
        """Run the network on n rows (prompt, completion, ends): the logits of all ends, flat."""
        prompts = [self.frame(prompt) for prompt, _, _ in rows]
        texts = [prompt + row[1] for prompt, row in zip(prompts, rows, strict=True)]
        # Padding stands on the right, where causal attention never looks.
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
        )
        ids = torch.tensor(batch.input_ids, device=self.body.device)  # (n, S)
        states = self.body(input_ids=ids, use_cache=False).last_hidden_state  # (n, S, D)
        at_ends = []
        for row, (_, _, ends) in enumerate(rows):
            spans = batch.offset_mapping[row]
            tokens = [_last_token(spans, len(prompts[row]) + end) for end in ends]
            at_ends.append(states[row, tokens])  # (ends, D)
        return self.head(torch.cat(at_ends)).squeeze(1)

    def frame(self, prompt):
        """Write a question as the policy sees it, without the request that follows it."""
        if not self.tokenizer.chat_template:
            return prompt + "\n"
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def renew(self):
        """Fit to the fresh texts, and to one old text per nine of them: the paper's 10% replay."""
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
        """Take the texts back."""
        self.fresh = state["fresh"]
        self.replay = state["replay"]


def _last_token(spans, end):
    """Return the last token that begins before character `end`; spans: where each token stands."""
    return max(i for i, (start, stop) in enumerate(spans) if start < min(stop, end))
