r"""Rule-based math rewards: the text of a completion in, 1.0 or 0.0 out.

GRPO learns whatever the reward pays for, so a rule that can be fooled will be. Hence the answer must be
marked, the whole marked text is the answer, and what is not understood is wrong. An answer is cleaned,
parsed and compared; text of a model is never run as code, every scan is linear and every number bounded.

Conventions, each a choice (change one, and the tests will tell you what moved):
>>> extract_answer(r"\boxed{1} \boxed{2} <answer>3</answer>")   # the kind of marker decides, then the last
'2'
>>> accuracy_reward("The answer is 18.", "18")                  # a bare number earns nothing
0.0
>>> [is_equivalent(hedge, "18") for hedge in ("18 or 20", "17, 18", r"18 \pm 1", "[10, 20]")]
[False, False, False, False]
>>> [is_equivalent("50%", gold) for gold in ("1/2", "0.5", "50")], is_equivalent("50", "50%")   # % as a unit
([True, True, True], False)
>>> is_equivalent(r"2 \cdot 3^2", "18"), is_equivalent("9+9", "18")   # a product or sum equals its value
(True, True)
>>> is_equivalent("2, 1", r"\{1, 2\}"), is_equivalent("(2, 1)", "(1, 2)")   # the order is free in lists only
(True, False)
>>> is_equivalent("2x+3", "y = 2x+3"), is_equivalent("x=5", "y=5")   # a name in front may be left out
(True, False)
>>> is_equivalent("18", "18 cm"), is_equivalent("18 cents", "18 dollars")   # a unit, too
(True, False)
>>> is_equivalent("101_{2}", "101_2"), is_equivalent("5", "101_2")   # another base is not converted
(True, False)
"""

import cmath
import functools
import math
import operator
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction

# What a question is followed by, as in the prompts of the released DeepSeekMath models.
MATH_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."

MAX_ANSWER = 400   # characters; a marked text longer than this is no answer
MAX_LENGTH = 300   # characters of an answer after the clean-up
MAX_DEPTH = 40     # expressions within expressions
MAX_ITEMS = 50     # of a list
MAX_BITS = 1000    # of numerator and denominator together


# --- 1. Extraction ------------------------------------------------------------------------------------

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
    box = max((box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", completion)), default=None)
    _, tag, tagged = completion.rpartition("</answer>")[0].rpartition("<answer>")
    _, mark, line = f"\n{completion}".rpartition("\n#### ")
    answer = tagged if tag else line.split("\n", 1)[0] if mark else ""
    if box:
        answer, depth = "", 1
        for brace in re.finditer(r"\\.|[{}]", completion[box:box + MAX_ANSWER + 1]):   # "\{" is no brace
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                answer = completion[box:box + brace.start()]
                break
    return answer.strip() if 0 < len(answer.strip()) <= MAX_ANSWER else None


# --- 2. Clean-up: one spelling for what means the same ------------------------------------------------

_CHARACTERS = str.maketrans({
    **{0xFEE0 + code: code for code in range(0x21, 0x7F)},   # fullwidth forms
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": "<=",
    "≥": ">=", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "²": "^2", "³": "^3", "$": "~", "£": "~", "€": "~"})
# "~" is where a text or a currency sign was: 5\text{m} has a unit, 5m a factor.
_MACROS = {
    **dict.fromkeys("left right big Big bigg Bigg displaystyle !".split(), ""), "circ": "°", "degree": "°",
    **dict.fromkeys("quad qquad text mathrm mathbf , ; :".split() + [" "], " "), "dfrac": "\\frac",
    "tfrac": "\\frac", "cfrac": "\\frac", "times": "*", "cdot": "*", "div": "/", "%": "%", "~": "~",
    "lt": "<", "gt": ">", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">="}
_REWRITES = [(re.compile(pattern), new) for pattern, new in [   # in this order
    (r"^\\[(\[](.*)\\[)\]]$", r"\1"),   # \( ... \)
    (r"\\(?:text[a-z]*|mbox|math(?:rm|bf)|boldsymbol|operatorname) ?\{([^{}]*)\}", r"~\1~"),
    (r"\{,\}|,\\! ?", ","),
    (r"\\\\|\\([A-Za-z]+|[^A-Za-z])", lambda match: _MACROS.get(match[1], match[0])),
    (r"[ ~]{2,}", lambda match: "~" if "~" in match[0] else " "),
    (r"\^ ?(?:°|\{ ?° ?\})|°|[ ~]?\bdegrees?\b", ""),
    (r"[ ~]?\b(?:percent|per cent|pct)\b", "%"),
    (r"(\\[a-z]{2,3}) ?\(([a-z\d])\)", r"\1 \2"),   # \cot(x)
    (r"_ ?\{[ ~]?(\w+)[ ~]?\}", r"_\1 "),
    (r"\\begin\{(?:[pbB]?matrix|smallmatrix|array)\}(?: ?\{[lcr| ]*\})?", r"\\begin "),
    (r"(?:\\\\ ?)?\\end\{(?:[pbB]?matrix|smallmatrix|array)\}", r"\\end "),
    (r",?[ ~](?:and|or)[ ~]", ", "),
    (r"^[ ~]+|[ ~]*\.?[ ~]*$", ""),
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d ])", lambda match: re.sub(r"\D", "", match[0])),   # 10 000
    (r"\\(frac|sqrt) ?(\d)", r"\\\1{\2}"),                                                      # \frac12
    (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"(?<![\w.^}])(\d+)[ ~]?(\\frac\{\d+\}\{\d+\})", r"{\1+\2}"),                               # 1\frac{1}{2}
    (r"(?<![\w.^}])(\d+)[ ~](\d+/\d+)(?![\d.])", r"{\1+\2}"),                                   # 1 1/2
]]


