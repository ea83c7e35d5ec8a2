r"""Rule-based math rewards: the text of a completion in, 1.0 or 0.0 out.

GRPO learns whatever the reward pays for, so a rule that can be fooled will be fooled. Hence few rules,
each of them strict: the answer must be marked, the whole marked text is the answer, numbers are compared
exactly, and anything that is not understood is wrong. No text of a model is ever evaluated as code, and
every scan is linear and every number bounded, so that hostile text costs little time.

Conventions (each is a choice; change it here and the tests will tell you what moved):
  * A marker decides, by kind: \boxed{...}, else <answer>...</answer>, else a line "#### ...". Within a
    kind the last one counts (an unclosed \boxed{ too, as no answer). A bare number earns nothing.
  * Only text after the last </think> counts; a <think> left open means that there is no answer yet.
  * "18 or 20" and "17, 18" are no numbers, so they do not equal 18.
  * An answer of 50% equals a gold answer of 1/2, 0.5 and 50%, and also 50, read as a unit.
    An answer of 50 does not equal a gold answer of 50% or 0.5.
  * One word behind an answer's number is a unit and is dropped ("18 dollars"), if the gold has none, and
    unless it is a letter or says how many ("18 thousand").
"""

import re
from fractions import Fraction

# What a question is followed by, as in the prompts of the released DeepSeekMath models.
MATH_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."

MAX_ANSWER = 400   # characters; a marked text longer than this is no answer
MAX_NUMBER = 100   # characters; nothing longer is read as a number


def extract_answer(completion):
    r"""The text that a completion marks as its answer, or None if there is none. str -> str | None.

    "so \boxed{18}." -> "18";  "<answer> 18 </answer>" -> "18";  "#### 18" -> "18";
    "the answer is 18" -> None;  "\boxed{18" -> None.
    """
    _, closed, after = completion.rpartition("</think>")
    if "<think>" in after:
        return None
    completion = after if closed else completion

    for found in (_last_box(completion), _last_answer_tag(completion), _last_hash_line(completion)):
        if found is not None:
            found = found.strip()
            return found if 0 < len(found) <= MAX_ANSWER else None
    return None


def _last_box(text):
    r"""What stands in the last \boxed{...}: None if there is no box, "" if it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, min(len(text), start + MAX_ANSWER + 1)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return ""


def _last_answer_tag(text):
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>"):end] if start >= 0 else None


def _last_hash_line(text):
    start = text.rfind("\n#### ") + 1   # 0 if there is none: the text may begin with it
    return text[start + 5:].split("\n", 1)[0] if text.startswith("#### ", start) else None


# Spellings that change no value, and currency signs. Order matters: "\$" before "$".
_SPELLINGS = [("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\ ", " "),
              ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("{,}", ","), ("\\%", "%"), ("\\$", ""),
              ("$", ""), ("€", ""), ("£", ""), ("−", "-")]
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)(?:/(\d+))?(%?)")
_FRAC = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{(\d+)\}(%?)")
_NO_UNITS = {"or", "and", "not", "of", "plus", "minus", "half", "halves", "dozen", "percent", "pi", "squared",
             "hundred", "thousand", "million", "billion", "trillion"}


def clean(text):
    r"""Rewrite what never changes a value: "$\$1,234.50$." -> "1234.50";  "\dfrac{1}{2}" -> "\frac{1}{2}"."""
    text = _TEXT.sub(r" \1 ", text)
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    text = " ".join(text.split()).removesuffix(".").rstrip()
    text = re.sub(r"^[A-Za-z] ?= ?", "", text)
    number, space, unit = text.partition(" ")
    if _THOUSANDS.fullmatch(number):
        text = number.replace(",", "") + space + unit
    return text


def parse_number(text):
    r"""The exact value of a cleaned text, or None if it is no number. str -> Fraction | None.

    "18" -> 18;  "0.5", "1/2", "\frac{1}{2}" and "50%" -> 1/2;  "18 or 20", "1/0" and "1e9" -> None.
    """
    if len(text) > MAX_NUMBER:
        return None
    if not re.search(r"\d \d", text):   # "1 000" is not understood, "- 3" is
        text = text.replace(" ", "")
    match = _NUMBER.fullmatch(text) or _FRAC.fullmatch(text)
    if match is None:
        return None
    sign, top, bottom, percent = match.groups()
    bottom = Fraction(bottom or 1)
    if bottom == 0:
        return None
    return Fraction(top) / bottom * (-1 if sign == "-" else 1) / (100 if percent else 1)


def is_equivalent(answer, gold):
    r"""Whether two answers mean the same: exact for numbers, letter by letter for all else. -> bool.

    "1,000" and "1000";  "\frac{1}{2}" and "0.5";  "18 dollars" and "18";  "Yes" and "yes": True.
    "18" and "18.1";  "18 or 20" and "18";  "" and "": False.
    """
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold:
        return False
    number, _, unit = answer.partition(" ")
    is_unit = len(unit) > 1 and unit.isalpha() and unit.casefold() not in _NO_UNITS
    if is_unit and parse_number(number) is not None and " " not in gold:
        answer = number
    a, g = parse_number(answer), parse_number(gold)
    if a is None or g is None:
        return answer.casefold() == gold.casefold()
    return a == g or (answer.endswith("%") and not gold.endswith("%") and a * 100 == g)


def accuracy_reward(completion, gold):
    r"""1.0 if the marked answer of `completion` is equivalent to `gold`, else 0.0.

    ("so it is \boxed{18}", "18") -> 1.0;  ("18", "18") -> 0.0, nothing is marked.
    """
    answer = extract_answer(completion)
    return float(answer is not None and is_equivalent(answer, gold))
