r"""The rule-based reward: text in, 1.0 or 0.0 out.

The tables are grouped by the rules of reward.py. A file of real answers can be put through the restylings
of `test_restyled_answers_are_right_and_near_misses_are_not`, too (JSON lines with an "answer" in each):

    ANSWERS=math500.jsonl python -m pytest -q tests/test_reward.py -k restyled
"""

import doctest
import json
import os
import random
import re
import runpy
import time
from fractions import Fraction
from pathlib import Path

import pytest

import reward
from adapters import (
    accuracy_reward,
    accuracy_rewards,
    clean,
    extract_answer,
    final_answer,
    is_equivalent,
    parse,
    step_rewards,
)
from helpers import make_chat_model


def boxed(text):
    return "\\boxed{" + text + "}"


# --- extraction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{ 18 }", "18"),
        (r"\boxed {18}", "18"),
        ("\\boxed\n{18}", "18"),
        (r"\fbox{18}", "18"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\fbox{1} \boxed{2} \fbox{3}", "3"),  # the last one
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # matched braces
        (r"\boxed{\text{a}_{b}} and {", r"\text{a}_{b}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),  # "\{" is shown, not matched
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{18} is \boxed", "18"),  # no brace, no box
        (r"\boxed{3} #### 4", "3"),  # kind before position
        ("<answer> 18 </answer>", "18"),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1</answer></answer>", "1"),
        ("<answer>7</answer>\n#### 8", "7"),
        ("first\n#### 18", "18"),
        ("#### 18\nthen\n#### 1,000\n", "1,000"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"a</think>b</think>\boxed{3}", "3"),
        ("18", None),
        ("The answer is 18.", None),
        ("", None),
        ("x #### 5", None),
        ("####5", None),
        (r"\boxed{18", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed 18", None),
        (r"\boxed{1\}", None),
        ("boxed{18}", None),
        ("#### \n", None),
        ("<answer>18", None),
        ("18</answer>", None),
        ("</answer>18<answer>", None),
        (r"<think>\boxed{1}", None),
        (r"<think>\boxed{1}</think>", None),
        (r"<think>a</think>\boxed{1}<think>", None),
        (boxed("1" * 400), "1" * 400),
        (boxed("1" * 401), None),
        ("#### " + "1" * 401, None),
    ],
)
def test_only_a_marked_answer_counts(completion, answer):
    assert extract_answer(completion) == answer


# --- equivalence --------------------------------------------------------------------------------------

EQUAL = {
    "integers": [
        ("18", "18"),
        ("018", "18"),
        ("+18", "18"),
        ("-18", "-18"),
        ("- 18", "-18"),
        ("18.", "18"),
        ("18.0", "18"),
        ("-0", "0"),
        ("12345678901234567890123", "12345678901234567890123"),
    ],
    "thousands": [
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("{1{,}000}".strip("{}"), "1000"),
        (r"10,\!080", "10080"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"1\,000", "1000"),
        ("1 000 000", "1000000"),
        ("1,234.5", "1234.5"),
        (r"\frac{1,000}{3}", "1000/3"),
        (r"\sqrt{1,000}", r"10\sqrt{10}"),
    ],
    "currency": [
        ("$1,234,567.50$", "1234567.5"),
        ("$18", "18"),
        (r"\$18", "18"),
        ("\u20ac18", "18"),
        ("\u00a318.50", "18.5"),
        (r"$\$18$", "18"),
        ("18$", "18"),
        (r"18\$", "18"),
        (r"-\$5", "-5"),
    ],
    "fractions": [
        ("0.5", "1/2"),
        (".5", "0.5"),
        ("2/4", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"\tfrac{-1}{2}", "-1/2"),
        (r"\cfrac{1}{-2}", "-0.5"),
        ("0.1", "1/10"),
        (r"\frac12", "0.5"),
        (r"\frac 1 2", "0.5"),
        (r"\frac1{72}", "1/72"),
        (r"\frac{9}4", "2.25"),
        (r"\frac {1} {2}", "0.5"),
        (r"\frac{\frac{1}{2}}{3}", "1/6"),
        ("36/2/1", "18"),
    ],
    "mixed numbers": [
        (r"1\frac{4}{5}", "9/5"),
        (r"1\frac45", "1.8"),
        (r"137 \frac{1}{2}", "137.5"),
        ("1 1/2", "1.5"),
        (r"-1\frac12", "-1.5"),
        (r"5-1\frac12", "3.5"),
    ],
    "percent": [
        ("50%", "0.5"),
        (r"50\%", "50%"),
        ("50%", "1/2"),
        ("50%", "50"),
        ("0.5", "50%"),
        ("50 percent", "50%"),
        ("18 percent", "18"),
        (r"50\text{ percent}", "0.5"),
        ("12.5 %", r"12.5\%"),
        ("x = 50%", "50"),
    ],
    "scientific": [
        ("1e9", "1000000000"),
        (r"1.5 \times 10^3", "1500"),
        ("6e-5", r"6 \cdot 10^{-5}"),
        ("2E3", "2000"),
    ],
    "powers, products, sums": [
        ("9+9", "18"),
        (r"2 \cdot 3^2", "18"),
        ("2(3+4)", "14"),
        ("2^{10}", "1024"),
        ("2^10", "1024"),
        ("-3^2", "-9"),
        ("(-3)^2", "9"),
        ("2^-3", "0.125"),
        ("2^{3^2}", "512"),
        ("2^3^2", "512"),
        ("5!", "120"),
        (r"3 \times 4 \div 2", "6"),
        ("9+9=18", "18"),
        ("2-3-4", "-5"),
    ],
    "roots": [
        (r"\sqrt{2}", r"\sqrt{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        (r"\sqrt{16}", "4"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
        (r"\sqrt[3]{-8}", "-2"),
        (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
        ("2^{1/3}", r"\sqrt[3]{2}"),
        (r"\sqrt{5}+\sqrt 2", r"\sqrt{2}+\sqrt{5}"),
        ("\u221a2", r"\sqrt{2}"),
    ],
    "pi, i, letters": [
        (r"\frac94\pi", r"\frac{9\pi}{4}"),
        ("2\u03c0", r"2\pi"),
        ("4i+3", "3+4i"),
        ("i^2", "-1"),
        (r"\sqrt{-4}", "2i"),
        ("1+x", "x+1"),
        ("(x+1)^2", "x^2+2x+1"),
        ("x*2", "2x"),
        ("ba^2", "a^{2}b"),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
        (r"2\theta", r"\theta+\theta"),
        ("x_{1}+1", "1+x_1"),
        (r"1-\frac{1}{\mathrm e}", r"1-\frac1e"),
        ("x/2", r"\frac12 x"),
        ("xy", "yx"),
        (r"\frac{\tau}{2}", r"\tau/2"),
    ],
    "brackets as written": [
        ("(1,2)", "( 1, 2 )"),
        (r"\left(1,\frac12\right]", "(1, 0.5]"),
        (r"[1,\infty)", "[1,\u221e)"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,+\infty)\cup(-\infty,2)"),
        (r"\langle 1,2\rangle", r"\langle1, 2\rangle"),
        (r"\left( 3, \frac{\pi}{2} \right)", "(3, 0.5\u03c0)"),
        ("(1,2),(3,4)", "(3,4),(1,2)"),
        ("(1,234)", "(1, 234)"),
    ],
    "lists": [
        ("1, 2", "2,1"),
        ("1 and 2", "1, 2"),
        ("1 or 2", "2, 1"),
        ("19, 46, and 82", "82,46,19"),
        (r"\{2,1\}", "1,2"),
        (r"1\text{ and }2", r"\{1,2\}"),
        (r"\pm 3", "3,-3"),
        (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
        (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt5"),
        ("$5 and $6", "6, 5"),
        (r"x=\pm 3", "-3, 3"),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\\ \end{bmatrix}"),
        (
            r"\begin{pmatrix} 1/2 & 2 \\ 3 & 4 \end{pmatrix}",
            r"\left[\begin{array}{cc}0.5 & 2\\3&4\end{array}\right]",
        ),
    ],
    "names": [
        ("x = 5", "5"),
        ("x=5", "5"),
        ("5", "x=5"),
        ("x = 5", "x=5.0"),
        ("x=9+9=18", "18"),
        (r"\theta = 30", "30"),
        ("f(x)=2x", "x+x"),
        ("(x,y)=(1,2)", "(1, 2)"),
        ("x=1 or x=2", "2, 1"),
        (r"x \in [1,2]", "[1,2]"),
        ("Area = 5", "5"),
        (r"\text{Area} = 5", "5"),
        ("x_{1} = 3", "3"),
        ("f(2)=5", "5"),
        ("2x+3", "y = 2x + 3"),
        ("y=3+2x", "y = 2x + 3"),
        ("x=1, y=2", "y=2, x=1"),
        (r"x=\log_2 3", r"\log_2 3"),
        ("x=2_5", "2_5"),
    ],
    "equations": [
        ("2x - y + 3 = 0", "y = 2x+3"),
        ("x^2/4+y^2/3=1", "3x^2+4y^2=12"),
        ("5x-7y+11z+4=0", "-5x+7y=11z+4"),
    ],
    "inequalities, by their text": [
        ("x > 5", "x>5"),
        (r"x \ge 5", "x \u2265 5"),
        (r"1 < x \leq 3", r"1\lt x \leqslant3"),
    ],
    "units": [
        ("18 dollars", "18"),
        ("18", "18 cm"),
        ("18 apples.", "18"),
        (r"18\text{ cm}", "18"),
        ("18 cm", r"18\text{ cm}"),
        (r"18\text{ inches}", "18 inch"),
        (r"864 \mbox{ inches}^2", "864"),
        ("15 cm^2", r"15\text{ cm}^{2}"),
        ("5kg", "5"),
        ("60 miles per hour", "60"),
        (r"10\text{ m/s}", "10"),
        (r"5\text{ m}", "5"),
        (r"4\pi\text{ cm}", r"4\pi"),
        (r"$\frac{1}{2}$ hour", "0.5"),
        ("18 dollars", "18 Dollars"),
        ("x+1 apples", "x+1"),
        ("18 square inches", r"18\text{ inch}^2"),
        ("3 cubic meters", "3 meter^3"),
    ],
    "units in Chinese": [
        ("18\u5143", "18"),
        (r"\text{18\u5143}".replace(r"\u5143", "\u5143"), "18"),
        ("18 \u4e2a\u3002", "18"),
        ("18\\text{\u5343\u514b}", "18"),
        ("\u00a518", "18"),
        ("\uff11\uff18\u5398\u7c73", "18\u5398\u7c73"),
    ],
    "units that are short for each other": [
        ("864 in^2", r"864 \mbox{ inches}^2"),
        (r"15\text{ sq. cm}", r"15\mbox{ cm}^2"),
        ("18 hours", "18 hrs"),
        ("60 km/h", "60"),
        (r"\$20/hour", "20"),
        ("18/day", "18"),
        ("60 km per hour", "60"),
        ("60 mph", "60 miles per hour"),
        ("10 sq cm", r"10\text{ cm}^2"),
        (r"18\text{ inch}", "18 inches"),
    ],
    "degrees": [
        (r"90^\circ", "90"),
        ("90", r"90^{\circ}"),
        ("90\u00b0", r"90^\circ"),
        ("90 degrees", "90"),
        (r"90\degree", "90"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
        (r"98.6^\circ\text{F}", "98.6"),
    ],
    "spelling": [
        (r"\left(3\right)", "(3)"),
        (r"\!7", "7"),
        (r"\(18\)", "18"),
        (r"\[ 18 \]", "18"),
        ("$18$", "18"),
        ("\uff11\uff18", "18"),
        ("\u221218", "-18"),
        (r"\mathbf{18}", "18"),
        (r"\boldsymbol{\frac{1}{2}}", "0.5"),
        (r"2\;\cdot\;9", "18"),
        (r"\displaystyle\frac12", "0.5"),
        (r"\{1,\,2\}", r"\{1,2\}"),
    ],
    "words": [
        ("Yes", "yes"),
        (r"\text{C}", "c"),
        ("(C)", "C"),
        (r"\textbf{(C)}", r"\text{C}"),
        (r"\mathrm{North}", "north"),
        ("yes.", "Yes"),
        (r"\text{even}", "Even"),
        ("A, B", "B and A"),
        (r"\cot(x)", r"\cot x"),
        (r"2\ln(3)", r"2\ln 3"),
        (r"\cot{x}", r"\cot x"),
        ("12:30", "12:30"),
        (r"\cos(\theta)", r"\cos\theta"),
    ],
    "unicode": [
        ("2\u00d79", "18"),
        ("2\u00b79", "18"),
        ("36\u00f72", "18"),
        ("x\u00b2+x\u00b3", "x^3+x^2"),
        ("\u20133", "-3"),
        ("(1,2)\u222a(3,4)", r"(3,4)\cup(1,2)"),
        ("x\u2208[1,2]", "[1,2]"),
        ("1\u00b12", "3,-1"),
        ("1 \u2264 x", r"1 \le x"),
        ("\u221a10", r"\sqrt{10}"),
        ("\u221a(10)", r"\sqrt{10}"),
    ],
    "bases": [("2516_8", "2516_{8}"), (r"1011_{\text{two}}", "1011_{two}")],
}
DIFFERENT = {
    "numbers": [
        ("18", "19"),
        ("18", "-18"),
        ("18", "18.1"),
        ("18", "180"),
        ("1800", "18"),
        ("0.18", "18"),
        ("118", "18"),
        ("81", "18"),
        ("12345678901234567890124", "12345678901234567890123"),
        ("0.3333333333", "1/3"),
        ("2/1", "1/2"),
        (r"\frac{2}{1}", "0.5"),
        ("1/0", "1/0.0"),
        ("1/0", "0"),
        ("nan", "18"),
        ("inf", "18"),
        ("1e2", "1"),
        ("22/7", r"\pi"),
        ("x=1000000000001", "x=1000000000000"),
        (r"10^{-20}\pi", r"10^{-21}\pi"),
    ],
    "hedges": [
        ("18 or 20", "18"),
        ("17, 18", "18"),
        ("17, 18, 19", "18"),
        ("18, 18", "18"),
        ("18 and 20", "18"),
        ("not 18", "18"),
        (r"18 \pm 1", "18"),
        (r"18 \pm 0", "19"),
        ("[0, 100]", "18"),
        ("[18]", "18"),
        (r"\{18\}", "18"),
        ("18;19", "18"),
        ("18-20", "18"),
        ("18 to 20", "18"),
        ("18 (or 20)", "18"),
        (r"18\text{ or }20", "18"),
        ("x=17 or x=18", "18"),
        ("17=18", "18"),
        ("x = 17 = 18", "18"),
        (r"x \ge 18", "18"),
        ("approximately 18", "18"),
        ("18 of 20", "18 of 21"),
    ],
    "no value": [
        ("1 8", "18"),
        ("1$$8", "18"),
        ("1,00", "100"),
        ("1,0000", "10000"),
        ("1,22", "1.22"),
        (".", "0"),
        ("%", "0"),
        ("-", "0"),
        ("18/", "18"),
        ("(18", "18"),
        ("18)", "18"),
        (r"\frac{1}{2}3", "1.5"),
        (r"\frac123", "1.5"),
        (r"\sqrt10", r"\sqrt{10}"),
        (r"\sqrt[3,4]{8}", "2"),
        (r"2\frac{3}{2}", "3"),
        ("x1", "x"),
        ("1\u00b00", "10"),
        (r"1^\circ 0", "10"),
        ("3 125/128", "3125/128"),
        ("", "18"),
        ("18", ""),
        ("", ""),
        ("3:4", "3/4"),
        ("\u00b2", "2"),
    ],
    "percent": [
        ("50", "50%"),
        ("0.5", "50"),
        ("5000%", "50%"),
        ("0.5%", "50%"),
        ("1+50%", "51"),
        ("50, 60%", "50, 60"),
        ("1/50%", "1/50"),
        ("1.000", "1000"),
    ],
    "units": [
        ("18 dollars", "18 cents"),
        ("5 hours per mile", "5 miles per hour"),
        ("3 sq ft per hour", "3 hours per sq ft"),
        ("18 thousand", "18"),
        ("$18 million", "18"),
        ("5 Dozen", "5"),
        ("3 x", "3"),
        (r"3\,x", "3"),
        (r"3\text{x}", "3"),
        ("$18$-x", "18"),
        ("$5$ < x", "5"),
        (r"$2$\sqrt{x}", "2"),
        ("$2$ xy", "2"),
        (r"18\text{+x}", "18"),
        ("2 sin x", "2"),
        ("1/sin x", "1"),
        (r"1/\pi", "1"),
        ("1/x", "1"),
        ("18 factorial", "18"),
        ("18 below zero", "18"),
        ("18 miles", "18 limes"),
        (r"5\text{ m}", "5 mm"),
        ("15 cm", "15 cm^2"),
        ("5 km", "5 kilograms"),
        ("3 tenths", "3"),
        ("5\u5398\u7c73", "5\u5343\u7c73"),
        ("5\u5343", "5"),
        ("5\\text{\u4e07\u5143}", "5"),
        (r"5\text{ cm}", r"5\text{ km}"),
        (r"2\mathrm{i}", "2"),
        ("5 cm^3", r"5\text{ cm}^2"),
        ("18 minus", "18"),
        ("3 halves", "3"),
        ("18 not", "18"),
        ("7 years and 3 months", "7"),
        ("5 squared", "5"),
        ("yes no", "yes"),
        ("A maybe", "A"),
    ],
    "order and brackets": [
        ("(2,1)", "(1,2)"),
        ("(1,2)", "[1,2]"),
        ("(1,2]", "[1,2)"),
        ("(1,2)", "1,2"),
        (r"\{1,2\}", "(1,2)"),
        ("1,2", "1,2,3"),
        ("1,1,2", "1,2,2"),
        ("1,1,2", "1,2"),
        (r"(-\infty,2)", r"(-\infty,2)\cup(3,4)"),
        ("(1,2", "(1,2)"),
        ("(1,2}", "(1,2)"),
        ("(18}", "18"),
        (r"(5,\infty)", r"[5,\infty)"),
        (r"x<5", r"x \le 5"),
        ("x<5", "x>5"),
        ("x<5", "y<5"),
        ("1<x>3", "(1,3)"),
        ("3>x<1", "(1,3)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ],
    "letters and roots": [
        (r"\sqrt{2}", "2"),
        (r"\sqrt{2}", r"-\sqrt{2}"),
        (r"2\sqrt3", r"\sqrt{6}"),
        (r"\pi", "3.14"),
        ("i", "-i"),
        (r"2\pi", r"\pi"),
        ("x^2", "x^3"),
        (r"\sqrt{x^2}", "x"),
        ("x+y", "x-y"),
        ("a/b", "b/a"),
        ("x_1", "x_2"),
        (r"x_{12}", r"x_{1}2"),
        (r"\infty", r"-\infty"),
        ("2^3", "9"),
        ("18!", "18"),
    ],
    "names and equations": [
        ("x=5", "y=5"),
        ("2x+3", "y=2x+4"),
        ("x=2y+3", "y=2x+3"),
        ("2x+3y=6", "2x+3y=7"),
        ("x^3+x=0", "x=0"),
        ("x=1", "1,2"),
        ("x=1, y=2", "x=2, y=1"),
        ("x=1, y=2", "1,2"),
    ],
    "words and bases": [
        ("Yes", "No"),
        ("(A)", "(B)"),
        ("A or B", "A"),
        ("ACB", "ABC"),
        ("silent", "listen"),
        (r"\text{none}", "0"),
        ("52_8", "52_9"),
        ("52_8", "52"),
        ("42", "52_8"),
        (r"\tan x", r"\cot x"),
        (r"x=\log_2 3", r"\log_2 5"),
        (r"\ln(2)x", r"\ln 2x"),
    ],
    "hostile": [
        ("__import__('os')", "18"),
        ("9**9**9**9", "18"),
        ("9^{9^9}", "9^{9^8}"),
        ("9^{9^9}", "0"),
        ("(1/3)^{5000}", "0"),
        ("2^{100000}", "2^{100001}"),
        ("18" + "0" * 500, "18"),
        (r"\boxed{18}", "18"),
        (r"e^{-1000}", "0"),
        ("1000!", "1001!"),
        (r"\pi^{500}\pi^{500}", r"\pi^{500}\pi^{501}"),
        ("1e999", "1e998"),
        ("\u0663\u0663", "18"),
    ],
}


@pytest.mark.parametrize("rule", EQUAL)
def test_equal_answers(rule):
    assert [pair for pair in EQUAL[rule] if accuracy_reward(boxed(pair[0]), pair[1]) != 1.0] == []


@pytest.mark.parametrize("rule", DIFFERENT)
def test_different_answers(rule):
    assert [pair for pair in DIFFERENT[rule] if is_equivalent(*pair)] == []


def test_the_tables_are_long():
    assert sum(map(len, EQUAL.values())) >= 150 and sum(map(len, DIFFERENT.values())) >= 100


def test_equality_has_no_direction_but_for_percent():
    for rule in set(EQUAL) - {"percent"}:
        assert [pair for pair in EQUAL[rule] if not is_equivalent(pair[1], pair[0])] == []
    for rule in set(DIFFERENT) - {"percent"}:
        assert [pair for pair in DIFFERENT[rule] if is_equivalent(pair[1], pair[0])] == []


def test_numbers_are_exact():
    assert parse("0.1+0.2") == parse("0.3") == [Fraction(3, 10)] * 3
    assert parse("9007199254740993") != parse("9007199254740992")  # equal as floats
    assert parse("1" * 101) is None and parse("1e9999") is None and parse("1/0") is None


def test_cleaning_is_idempotent():
    for text in (r"$\$1,234.50$.", r"\dfrac{1}{2}", r"\text{ two }", "x = 5", "18 apples"):
        assert clean(clean(text)) == clean(text)


def test_every_rule_has_an_example_that_holds():
    results = doctest.testmod(reward)
    assert results.failed == 0 and results.attempted >= 16


def test_a_group_is_compared_with_a_gold_that_is_parsed_once():
    reward.parse.cache_clear()
    assert [is_equivalent(str(n), r"\frac{36}{2}") for n in range(16)] == [
        False
    ] * 16 and is_equivalent("18", r"\frac{36}{2}")
    assert reward.parse.cache_info().misses == 18  # 17 answers, one gold


# --- restyled answers ---------------------------------------------------------------------------------


def some_answers():
    """A few hundred answers of the forms that competition problems have."""
    rng = random.Random(0)
    forms = [
        r"{a}",
        r"-{a}",
        r"{a}{b},{c}00".replace(",", ""),
        r"\frac{{{a}}}{{{p}}}",
        r"-\frac{{{a}}}{{{p}}}",
        r"{a}.{b}",
        r"{a}^\circ",
        r"\sqrt{{{p}}}",
        r"{a}\sqrt{{{p}}}",
        r"{a} + {b}\sqrt{{{p}}}",
        r"\frac{{{a}\sqrt{{{p}}}}}{{{b}}}",
        r"{a}\pi",
        r"({a},{b})",
        r"({a},-{b},{c})",
        r"[{a},1{b})",
        r"({a},1{b}]",
        r"(-\infty,{a}) \cup ({a},\infty)",
        r"{a}, -{b}",
        r"\{{{a}, -{b}, 1{c}\}}",
        r"{a}x^2 - {b}x + {c}",
        r"x = {a}",
        r"y = {a}x + {b}",
        r"{a}{b}_9",
        r"\text{{(C)}}",
        r"\text{{north}}",
        r"{a} - {b}i",
        r"\begin{{pmatrix}} {a} \\ -{b} \end{{pmatrix}}",
        r"\begin{{pmatrix}} {a} & {b} \\ {c} & {p} \end{{pmatrix}}",
        r"\${a}.{b}0",
        r"{a}\%",
        r"{a} \pm \sqrt{{{p}}}",
        r"{a}\frac{{{b}}}{{1{c}}}",
        r"{a}x - {b}y + {c} = 0",
        r"{a}\text{{ cm}}",
    ]
    numbers = [
        {**dict(zip("abc", rng.sample(range(2, 10), 3))), "p": rng.choice([11, 13, 17])}
        for _ in range(12)
    ]
    return [form.format(**number) for form in forms for number in numbers]


def restyled(answer):
    """Spellings that mean the same as `answer`."""
    yield answer.replace("\\frac", "\\dfrac")
    yield answer.replace("\\frac", "\\tfrac")
    yield re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", answer)
    yield (
        re.sub(r"\\frac\{(\w+)\}\{(\w+)\}$", r"\1/\2", answer)
        if not re.search(r"\d\s*\\frac", answer)
        else answer
    )
    yield (
        answer.replace("(", r"\left(")
        .replace(")", r"\right)")
        .replace("[", r"\left[")
        .replace("]", r"\right]")
    )
    yield f" {answer} ", f"${answer}$", f"\\({answer}\\)", f"{answer}.", f"$ {answer} $."
    comma = re.compile(r", ?(?!\\!|\d{3})")  # but not of thousands
    yield (
        comma.sub(", ", answer),
        comma.sub(",", answer),
        comma.sub(r",\\,", answer),
        answer.replace(" ", "  "),
    )
    yield (
        re.sub(r"(?<=[\d}]) ?([-+=]) ?", r" \1 ", answer),
        answer.replace("-", "\u2212"),
        answer.replace(r"\pi", "\u03c0"),
    )
    yield "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in answer)
    yield (
        answer.replace(r"^\circ", "\u00b0"),
        answer.replace(r"^\circ", r"^{\circ}"),
        answer.replace(r"^\circ", " degrees"),
    )
    yield (
        answer.replace(r"^\circ", ""),
        answer.replace(r"\%", "%"),
        answer.replace(r"\$", ""),
        answer.replace(r"\$", "$"),
    )
    yield (
        re.sub(r"\\text\{(.*?)\}$", r"\\mathrm{\1}", answer),
        re.sub(r"\\text\{(\(?\w+\)?)\}$", r"\1", answer),
    )
    yield re.sub(r"_\{?(\d)\}?$", r"_{\1}", answer), re.sub(r"_\{?(\d)\}?$", r"_\1", answer)
    if re.fullmatch(r"\d+", answer):
        yield (
            f"{int(answer):,}",
            f"{int(answer):,}".replace(",", "{,}"),
            f"{answer}.0",
            f"\\text{{{answer}}}",
            f"{2 * int(answer)}/2",
        )
        yield f"x = {answer}", f"{answer} cm", f"\\${answer}"
    if re.fullmatch(r"\d+\.\d+", answer):
        yield str(Fraction(answer)), f"{answer}0"


def near_misses(answer):
    """What looks like `answer` and means something else."""
    for number in list(re.finditer(r"\d+", answer))[:4]:
        start, end = number.span()
        yield answer[:start] + str(int(number[0]) + 1) + answer[end:]
        if "_" not in answer and number[0] != "0" and answer[start - 1 : start] != ".":
            yield answer[:start] + number[0] + "0" + answer[end:]
    if re.fullmatch(
        r"[-\d.]+|\\frac\{\d+\}\{\d+\}|-\\frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}|\d+\\pi", answer
    ) and answer.strip("0."):
        yield answer[1:] if answer.startswith("-") else "-" + answer
        yield answer + ", 1", answer + " or 1"
        yield f"[{answer}, 99]"
    yield (
        re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\\frac{\2}{\1}", answer),
        answer.replace("\\sqrt", ""),
    )
    if re.fullmatch(r"\\?l?e?f?t?[(\[] ?[^()\[\]]*,[^()\[\]]*[)\]]", answer):
        yield (
            answer.translate(str.maketrans("([", "[(")),
            answer.translate(str.maketrans(")]", "])")),
        )
    if re.fullmatch(r".*_\{?\d\}?", answer):
        yield re.sub(r"_.*", "", answer)


def flat(items):
    return [text for item in items for text in ([item] if isinstance(item, str) else item)]


def test_restyled_answers_are_right_and_near_misses_are_not():
    lines = (
        Path(os.environ["ANSWERS"]).read_text(encoding="utf-8").splitlines()
        if "ANSWERS" in os.environ
        else []
    )
    answers, styles, misses = [json.loads(line)["answer"] for line in lines] or some_answers(), 0, 0
    for answer in answers:
        for text in {answer, *flat(restyled(answer))}:
            assert accuracy_reward(f"so it is {boxed(text)}", answer) == 1.0, (text, answer)
            styles += 1
        for text in {*flat(near_misses(answer))} - {answer}:
            assert accuracy_reward(boxed(text), answer) == 0.0, (text, answer)
            misses += 1
    print(f"{len(answers)} answers: {styles} restylings right, {misses} near misses wrong")
    assert styles > 4 * len(answers) and misses > 2 * len(answers)


def test_no_answer_is_taken_for_another():
    answers = sorted(set(some_answers()))
    values = [parse(clean(answer)) for answer in answers]
    equal = {(a, b) for a in answers for b in answers if a != b and is_equivalent(a, b)}
    # 5 and 5\text{ cm}, 5^\circ or x = 5; percent of the answer as a unit: with the decorations off, all are alike.
    bare = lambda text: re.sub(r"\\text\{ cm\}|\^\\circ|x = |\\%|\\\$|0$", "", text)
    assert values.count(None) <= len(answers) / 10
    assert {pair for pair in equal if bare(pair[0]) != bare(pair[1])} == set()


# --- hostile text -------------------------------------------------------------------------------------

PIECES = (
    r"""\frac \sqrt { } ( ) [ ] \{ \} ^ _ \pm \mp , = < > <= \le \cup \in ! % | & \\ \begin{pmatrix} \end{pmatrix} 1 2 9 99 0 . 1e999 e i
    x y \pi \text{ ~ - + * / \cdot 9^9 10^{100} 100! \infty ^\circ cm and or 1,000 \mathrm $ \left \right \alpha sin \boxed{ </think> <think>
    <answer> </answer> 0.5""".split()
    + [" ", "\n#### ", "\u00bd", "\u00b2", "\uff11", "\u03c0", "\u221a", "\x00", "\ud800", "\u00e9"]
)
TOWERS = r"{ ( [ \{ \frac{ \sqrt{ - 2^ 2^{ (1+ \text{ ! 1, x= 1< x_ \begin{matrix} 9^{9^{ 100!* 2^{999}/3^{500}+ \frac{1}{".split()


def hostile_text(rng, kind):
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(300))).decode("latin-1")
    if kind <= 3:
        return "".join(
            rng.choice(PIECES) for _ in range(rng.randrange(1, rng.choice((8, 40, 120))))
        )
    if kind == 4:
        depth = rng.choice((3, 20, 40, 100, 400))
        return rng.choice(TOWERS) * depth + "1" + rng.choice(["}", ")", "]", r"\}", ""]) * depth
    if kind == 5:
        return "".join(
            rng.choice("0123456789") for _ in range(rng.choice((10, 100, 300, 399)))
        ) + rng.choice(["", "%", "!", "e9", "."])
    if kind == 6:
        return "".join(rng.choice("x1+-*/^(),=") for _ in range(rng.randrange(300)))
    return rng.choice(PIECES) * rng.choice((1, 5, 50, 200, 400))


def cpu_seconds(function, *arguments, tries=3):
    """The least CPU time of a few calls: another process may disturb one of them."""
    best = float("inf")
    for _ in range(tries):
        started = time.process_time()
        function(*arguments)
        best = min(best, time.process_time() - started)
        if best < 0.02:
            break
    return best


def test_fuzzed_text_never_raises_never_hangs_and_earns_zero_or_one():
    rng, golds = random.Random(0), [gold for pairs in EQUAL.values() for _, gold in pairs]
    for number in range(8_000):
        text = hostile_text(rng, number % 8)
        gold = text if rng.random() < 0.3 else rng.choice(golds)
        completion = (
            text * (1_000_000 // max(1, len(text)))
            if number % 200 == 199
            else boxed(text)
            if rng.random() < 0.8
            else text
        )
        assert accuracy_reward(completion, gold) in (0.0, 1.0)
        assert is_equivalent(text, gold) in (False, True) and is_equivalent(gold, text) in (
            False,
            True,
        )
        assert {score for _, score in step_rewards(completion)} <= {0.0, 1.0}
        for function in (
            lambda: accuracy_reward(completion, gold),
            lambda: is_equivalent(text, gold),
        ):
            reward.parse.cache_clear()
            assert cpu_seconds(function) < 0.06, (text[:100], gold)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "{" * 500_000 + "}" * 500_000,
        "\\boxed{" + "{" * 500_000,
        "<answer>" * 100_000,
        "\\boxed" + " " * 1_000_000,
        "<think>" * 100_000,
        "#### " * 200_000,
        "\n#### " * 100_000,
        "1" * 1_000_000,
        "\\boxed{" + "9" * 399 + "}",
        "\\boxed{" + "1," * 199 + "}",
        "\\boxed{" + "\\text{" * 60 + "}" * 60 + "}",
        "\\boxed{" + " " * 390 + "1}",
        "\\boxed{" + "- " * 190 + "1}",
        "\\boxed{9**9**9**9}",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{" + "1/" * 190 + "}",
        "\x00" * 1_000_000,
        "\\boxed{" + "~" * 399 + "}",
        "\\boxed{" + "*".join(["100!"] * 60) + "}",
        "\\boxed{" + "^{\\circ}" * 45 + "}",
        "\\" * 1_000_000,
    ],
)
def test_hostile_text_earns_nothing_and_takes_no_time(text):
    assert accuracy_reward(text, "18") == 0.0
    assert cpu_seconds(accuracy_reward, text, "18") < 0.06
    assert cpu_seconds(step_rewards, text) < 0.2


@pytest.mark.parametrize(
    "text",
    [
        ",".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"),
        "+".join(rf"\frac{{1}}{{{p}}}" for p in range(10007, 10043, 2)),
        "+".join(f"1/{n}!" for n in range(60, 100)),
        "x" * 299,
        "1=1" + "=1" * 140,
        "(" * 38 + "1" + ")" * 38,
        "+".join([r"\pm x"] * 50),
        ",".join(["x"] * 145),
        "/".join(f"{n}^{{99}}" for n in range(101, 132)),
    ],
)
def test_comparing_takes_little_time(text):
    other = ",".join(reversed(text.split(","))) if "," in text else text[:-1] + "7"

    def compare():
        reward.parse.cache_clear()
        is_equivalent(text, other)

    assert cpu_seconds(compare) < 0.06


@pytest.mark.parametrize(
    "text",
    [
        "1" * 1_000_000,
        "1 " * 500_000,
        "1," * 500_000,
        "a" * 1_000_000,
        "1 " + "a" * 1_000_000,
        "\\text{" * 150_000,
        " " * 1_000_000 + "1",
        "$" * 1_000_000,
    ],
)
def test_text_without_end_is_not_even_cleaned(text):
    assert (
        clean(text) == ""
        and cpu_seconds(is_equivalent, text, "1") < 0.06
        and not is_equivalent(text, text)
    )


def test_a_list_that_is_too_long_is_not_compared():
    items = [f"{n}" for n in range(reward.MAX_ITEMS + 1)]
    assert is_equivalent(",".join(items[:-1]), ",".join(reversed(items[:-1])))
    assert not is_equivalent(",".join(items), ",".join(reversed(items)))


def test_brackets_that_are_too_deep_are_not_read():
    assert parse("(" * 20 + "1" + ")" * 20) and parse("(" * 60 + "1" + ")" * 60) is None


# --- rewards ------------------------------------------------------------------------------------------


def test_reward_is_one_or_zero():
    assert accuracy_reward(r"so it is \boxed{18}", "18") == 1.0
    assert accuracy_reward(r"so it is \boxed{19}", "18") == 0.0
    assert accuracy_reward("18", "18") == 0.0
    assert accuracy_reward(r"\boxed{18}", "") == 0.0


@pytest.mark.parametrize("gold", [None, "", " ", ".", "1" * 401, "1" * 301])
def test_a_gold_that_is_missing_empty_or_too_long_is_never_paid(gold):
    for text in (str(gold), "18", "", "None"):
        assert accuracy_reward(boxed(text), gold) == 0.0


@pytest.mark.parametrize("completion", [None, 18, [], {}, b"\\boxed{18}"])
def test_whatever_is_no_text_earns_nothing(completion):
    assert accuracy_reward(completion, "18") == 0.0


def test_a_gold_that_does_not_parse_is_matched_by_its_text():
    assert parse(clean(r"\int_0^1 f \, dx")) is None
    assert accuracy_reward(boxed(r"\int_0^1 f\,dx"), r"\int_0^1 f \, dx") == 1.0
    assert accuracy_reward(boxed(r"\int_0^1 g\,dx"), r"\int_0^1 f \, dx") == 0.0


def test_rewards_of_texts_and_of_chat_messages():
    texts = [boxed("2"), boxed("3"), "2", ""]
    chats = [
        [{"role": "user", "content": boxed("2")}, {"role": "assistant", "content": text}]
        for text in texts
    ]
    for answer in (["2"] * 4, ["1+1=2\n#### 2"] * 4, [2] * 4):
        assert accuracy_rewards(["1+1?"] * 4, texts, answer) == [1.0, 0.0, 0.0, 0.0]
        assert accuracy_rewards(prompts=chats, completions=chats, answer=answer, step=3) == [
            1.0,
            0.0,
            0.0,
            0.0,
        ]
    assert accuracy_rewards(["1+1?"], [[{"role": "assistant", "content": None}]], [None]) == [0.0]
    with pytest.raises(ValueError):
        accuracy_rewards(["1+1?"] * 2, texts[:2], ["2"])  # a gold is missing: no silent cut


def test_the_final_answer_of_a_solution():
    assert (
        final_answer("48/2=24\n#### 24 ") == "24" and final_answer("24") == final_answer(24) == "24"
    )
    assert final_answer(None) == final_answer("work\n#### ") == "" and final_answer(0) == "0"


def test_the_ten_lines_of_the_readme_train_with_trl(tmp_path, monkeypatch):
    """With a small model and a few problems of our own in place of those of the hub."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1].replace(
        '"Qwen/Qwen2.5-0.5B-Instruct"', "MODEL"
    )
    rows = [
        {"question": f"{n}+1?", "answer": f"One more than {n}.\n#### {n + 1}"} for n in range(16)
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    small = dict(
        output_dir=str(tmp_path / "trl"),
        max_completion_length=8,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    monkeypatch.setattr(
        trl, "GRPOConfig", lambda original=trl.GRPOConfig, **given: original(**{**given, **small})
    )
    calls, original = [], reward.accuracy_rewards

    def accuracy_rewards(**arguments):
        calls.append(arguments)
        return original(**arguments)

    monkeypatch.setattr(reward, "accuracy_rewards", accuracy_rewards)
    (tmp_path / "ten_lines.py").write_text(code)
    names = runpy.run_path(
        str(tmp_path / "ten_lines.py"), {"MODEL": str(make_chat_model(tmp_path / "model"))}
    )
    assert names["trainer"].state.global_step == 1 and len(calls) == 1
    assert isinstance(calls[0]["completions"][0], list) and set(calls[0]["answer"]) <= {
        row["answer"] for row in rows
    }
    right = [
        [{"role": "assistant", "content": boxed(answer.split()[-1])}]
        for answer in calls[0]["answer"]
    ]
    assert set(original(**{**calls[0], "completions": right})) == {1.0}
    assert set(original(**calls[0])) <= {0.0, 1.0}


# --- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, steps",
    [
        ("7+5-4=8\n8+3=12\n\\boxed{12}", [(7, 1.0), (14, 0.0)]),
        ("2+2=5", [(5, 0.0)]),
        ("So 2 + 2 = 4.", [(13, 1.0)]),
        ("2 + 2 = 4 apples. And 4*2=9!", [(17, 1.0), (28, 0.0)]),
        ("3 x 4 = 12", [(10, 1.0)]),
        (r"3 \times 4 = 13", [(15, 0.0)]),
        ("3 \u00d7 4 = 12", [(10, 1.0)]),
        (r"12 \div 4 = 3", [(13, 1.0)]),
        ("$5 * 3 = $15 and 15-3=12", [(24, 1.0)]),
        ("$5 * 3 = $15 and 15-3=11", [(24, 0.0)]),  # all of a step's
        ("1,000 + 500 = 1,500", [(19, 1.0)]),
        ("1,000 + 500 = 1,600", [(19, 0.0)]),
        ("5+3=<<5+3=8>>8", [(14, 1.0)]),
        ("48/2 = <<48/2=24>>25", [(20, 0.0)]),
        ("(3 + 4) * 2 = 14", [(16, 1.0)]),
        ("3 + 4 = 14/2 = 7", [(16, 1.0)]),
        ("3 + 4 = 14/2 = 8", [(16, 0.0)]),
        ("5 - 8 = -3", [(10, 1.0)]),
        ("-3+9-4=2", [(8, 1.0)]),
        ("-3+9-4=5", [(8, 0.0)]),
        ("- 5 + 5 = 10", []),
        ("5 x .75 = 3.75", [(14, 1.0)]),
        ("3 cups + 2 cups = 6 cups", [(24, 0.0)]),
        ("1 hour + 30 minutes = 90 minutes", []),
        ("4 apples * $2 + $5 = $13", []),
        ("30% * $2000 + $2000 = $2600", []),
        (r"\frac{1}{2} (4 + 6) = 5", []),
        ("25% of 80 + 20 = 40", []),
        ("19 / 4 = 4 remainder 3", []),
        ("3:30 + 45 = 4:15", []),
        ("2/3 = .667", [(10, 1.0)]),
        ("2.4 + 3 = 5", [(11, 0.0)]),
        ("5 - 8 = 3", [(9, 0.0)]),
        ("10/4 = 2.5", [(10, 1.0)]),
        ("2/3 = 0.67", [(10, 1.0)]),
        ("2/3 = 0.66", [(10, 0.0)]),
        ("200/3 = 67", [(10, 1.0)]),
        ("7/2 = 4", [(7, 1.0)]),
        ("7/2 = 3", [(7, 0.0)]),
        ("0.1 + 0.2 = 0.3", [(15, 1.0)]),
        ("", []),
        ("18", []),
        ("5 = 5", []),
        ("2x + 3 = 7", []),
        ("x = 3 + 4 = 7", []),
        ("1 + 1 = 2 + x", []),
        ("5 + 3 = 8x", []),
        ("f(3) + 2 = 5", []),
        ("x - 3 = 5", []),
        ("40 marbles - 3 - 5 = 32", []),
        ("50% * 20 = 10", []),
        ("1/0 = 5", []),
        ("9^9+1=2", []),
        ("2 + 2 =", []),
        ("= 2 + 2", []),
        ("1 + 1 = 2" + " and so on" * 60, []),
        ("\u4e00\u51713+4=8\u4e2a\u30022+2=4\u3002", [(9, 0.0), (15, 1.0)]),
    ],
)
def test_steps_whose_arithmetic_can_be_checked(text, steps):
    assert step_rewards(text) == steps


def test_steps_end_where_the_text_of_the_step_ends():
    text = "First 3 * 4 = 12. Then we know 3.5 + 1 = 4.5!  \n\nSo\n4 + 4 = 8"
    assert [text[:end][-5:] for end, _ in step_rewards(text)] == ["= 12.", " 4.5!", "4 = 8"]