def clean(text):
    r"""One spelling for what means the same; values stay.

    >>> clean(r"$\$1,234.50$."), clean(r"\dfrac12"), clean("１８ degrees"), clean(r"\left(1,2\right)")
    ('1234.50', '\\frac{1}{2}', '18', '(1,2)')
    """
    text = " ".join(text.replace("~", " ").translate(_CHARACTERS).split())
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):   # (1,000) may be a point
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda match: match[0].replace(",", ""), text)
    return text


# Behind a number: a \text{...}, or a word behind a space, or one of these abbreviations.
_UNIT = re.compile(r"(?<=[\d})\]%!i])(?:~(?:[^\d~]{2,}|[mghsLNJWVKCF])|[ ~][A-Za-z]{3,}(?:[ /][A-Za-z]+)*|[ ~]?(?:cm|mm|km|kg|mg|mL"
                   r"|ft|in|lbs?|oz|hrs?|mph|min))~?(?:\^\{?[23]\}?)?$")
_NO_UNIT = re.compile(r"\b(?:or|and|not?|nor|of|plus|minus|times|over|hal(?:f|ves)|thirds?|dozens?|hundreds?"
                      r"|thousands?|[a-z]+illions?|squared|cubed|point|base|mod|pi|[ei])\b")


def _split_unit(text):
    """("18", "2chin") of "18 square inches" and "18 inch^2", sorted;  ("18 x", "") of "18 x", no unit."""
    match = _UNIT.search(text)
    unit = match[0].casefold().replace("square ", "2").replace("cubic ", "3") if match else ""
    if not match or _NO_UNIT.search(unit):
        return text, ""
    return text[:match.start()], "".join(sorted(re.findall("[a-z23]", re.sub(r"((?<=ch)e)?s\b", "", unit))))


