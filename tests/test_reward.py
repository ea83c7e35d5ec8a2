"""The rule-based reward: text in, 1.0 or 0.0 out."""

import time

import pytest

from reward import accuracy_reward, clean, extract_answer, is_equivalent, parse_number


@pytest.mark.parametrize("completion, answer", [
    (r"so \boxed{18}.", "18"),
    (r"\boxed{ 18 }", "18"),
    (r"\boxed{1} or rather \boxed{2}", "2"),                       # the last one
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),                      # matched braces
    (r"\boxed{\text{a}_{b}} and {", r"\text{a}_{b}"),
    (r"\boxed{3} #### 4", "3"),                                    # kind before position
    ("<answer> 18 </answer>", "18"),
    ("<answer>1</answer> <answer>2</answer>", "2"),
    ("<answer>7</answer>\n#### 8", "7"),
    ("first\n#### 18", "18"),
    ("#### 18\nthen\n#### 1,000\n", "1,000"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    ("18", None), ("The answer is 18.", None), ("", None), ("x #### 5", None), ("####5", None),
    (r"\boxed{18", None), (r"\boxed{1} \boxed{2", None), (r"\boxed{}", None), (r"\boxed{  }", None),
    ("<answer>18", None), ("18</answer>", None), ("</answer>18<answer>", None),
    (r"<think>\boxed{1}", None), (r"<think>\boxed{1}</think>", None), (r"<think>a</think>\boxed{1}<think>", None),
    (r"\boxed{" + "1" * 400 + "}", "1" * 400), (r"\boxed{" + "1" * 401 + "}", None),
])
def test_only_a_marked_answer_counts(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("answer, gold", [
    ("18", "18"), ("018", "18"), ("+18", "18"), ("-18", "-18"), ("\u221218", "-18"), ("18.", "18"), ("18.0", "18"),
    ("1,000", "1000"), ("1000", "1,000"), ("$1,234,567.50$", "1234567.5"), ("{1{,}000}".strip("{}"), "1000"),
    ("$18", "18"), (r"\$18", "18"), ("\u20ac18", "18"), ("\u00a318.50", "18.5"),
    ("0.5", "1/2"), (".5", "0.5"), ("2/4", "1/2"), (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", "-0.5"), (r"\tfrac{-1}{2}", "-1/2"), ("0.1", "1/10"),
    ("50%", "0.5"), (r"50\%", "50%"), ("50%", "1/2"), ("50%", "50"), ("0.5", "50%"),
    ("18 dollars", "18"), ("18 apples.", "18"), (r"18\text{ cm}", "18"), ("18 dollars", "18 Dollars"),
    ("x = 5", "5"), ("x=5", "5"), (r"\left(3\right)", "(3)"), (r"1\,000", "1000"), (r"\!7", "7"),
    ("Yes", "yes"), (r"\text{C}", "c"), (r"\mathrm{North}", "north"), (r"\sqrt{2}", r"\sqrt{2}"),
    ("12345678901234567890123", "12345678901234567890123"),
])
def test_equal_answers(answer, gold):
    assert is_equivalent(answer, gold)


@pytest.mark.parametrize("answer, gold", [
    ("18", "19"), ("18", "-18"), ("18", "18.1"), ("18", "180"), ("1800", "18"), ("0.18", "18"), ("118", "18"), ("81", "18"),
    ("18 or 20", "18"), ("17, 18", "18"), ("17, 18, 19", "18"), ("18, 18", "18"), ("18 and 20", "18"), ("not 18", "18"),
    ("18 of 20", "18 of 21"), (r"18 \pm 1", "18"), ("[0, 100]", "18"), ("1 8", "18"), ("9+9", "18"), ("36/2/1", "18"),
    ("50", "50%"), ("0.5", "50"), ("5000%", "50%"), ("2/1", "1/2"), (r"\frac{2}{1}", "0.5"), ("1/0", "1/0.0"), ("1/0", "0"),
    ("1,00", "100"), ("1,0000", "10000"), ("1.000", "1000"), ("12345678901234567890124", "12345678901234567890123"),
    ("18 dollars", "18 cents"), ("18 thousand", "18"), ("$18 million", "18"), ("5 Dozen", "5"), ("3 x", "3"), ("18 minus", "18"),
    ("yes no", "yes"), ("A maybe", "A"), ("x+1 apples", "x+1"), ("18 percent", "18"), ("3 halves", "3"), ("Yes", "No"), ("", "18"), ("18", ""), ("", ""), ("nan", "18"), ("inf", "18"),
    ("__import__('os')", "18"), ("9**9**9**9", "18"), ("18" + "0" * 500, "18"), (".", "0"), ("%", "0"), ("-", "0"),
])
def test_different_answers(answer, gold):
    assert not is_equivalent(answer, gold)


def test_numbers_are_exact():
    assert parse_number("0.1") + parse_number("0.2") == parse_number("0.3")
    assert parse_number("9007199254740993") != parse_number("9007199254740992")   # equal as floats
    assert parse_number("1" * 101) is None and parse_number("1e9") is None and parse_number("1/0") is None


def test_cleaning_examples():
    assert clean(r"$\$1,234.50$.") == "1234.50" and clean(r"\dfrac{1}{2}") == r"\frac{1}{2}"
    assert accuracy_reward(r"\boxed{\$1,234.50.}", "1234.5") == 1.0 and clean(".") == ""


def test_cleaning_is_idempotent():
    for text in (r"$\$1,234.50$.", r"\dfrac{1}{2}", r"\text{ two }", "x = 5", "18 apples"):
        assert clean(clean(text)) == clean(text)


def test_reward_is_one_or_zero():
    assert accuracy_reward(r"so it is \boxed{18}", "18") == 1.0
    assert accuracy_reward(r"so it is \boxed{19}", "18") == 0.0
    assert accuracy_reward("18", "18") == 0.0
    assert accuracy_reward(r"\boxed{18}", "") == 0.0


@pytest.mark.parametrize("text", [
    "\\boxed{" * 100_000, "{" * 500_000 + "}" * 500_000, "\\boxed{" + "{" * 500_000, "<answer>" * 100_000,
    "<think>" * 100_000, "#### " * 200_000, "\n#### " * 100_000, "1" * 1_000_000, "\\boxed{" + "9" * 399 + "}",
    "\\boxed{" + "1," * 199 + "}", "\\boxed{" + "\\text{" * 60 + "}" * 60 + "}", "\\boxed{" + " " * 390 + "1}",
    "\\boxed{" + "- " * 190 + "1}", "\\boxed{9**9**9**9}", "\\boxed{" + "1/" * 190 + "}", "\x00" * 1_000_000,
])
def test_hostile_text_earns_nothing_and_takes_no_time(text):
    started = time.process_time()
    assert accuracy_reward(text, "18") == 0.0
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("text", ["1" * 1_000_000, "1 " * 500_000, "1," * 500_000, "a" * 1_000_000, "1 " + "a" * 1_000_000,
                                  "\\text{" * 150_000, " " * 1_000_000 + "1", "$" * 1_000_000])
def test_comparing_takes_linear_time(text):
    started = time.process_time()
    is_equivalent(text, "1")
    assert time.process_time() - started < 0.5