def _split_name(text):
    r"""A name in front, and what it is: ("x", "5") of "x = 5", ("x", "5, 6") of "x = 5, x = 6"; else ("", text).

    >>> _split_name("1 < x <= 3"), _split_name("x >= 5"), _split_name("2x = 5")
    (('x', '(1, 3]'), ('x', '[5, \\infty)'), ('', '2x = 5'))
    """
    name = re.match(r"(\\?[A-Za-z]+(?:_\w+|\([a-z]\))?|\([a-z](?:, ?[a-z])+\)) ?(?:=|\\in(?![a-z]))", text)
    if name:
        rest = re.sub(rf"(^|, ?){re.escape(name[1])} ?(?:=|\\in(?![a-z]))", r"\1", text)
        return ("", text) if "," in rest and "=" in rest else (name[1], rest)
    parts = re.split(r"[ ~]?([<>]=?)[ ~]?", text)
    if ">" in "".join(parts[1:2]):
        parts = [part.replace(">", "<") for part in reversed(parts)]
    if len(parts) == 3:
        parts = ["-\\infty", "<", *parts] if parts[0].isalpha() else [*parts, "<", "\\infty"]
    if len(parts) != 5 or not re.fullmatch("[A-Za-z]", parts[2]) or not {parts[1], parts[3]} <= {"<", "<="}:
        return "", text
    return parts[2], f"{'(['[parts[1] == '<=']}{parts[0]}, {parts[4]}{')]'[parts[3] == '<=']}"


# --- 3. The parser ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Group:
    r"""Several values. kind: brackets as written ("(]"), "," for a list or set, "\cup", "&" and "\\", "="."""
    kind: str
    items: tuple


def _items(value, kind):
    """The items of a group of this kind; any other value is its own only item."""
    return value.items if isinstance(value, Group) and value.kind == kind else (value,)


def _power(base, exponent):
    """base ** exponent, exact where the exponent is whole; an odd root of a negative number is real."""
    top, degree = exponent.as_integer_ratio() if isinstance(exponent, Fraction) else (0, 1)
    if isinstance(base, Fraction) and abs(top) * (base.numerator * base.denominator).bit_length() > MAX_BITS:
        raise OverflowError("too large")
    if degree % 2 and degree > 1 and not isinstance(base, complex) and base < 0:
        return (-(-base) ** (1 / degree)) ** top
    return base ** exponent


_BINDING = {"\\\\": 1, "&": 2, ",": 3, "=": 4, "\\cup": 5, "+": 6, "-": 6, "*": 7, "/": 7, "2x": 7, "^": 8}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
               "2x": operator.mul, "^": _power}
_BRACKETS = ["()", "[]", "[)", "(]", "{}", "\\{\\}", "\\begin\\end", "\\langle\\rangle"]
_LETTER = r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|phi|omega|infty)(?![a-z]))"
_NAME = rf"{_LETTER}(?:_(?:\d+|[A-Za-z]+))?"                          # x or x_1
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"
_FACTOR = re.compile(rf"[({{]|\\frac|\\?sqrt|\\?pi|{_NAME}", re.A)    # may follow another one without a sign
_TOKEN = re.compile(rf"[ ~]*(\\?(?:pi|sqrt)(?![A-Za-z])|[A-Za-z]{{4,}}|{_NAME}|{_NUMBER}|\\[A-Za-z]+|\\.|.|$)",
                    re.A | re.S)


def _expression(tokens, point, loosest=0, depth=0):
    """Takes an expression off the end of `tokens`, which stand from right to left, and returns its value.

    Recursive descent with precedence climbing: reads on as long as operators bind more tightly than `loosest`.
    What is read is computed at once, with Fractions as long as possible. Raises what `parse` catches.
    """
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    token = tokens.pop()
    if token in ("+", "-"):
        value = _expression(tokens, point, max(loosest, _BINDING["+"]), depth + 1)
        value = -value if token == "-" else value
    else:
        value = _atom(token, tokens, point, depth + 1)
    while True:
        if isinstance(value, Fraction) and (value.numerator * value.denominator).bit_length() > MAX_BITS:
            raise OverflowError("too large")
        token = tokens[-1]
        infix = token if token in _BINDING else "2x" if _FACTOR.fullmatch(token) else ""
        if token not in ("%", "!") and (not infix or _BINDING[infix] <= loosest):
            return value
        if infix != "2x":
            tokens.pop()
        right = _expression(tokens, point, _BINDING[infix] - (infix == "^"), depth + 1) if infix else None
        if token == "%":
            value /= 100
        elif token == "!":
            value = Fraction(math.factorial(range(101).index(value)))   # or ValueError
        elif infix in _ARITHMETIC:
            value = _ARITHMETIC[infix](value, right)
        elif infix != "=":
            value = Group(infix, (*_items(value, infix), right))
        elif not _close(value, right):   # of 9+9 = 18 one side is enough
            value = Group("=", (value - right,))


def _atom(token, tokens, point, depth):
    """The value of a number, a letter (at each point another fixed number), a macro or a bracket."""
    if re.match(r"\.?\d", token, re.A) and len(token) <= 100:
        return Fraction(token)
    if token in ("i", "pi", "\\pi"):
        return 1j if token == "i" else math.pi
    if token == "\\frac":
        return _atom(tokens.pop(), tokens, point, depth + 1) / _atom(tokens.pop(), tokens, point, depth + 1)
    if token in ("\\sqrt", "sqrt"):
        degree = _atom(tokens.pop(), tokens, point, depth).items[0] if tokens[-1] == "[" else 2
        return _power(_atom(tokens.pop(), tokens, point, depth + 1), 1 / Fraction(degree))
    if re.fullmatch(_NAME, token, re.A):
        return (1, 1, -1)[point] * (0.5 + zlib.crc32(f"{token} {point}".encode()) / 2**32)
    if not any(kind.startswith(token) for kind in _BRACKETS):
        raise ValueError(f"not understood: {token!r}")
    inside = _expression(tokens, point, 0, depth)
    kind, inner = token + tokens.pop(), getattr(inside, "kind", "")
    if kind not in _BRACKETS:
        raise ValueError(f"brackets that do not match: {kind}")
    if inner in ("&", "\\\\") or kind in ("{}", "\\begin\\end") or (kind == "()" and inner != ","):
        return inside
    return Group("," if kind == "\\{\\}" else kind, _items(inside, ","))


@functools.lru_cache(maxsize=1000)   # the answers of a group are compared with one gold
def parse(text):
    r"""The values of a cleaned text at three points (a list), or None if it is not understood.

    >>> parse(r"\frac{3}{4}")[0], parse("1/0"), parse("1 8"), parse("9^{9^{9^9}}")
    (Fraction(3, 4), None, None, None)
    """
    # 1 \pm 2 is the list 1 + 2, 1 - 2.
    readings = dict.fromkeys(text.replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+"))
    values = []
    try:
        for point in range(3):
            items = []
            for reading in readings:
                tokens = _TOKEN.findall(reading)[::-1]
                value = _expression(tokens, point)
                if tokens[-1]:
                    raise ValueError("not all was read")
                items += [item for item in _items(value, ",") if not any(_close(item, other) for other in items)]
            values.append(value if len(readings) == 1 else Group(",", tuple(items)))
        return values
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None


# --- 4. Comparison ------------------------------------------------------------------------------------

def _close(a, b):
    """Whether two values at one point are the same: exactly, or where there are roots and letters to 1e-10."""
    if any(isinstance(value, Group) for value in (a, b)) or all(isinstance(value, Fraction) for value in (a, b)):
        return a == b
    return cmath.isfinite(a) and cmath.isclose(a, b, rel_tol=1e-10)


def _same(a, b):
    """Whether two values, each given at all points, are the same."""
    kinds = {getattr(value, "kind", None) for value in (*a, *b)}
    if kinds == {None}:
        return all(map(_close, a, b))
    if len(kinds) > 1 or not len(a[0].items) == len(b[0].items) <= MAX_ITEMS:
        return False
    a, b = ([*zip(*(group.items for group in values))] for values in (a, b))   # items, each at all points
    if kinds == {"="}:   # left - right, the same up to a factor
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


def is_equivalent(answer, gold):
    r"""Whether two answers mean the same. str, str -> bool.

    >>> is_equivalent(r"1\frac12", "1.5"), is_equivalent(r"\sqrt 8", r"2\sqrt{2}"), is_equivalent("2x=4y", "x-2y=0")
    (True, True, True)
    >>> is_equivalent("18", "18.0000001"), is_equivalent("0.333", "1/3"), is_equivalent("(1,2]", "[1,2]")
    (False, False, False)
    """
    if not answer or not gold or max(len(answer), len(gold)) > MAX_ANSWER:
        return False
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold or max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    if _TOKEN.findall(answer) == _TOKEN.findall(gold):   # the same but for spaces
        return True
    words = [re.sub(r"^\(([A-Za-z])\)$|[ ~]", r"\1", text).casefold() for text in (answer, gold)]
    if all(word.isalpha() for word in words):
        return words[0] == words[1]
    (answer, unit), (gold, gold_unit) = _split_unit(answer), _split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    (name, value), (gold_name, gold_value) = _split_name(answer), _split_name(gold)
    pairs = [(answer, gold)] if name != gold_name else []   # of y = 2x the y may be part of an equation, too
    if name == gold_name or not name or not gold_name:
        pairs += [(value, gold_value), (value.removesuffix("%") if "%" not in gold else "", gold_value)]
    pairs = [(parse(value), parse(gold)) for value, gold in pairs]
    return any(value and gold and _same(value, gold) for value, gold in pairs)


# --- 5. Rewards ---------------------------------------------------------------------------------------

def accuracy_reward(completion, gold):
    r"""1.0 if the marked answer of `completion` is equivalent to `gold`, else (and if either is missing) 0.0.

    >>> accuracy_reward(r"so it is \boxed{18}", "18"), accuracy_reward("18", "18"), accuracy_reward(None, "18")
    (1.0, 0.0, 0.0)
    """
    try:
        answer = extract_answer(completion)
        return float(answer is not None and is_equivalent(answer, gold))
    except Exception:   # whatever a completion provokes, it earns nothing
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
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [accuracy_reward(text, final_answer(gold)) for text, gold in zip(texts, answer, strict=True)]


# 3 * 4 = 12 = 24/2, with nothing before or behind it that could belong to it.
_EQUATION = re.compile(r"(?<![\w.,)%}=+*/^-])(?<![\d.)%=+*/^x-] )[( ]*[\d.]+\)?[~ ]?[-+*/][-+*/().\d~ ]{0,80}"
                       r"(?:=[-+*/().\d~ ]{1,80})+(?<=[\d)])(?![\w\\^_(%]|[.,]\d| *[-+*/^=])", re.A)


def step_rewards(completion):
    r"""1.0 or 0.0 for each step of a solution that can be checked: a list of (end, reward), end in characters.

    A step is a line or a sentence in which a calculation has a result. It earns 1.0 if all of its equations
    hold, up to rounding to the decimals shown. On real wrong solutions of GSM8K such a rule sees a slip in
    4.6%, with 94% precision. So use it to punish: a bonus per right step is farmed with 1+1=2.

    >>> step_rewards("First 3 * 4 = 12. Then 10/3 = 3.33!\n12 + 5 = 18\nso 18")
    [(17, 1.0), (35, 1.0), (47, 0.0)]
    """
    rewards = []
    for step in re.finditer(r"(?:[^\n.;!?。]|[.;!?](?!\s))+[.;!?。]?", completion[:10_000]):
        text = clean(re.sub(r"<<[^<>]*>>", "", step[0])) if len(step[0]) <= MAX_ANSWER else ""
        text = re.sub(r"(?<=[\d)])[ ~]?x[ ~]?(?=[\d(])", "*", text)
        equations = [re.split("[ ~]*=[ ~]*", equation) for equation in _EQUATION.findall(text)]
        pairs = [pair for sides in equations if all(map(parse, sides)) for pair in zip(sides, sides[1:])]
        if pairs:
            rewards.append((step.end(), float(all(_holds(left, right) for left, right in pairs))))
    return rewards


def _holds(left, right):
    """Whether left = right, up to rounding to the decimals that the right side shows: 10/3 = 3.33."""
    number, error = re.fullmatch(r"-?\d+(?:\.(\d*))?", right), parse(left)[0] - parse(right)[0]
    half = Fraction(1, 2 * 10 ** len(number[1] or "")) if number else 0
    return error == 0 or -half <= error < half
