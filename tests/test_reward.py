r"""The rule-based reward: text in, 1.0 or 0.0 out.

A line of a table reads `rule: text|text|expected ; text|expected ; ...`, and is a test.
`ANSWERS=math500.jsonl python -m pytest -q -s tests/test_reward.py -k restyled` restyles the answers
of a file (JSON lines with an "answer" in each).
"""

import doctest
import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import adapters
import pytest
from adapters import (
    accuracy_reward,
    accuracy_rewards,
    clean,
    extract_answer,
    is_equivalent,
    value_of,
)
from helpers import forget, make_chat_model

import reward
from eval import make_arithmetic


def each_line(table):
    """Run a test with each line of a table."""
    lines = table.strip().splitlines()
    return pytest.mark.parametrize("line", lines, ids=lambda line: re.sub(r"\W+", "-", line)[:20])


def read_pairs(line):
    """Read `rule: text|text|expected ; ...` as a list of (text, expected)."""
    pairs = []
    for group in line.rpartition(": ")[2].split(" ; "):
        *texts, expected = group.split("|")
        pairs += [(text, expected) for text in texts]
    return pairs


def boxed(text):
    return "\\boxed{" + text + "}"


# --- Extraction: ⏎ is a line break --------------------------------------------------------------

MARKED = r"""
boxes: \boxed{18}.|\boxed{ 18 }|\boxed {18}|\boxed⏎{18}|\fbox{18}|\boxed{\boxed{18}}|18
\boxed{1} or \boxed{2}|\fbox{3} \boxed{1} \fbox{2}|\boxed{2} is \boxed|2
\boxed{\frac{1}{2}}|\frac{1}{2} ; \boxed{\text{a}_{b}} and {|\text{a}_{b}
\boxed{\left\{1,2\right.}|\left\{1,2\right. ; \boxed{3} #### 4|3
tags: <answer> 18 </answer>|18 ; <answer>1</answer> <answer>2</answer>|2
<answer>1</answer> <answer>2|<answer>1</answer></answer>|1 ; <answer>7</answer>⏎#### 8|7
lines: first⏎#### 18|18
#### 18⏎#### Explanation:|18 ; #### yes|yes ; #### 18⏎then⏎#### 1,000⏎|1,000
thoughts: <think>\boxed{1}</think> \boxed{2}|2 ; a</think>b</think>\boxed{3}|3
"""
UNMARKED = r"""18|The answer is 18.|x #### 5|####5|\boxed{18|\boxed{1} \boxed{2|\boxed{}
\boxed{  }|\boxed 18|\boxed{1\}|boxed{18}|#### ⏎|<answer>18|18</answer>
</answer>18<answer>|<think>\boxed{1}|<think>\boxed{1}</think>
<think>a</think>\boxed{1}<think>"""


@each_line(MARKED)
def test_the_marked_answer_is_found(line):
    for completion, answer in read_pairs(line):
        assert extract_answer(completion.replace("⏎", "\n")) == answer


def test_only_a_marked_answer_counts():
    for completion in ["", *re.split(r"\||\n", UNMARKED)]:
        assert extract_answer(completion.replace("⏎", "\n")) is None, completion
    for form in ("\\boxed{%s}", "#### %s"):
        assert extract_answer(form % ("1" * 400)) == "1" * 400
        assert extract_answer(form % ("1" * 401)) is None


# --- Equivalence: the last of a group is the gold answer ----------------------------------------

EQUAL = r"""
numbers: 18|018|+18|18.|18.0|18 ; -18|- 18|-18 ; -0|0 ; 1,000|1{,}000|1\,000|1000 ; 1000|1,000
12345678901234567890123|12345678901234567890123 ; 10,\!080|10080 ; 11,\! 111,\! 100|11111100
1 000 000|1000000 ; 1,234.5|1234.5 ; \frac{1,000}{3}|1000/3 ; \sqrt{1,000}|10\sqrt{10}
spelling: $1,234,567.50$|1234567.5 ; $18|\$18|€18|$\$18$|18$|18\$|18 ; £18.50|18.5 ; -\$5|-5 ; \!7|7
\left(3\right)|(3) ; \(18\)|\[ 18 \]|$18$|１８|\mathbf{18}|18 ; 2\;\cdot\;x|2x
−18|-18 ; x²+x³|x^3+x^2
\boldsymbol{\frac{1}{2}}|\displaystyle\frac12|0.5 ; \{1,\,2\}|\{1,2\} ; 2×x|2·x|2x ; 36÷2|18 ; –3|-3
(1,2)∪(3,4)|(3,4)\cup(1,2) ; x∈[1,2]|[1,2] ; 1 ≤ x|1 \le x ; √10|√(10)|\sqrt{10}
fractions: 0.5|2/4|1/2 ; .5|\frac{1}{2}|\frac12|\frac 1 2|\frac {1} {2}|0.5 ; \tfrac{-1}{2}|-1/2
\dfrac{1}{2}|\frac{1}{2} ; -\frac{1}{2}|\cfrac{1}{-2}|-0.5 ; 0.1|1/10 ; \frac1{72}|1/72 ; 36/2/1|18
\frac{9}4|2.25 ; \frac{\frac{1}{2}}{3}|1/6 ; 1\frac{4}{5}|9/5 ; 1\frac45|1.8 ; 137 \frac{1}{2}|137.5
1 1/2|1.5 ; -1\frac12|-1.5 ; x-1\frac12|x-3/2
percent: 50%|50\text{ percent}|0.5 ; 50\%|0.5|50 percent|50% ; 50%|1/2 ; 50%|x = 50%|50
18 percent|18 ; 12.5 %|12.5\%
arithmetic: 1e9|1000000000 ; 1.5 \times 10^3|1500 ; 6e-5|6 \cdot 10^{-5} ; 2E3|2000 ; 2(x+4)|2x+8
9+9=18|18 = 9+9|18 ; 2^{10}|2^10|1024 ; -3^2|-9 ; (-3)^2|9 ; 2^-3|0.125 ; 2^{3^2}|2^3^2|512
5!|120 ; x-3-4|x-7 ; 2e-1|2e - 1 ; -1+\exp(16)|e^{16}-1 ; \frac{10!}{8!}|90 ; \frac{\tau}{2}|\tau/2
letters: \sqrt{2}|\sqrt2|√2|\sqrt{2} ; \sqrt{12}|2\sqrt{3} ; \sqrt{16}|4 ; \sqrt[3]{-8}|-2 ; 2π|2\pi
\frac{\sqrt{2}}{2}|\frac{1}{\sqrt2} ; \sqrt[3]{16}|2\sqrt[3]{2} ; 2^{1/3}|\sqrt[3]{2} ; 4i+3|3+4i
\sqrt{5}+\sqrt 2|\sqrt{2}+\sqrt{5} ; \frac94\pi|\frac{9\pi}{4} ; i^2|-1 ; \sqrt{-4}|2i ; 1+x|x+1
(x+1)^2|x^2+2x+1 ; x*2|2x ; ba^2|a^{2}b ; \frac{x+2}{7}|\frac{x}{7}+\frac{2}{7} ; x_{1}+1|1+x_1
2\theta|\theta+\theta ; 1-\frac{1}{\mathrm e}|1-\frac1e ; x/2|\frac12 x ; 2xy|2yx
\sqrt{x^3}|x\sqrt{x} ; abc+1|1+cab ; x^{1/2}|\sqrt x
functions: \sin 30^\circ|0.5 ; \ln 2+\ln 5|\ln 10 ; \log_2 8|3 ; \log_{10}1000|3 ; \arctan 1|\pi/4
\ln(10)|ln 10|\ln{10} ; \sin(2x)|\sin 2x ; \binom{5}{2}|{5 \choose 2}|10 ; e^{i\pi/2}|i
brackets: (1,2)|( 1, 2 ) ; \left(1,\frac12\right]|(1, 0.5] ; [1,\infty)|[1,∞) ; (1,234)|(1, 234)
(-\infty,2)\cup(3,\infty)|(3,+\infty)\cup(-\infty,2) ; \langle 1,2\rangle|\langle1, 2\rangle
\left( 3, \frac{\pi}{2} \right)|(3, 0.5π) ; (1,2),(3,4)|(3,4),(1,2) ; 1, 2|2,1 ; 1 and 2|1, 2
1 or 2|2, 1 ; 19, 46, and 82|82,46,19 ; \{2,1\}|1,2 ; 1\text{ and }2|\{1,2\} ; \pm 3|3,-3
1 \pm \sqrt{19}|1-\sqrt{19}, 1+\sqrt{19} ; \{1\pm\sqrt{5},-2\}|-2, 1+\sqrt5, 1-\sqrt5
$5 and $6|6, 5 ; x=\pm 3|-3, 3 ; 1 < x \leq 3|1\lt x \leqslant3
\begin{pmatrix} 1 \\ 2 \end{pmatrix}|\begin{bmatrix}1\\2\\ \end{bmatrix}
\begin{pmatrix} 1/2 & 2 \\ 3 & 4 \end{pmatrix}|\left[\begin{array}{cc}.5&2\\3&4\end{array}\right]
names: x = 5|x=5|Area = 5|\text{Area} = 5|f(2)=5|5 ; 5|x=5 ; x=9+9=18|18 ; \theta = 30|30
f(x)=2x|x+x ; (x,y)=(1,2)|(1, 2) ; x=1 or x=2|2, 1 ; x \in [1,2]|[1,2] ; x_{1} = 3|3 ; x=2_5|2_5
2x+3|y=3+2x|y = 2x + 3 ; x=1, y=2|y=2, x=1 ; x=\log_2 3|\log_2 3 ; 2x - y + 3 = 0|y = 2x+3
x^2/4+y^2/3=1|3x^2+4y^2=12 ; 5x-7y+11z+4=0|-5x+7y=11z+4 ; x > 5|x>5 ; x \ge 5|x ≥ 5
units: 5 sec|5\text{ s}|5 seconds ; 5 kms|5 km ; 5\text{ m/s}|5 meters per second
5 glasses|5 glass
18 dollars|18 apples.|18\text{ cm}|18 ; 18|18 cm ; 18 cm|18\text{ cm} ; 5kg|5\text{ m}|5
18\text{ inches}|18 inch ; 864 \mbox{ inches}^2|864 ; 15 cm^2|15\text{ cm}^{2} ; 10\text{ m/s}|10
60 miles per hour|60 ; 4\pi\text{ cm}|4\pi ; $\frac{1}{2}$ hour|0.5 ; x+1 apples|x+1 ; \$20/hour|20
18 square inches|18\text{ inch}^2 ; 3 cubic meters|3 meter^3 ; １８厘米|18厘米 ; 18 hours|18 hrs
18元|\text{18元}|18 个。|18\text{千克}|¥18|18 ; 864 in^2|864 \mbox{ inches}^2 ; 18/day|18
15\text{ sq. cm}|15\mbox{ cm}^2 ; 60 km/h|60 km per hour|60 ; 60 mph|60 miles per hour
10 sq cm|10\text{ cm}^2 ; 90^\circ|90 degrees|90\degree|90 ; 90|90^{\circ} ; 90°|90^\circ
\frac{270}7\text{ degrees}|\frac{270}{7}^\circ ; 98.6^\circ\text{F}|98.6
words: Yes|yes ; \text{C}|c ; (C)|C ; \textbf{(C)}|\text{C} ; \mathrm{North}|north ; yes.|Yes
\text{even}|Even ; A, B|B and A ; \cot(x)|\cot{x}|\cot x ; 2\ln(3)|2\ln 3 ; 12:30|12:30
\cos(\theta)|\cos\theta ; 2516_8|2516_{8} ; 1011_{\text{two}}|1011_{two}
"""
DIFFERENT = r"""
numbers: 18|19 ; 18|-18 ; 18|18.1 ; 18|180 ; 1800|0.18|118|81|nan|inf|18 ; 0.3333333333|1/3 ; 1/0|0
12345678901234567890124|12345678901234567890123 ; 2/1|1/2 ; \frac{2}{1}|0.5 ; 1/0|1/0.0 ; 1e2|1
22/7|\pi ; x=1000000000001|x=1000000000000 ; 10^{-20}\pi|10^{-21}\pi ; 1 8|1$$8|18/|(18|18)|18
1,00|100 ; 1,0000|10000 ; 1,22|1.22 ; .|%|-|0 ; \frac{1}{2}3|\frac123|1.5 ; \sqrt10|\sqrt{10} ; x1|x
\sqrt[3,4]{8}|²|2 ; 2\frac{3}{2}|3 ; 1°0|1^\circ 0|10 ; 3 125/128|3125/128 ; 3:4|3/4 ; 1000!|1001!
__import__('os')|9**9**9**9|\boxed{18}|٣٣|18 ; 9^{9^9}|9^{9^8} ; 9^{9^9}|(1/3)^{5000}|e^{-1000}|0
2^{100000}|2^{100001} ; \pi^{500}\pi^{500}|\pi^{500}\pi^{501} ; 1e999|1e998
hedges: 18 or 20|17, 18|17, 18, 19|18, 18|18 and 20|not 18|18 \pm 1|[0, 100]|[18]|\{18\}|18;19|18
18-20|18 to 20|18 (or 20)|18\text{ or }20|x=17 or x=18|17=18|x = 17 = 18|x \ge 18|18 ; 18 \pm 0|19
approximately 18|18 ; \sqrt{2}|1.414213562 ; 18 of 20|18 of 21 ; x=1, y=2|x=2, y=1
percent: 50|5000%|0.5%|50% ; 0.5|50 ; 1+50%|51 ; 50, 60%|50, 60 ; 1/50%|1/50 ; 1.000|1000
units: 18 dollars|18 cents ; 5 hours per mile|5 miles per hour ; 3 sq ft per hour|3 hours per sq ft
18 thousand|$18 million|$18$-x|18\text{+x}|18 factorial|18 below zero|18 minus|18 not|18 ; A maybe|A
5 Dozen|$5$ < x|5千|5\text{万元}|5 squared|5 ; 3 x|3\,x|3\text{x}|3 tenths|3 halves|3 ; 5厘米|5千米
$2$\sqrt{x}|$2$ xy|2 sin x|2\mathrm{i}|2 ; 1/sin x|1/\pi|1/x|1 ; 18 miles|18 limes ; 5\text{ m}|5 mm
15 cm|15 cm^2 ; 5 km|5 kilograms ; 5\text{ cm}|5\text{ km} ; 5 cm^3|5\text{ cm}^2 ; yes no|yes
brackets: (2,1)|\{1,2\}|(1,2|(1,2}|(1,2) ; (1,2)|[1,2] ; (1,2]|[1,2) ; (1,2)|1,1,2|1,2 ; 1,2|1,2,3
1,1,2|1,2,2 ; (-\infty,2)|(-\infty,2)\cup(3,4) ; (18}|18 ; (5,\infty)|[5,\infty) ; x<5|x \le 5
x<5|x>5 ; x<5|y<5 ; 1<x>3|3>x<1|(1,3) ; 7 years and 3 months|7 ; 10^{240}*10^{240}|\pi
\begin{pmatrix}1\\2\end{pmatrix}|\begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix}|\begin{pmatrix}1&3\\2&4\end{pmatrix}
done: 9+9|2*9|2(3+6)|7+5-4+10|18 ; 0.25+0.25|1/2 ; 3+\frac12|3.5 ; 1 \pm 2|3,-1
opaque: on|no ; 2ln(4)|ln(8) ; f(2x)|2f(x) ; \phi(3n)|3\phi(n) ; 0.(3)|0 ; 2020-07-04|2020-04-07
2020-07-04|2009 ; tab|bat ; 3-1|2 ; 2:4|1:2 ; 1/0|0/0 ; \frac{d}{dx}x^3|x^2 ; f\circ g|g\circ f
a\times b|b\times a ; 5 lakh|5 qwe|5 more than x|5 tan x|5 ; 2\times 3|6 ; 6!!|720
1, 2, \ldots|1, 2
money: €50|50 cents|50 yen|\$50 ; 5^\circ|\$5|5 hours|5\%|5 cm
spelling: f'(x)+g'(x)|f(x)+g(x) ; 2**3**2|232 ; {1+1 \over 2}|1+\frac12 ; y'|y ; a-b|a.b|ab ; n!|n
twice: \mm 3|3 ; (1 \pm 2, 3)|[1 \pm 2, 3] ; 8 square meters per second|8 meters per square second
logarithms: log x|glo x ; \log 100|\ln 100
symbols: 5\mathbf{j}|5\mathbf{v}|5 ; 5 ms|5\text{ m} ; 3\,125/128|3125/128 ; 2e+1|1+2e5
5\text{ M}|5
near: \pi+10^{-20}|\pi ; \sqrt{10^{30}+1}|10^{15} ; 10^{-30}x+1|1 ; 1-x^{90}|1-x^{91} ; 1/30!|1/31!
letters: \sqrt{2}|2 ; \sqrt{2}|-\sqrt{2} ; 2\sqrt3|\sqrt{6} ; \pi|3.14 ; i|-i ; 2\pi|\pi ; x^2|x^3
\sqrt{x^2}|-x ; x+y|x-y ; a/b|b/a ; x_1|x_2 ; x_{12}|x_{1}2 ; \infty|-\infty ; 2^3|9 ; 18!|18
names: x=5|y=5 ; 2x+3|y=2x+4 ; x=2y+3|y=2x+3 ; 2x+3y=6|2x+3y=7 ; x^3+x=0|x=0 ; x=1|x=1, y=2|1,2
words: Yes|No ; (A)|(B) ; A or B|A ; ACB|ABC ; silent|listen ; \text{none}|0 ; 52_8|52_9 ; 52_8|52
42|52_8 ; \tan x|\cot x ; x=\log_2 3|\log_2 5 ; \ln(2)x|\ln 2x
"""


@each_line(EQUAL)
def test_equal_answers(line):
    for answer, gold in read_pairs(line):
        assert accuracy_reward(boxed(answer), gold) == 1.0, (answer, gold)
        if "%" not in line:  # everything else has no direction
            assert accuracy_reward(boxed(gold), answer) == 1.0, (gold, answer)


@each_line(DIFFERENT)
def test_different_answers(line):
    for answer, gold in read_pairs(line):
        assert is_equivalent(answer, gold) is False, (answer, gold)
        if "%" not in line and not line.startswith("done"):
            assert is_equivalent(gold, answer) is False, (gold, answer)


def test_copying_the_question_earns_nothing():
    """The policy could learn to copy: 7+5-4 has the value that is asked for."""
    problems = make_arithmetic("in")
    assert len(problems) == 1000
    for problem in problems:
        sum_ = problem.question
        for text in (sum_, f"({sum_})", f"x={sum_}", f"\\frac{{{sum_}}}{{1}}", f"{sum_}={sum_}"):
            assert accuracy_reward(boxed(text), problem.answer) == 0.0, text


def test_numbers_are_exact():
    assert value_of("0.1+0.2") == value_of("0.3") == [Fraction(3, 10)] * 3
    assert value_of("9007199254740993") != value_of("9007199254740992")  # equal as floats
    assert value_of("10^{2000}") is value_of("1e9999") is value_of("1/0") is None


def test_what_does_not_parse_is_matched_by_its_text():
    assert value_of(clean(r"\int_0^1 f \, dx")) is None
    assert accuracy_reward(boxed(r"\int_0^1 f\,dx"), r"\int_0^1 f \, dx") == 1.0
    assert accuracy_reward(boxed(r"\int_0^1 g\,dx"), r"\int_0^1 f \, dx") == 0.0


def test_every_rule_has_an_example_that_holds():
    failed, attempted = doctest.testmod(reward)
    assert failed == 0
    assert attempted >= 20


def test_a_group_is_compared_with_a_gold_that_is_parsed_once():
    reward.value_of.cache_clear()
    reward.is_equivalent.cache_clear()
    assert [n for n in range(20) if is_equivalent(str(n), r"\frac{36}{2}")] == [18]
    assert reward.value_of.cache_info().misses == 21  # 20 answers, one gold


# --- Restyled answers ---------------------------------------------------------------------------

FORMS = r"""<a>  -<a>  <a><b><c>00  \frac{<a>}{<p>}  -\frac{<a>}{<p>}  <a>.<b>  <a>^\circ  <a>\%
\sqrt{<p>}  <a>\sqrt{<p>}  <a> + <b>\sqrt{<p>}  \frac{<a>\sqrt{<p>}}{<p>}  <a>\pi  (<a>,<b>)
(<a>,-<b>,<c>)  [<a>,1<b>)  (<a>,1<b>]  (-\infty,<a>) \cup (<a>,\infty)  <a>, -<b>  <a>\text{ cm}
\{<a>, -<b>, 1<c>\}  <a>x^2 - <b>x + <c>  x = <a>  y = <a>x + <b>  <a><b>_9  \text{(C)}
\begin{pmatrix} <a> \\ -<b> \end{pmatrix}  \begin{pmatrix} <a> & <b> \\ <c> & <p> \end{pmatrix}
<a> - <b>i  \$<a>.<b>0  <a> \pm \sqrt{<p>}  <a>\frac{<b>}{<p>}  <a>x - <b>y + <c> = 0"""
MISSES = r"\\frac\{(\d+)\}\{(\d+)\} | \\frac{\2}{\1} ; \\sqrt | ∅ ; _\{?\d\}?$ | ∅"
# Patterns and what replaces them; ␣ is a space, ∅ is nothing. A comma of thousands stays.
RESTYLINGS = r"""\\frac | \\dfrac ; \\frac | \\tfrac ; \\frac\{(\d)\}\{(\d)\} | \\frac\1\2
(?<![\d ])\\frac\{(\w+)\}\{(\w+)\}$ | \1/\2 ; [(\[] | \\left\g<0> ; [)\]] | \\right\g<0> ; ␣ | ␣␣
, ?(?!\\!|\d{3}) | ,␣ ; , ?(?!\\!|\d{3}) | , ; , ?(?!\\!|\d{3}) | ,\\, ; - | − ; \\pi | π
(?<=[\d}]) ?([-+=]) ? | ␣\1␣ ; \\% | % ; \\\$ | ∅ ; \\\$ | $ ; ^(\d+\.\d+)$ | \g<1>0
\^\\circ | ° ; \^\\circ | ^{\\circ} ; \^\\circ | ␣degrees ; \^\\circ | ∅ ; ^(.*)$ | $␣\1␣$.
\\text\{(.*?)\}$ | \\mathrm{\1} ; \\text\{(\(?\w+\)?)\}$ | \1 ; ^(.*)$ | \\(\1\\) ; ^(.*)$ | \1.
_\{?(\d)\}?$ | _{\1} ; _\{?(\d)\}?$ | _\1 ; ^(.*)$ | ␣\1␣ ; ^(.*)$ | $\1$
^(\d+)$ | x␣=␣\1 ; ^(\d+)$ | \1␣cm ; ^(\d+)$ | \\$\1 ; ^(\d+)$ | \1.0 ; ^(\d+)$ | \\text{\1}"""


def some_answers(count):
    """Answers of the forms that competition problems have, `count` of each."""
    rng = random.Random(0)
    answers = []
    for form in re.split(r"  |\n", FORMS):
        for _ in range(count):
            a, b, c = rng.sample("23456789", 3)
            answer = form.replace("<a>", a).replace("<b>", b).replace("<c>", c)
            answers.append(answer.replace("<p>", rng.choice(["11", "13", "17"])))
    return answers


def rewrite(answer, rules):
    """Apply each rule to the answer: a set of texts."""
    texts = set()
    for rule in re.split(r" ; |\n", rules):
        pattern, new = rule.replace("␣", " ").replace("∅", "").split(" | ")
        texts.add(re.sub(pattern, new, answer))
    return texts


def restyled(answer):
    """Spellings that mean the same as `answer`."""
    texts = rewrite(answer, RESTYLINGS)
    texts.add("".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in answer))  # fullwidth
    if re.fullmatch(r"\d+(\.\d+)?", answer):
        number = Fraction(answer)
        whole = f"{float(answer):,}".removesuffix(".0")  # 1,000
        texts |= {str(number), f"{2 * number}/2", whole, whole.replace(",", "{,}")}
    return texts


def near_misses(answer):
    """What looks like `answer` and means something else."""
    texts = rewrite(answer, MISSES)
    for number in list(re.finditer(r"\d+", answer))[:4]:
        before = answer[: number.start()]
        after = answer[number.end() :]
        texts.add(before + str(int(number[0]) + 1) + after)
        if "_" not in answer and number[0] != "0" and before[-1:] != ".":
            texts.add(before + number[0] + "0" + after)
    if re.fullmatch(r"-?[1-9][\d.]*|-?\\frac\{\d+\}\{\d+\}|\d*\\sqrt\{\d+\}|\d+\\pi", answer):
        texts.add(f"-{answer}".removeprefix("--"))
        texts |= {answer + ", 1", answer + " or 1", f"[{answer}, 99]"}
    if re.fullmatch(r"(\\left)?[(\[] ?[^()\[\]]*,[^()\[\]]*[)\]]", answer):
        texts |= {answer.replace(*brackets) for brackets in ("([", "[(", ")]", "])")}
    return texts - {answer}


def test_restyled_answers_are_right_and_near_misses_are_not():
    answers = some_answers(count=12)
    if "ANSWERS" in os.environ:
        lines = Path(os.environ["ANSWERS"]).read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line)["answer"] for line in lines]
    styles = [(text, answer) for answer in answers for text in restyled(answer)]
    misses = [(text, answer) for answer in answers for text in near_misses(answer)]
    for text, answer in styles:
        assert accuracy_reward(f"so it is {boxed(text)}", answer) == 1.0, (text, answer)
    for text, answer in misses:
        assert accuracy_reward(boxed(text), answer) == 0.0, (text, answer)
    print(f"{len(answers)} answers: {len(styles)} styles are right, {len(misses)} misses are wrong")
    assert len(styles) > 4 * len(answers)
    assert len(misses) > 2 * len(answers)


def understood(text):
    """Tell whether every part of an answer has a value."""
    text, _ = reward._split_unit(reward._split_name(clean(text))[1])
    kind, items = reward._structure(text)
    return all(map(understood, items)) if kind else all(map(value_of, text.split("=")))


def test_no_answer_is_taken_for_another():
    answers = sorted(set(some_answers(count=6)))
    assert [understood(answer) for answer in answers].count(False) <= len(answers) / 10
    # 5 may equal 5\text{ cm}, 5^\circ, x = 5 or 5\%, which are alike without their decorations.
    bare = [re.sub(r"\\text\{ cm\}|\^\\circ|x = |\\%|\\\$|0$", "", answer) for answer in answers]
    for i, answer in enumerate(answers):
        for j in range(i):
            if bare[i] != bare[j]:
                assert not is_equivalent(answer, answers[j]), (answer, answers[j])


# --- Hostile text -------------------------------------------------------------------------------

PIECES = r"""\frac \sqrt { } ( ) [ ] \{ \} ^ _ \pm \mp , = < > <= \le \cup \in ! % | & \\ 1 2 9 99 0
. \begin{pmatrix} \end{pmatrix} 1e999 e i x y \pi \text{ ~ - + * / \cdot 9^9 10^{100} 100! \infty
^\circ cm and or 1,000 \mathrm $ \left \right \alpha sin \boxed{ </think> <think> <answer>
</answer> 0.5 ½ ² １ π √ é"""
TOWERS = r"""{ ( [ \{ \frac{ \sqrt{ - 2^ 2^{ (1+ \text{ ! 1, x= 1< x_ \begin{matrix} 9^{9^{ 100!*
2^{999}/3^{500}+ \frac{1}{"""


def hostile_text(rng, kind):
    pieces = [*PIECES.split(), " ", "\n#### ", "\x00", "\ud800"]
    if kind == 0:
        return "".join(map(chr, rng.choices(range(256), k=rng.randrange(300))))
    if kind <= 3:
        return "".join(rng.choices(pieces, k=rng.randrange(1, rng.choice((8, 40, 120)))))
    if kind == 4:
        depth = rng.choice((3, 20, 40, 100, 400))
        closing = rng.choice(["}", ")", "]", r"\}", ""])
        return rng.choice(TOWERS.split()) * depth + "1" + closing * depth
    if kind <= 6:
        text = "".join(rng.choices(("0123456789", "x1+-*/^(),=")[kind - 5], k=rng.randrange(400)))
        return text + rng.choice(["", "%", "!", "e9", "."])
    return rng.choice(pieces) * rng.choice((1, 5, 50, 200, 400))


def cpu_seconds(function, *arguments):
    """Return the least CPU time of three fresh calls: another process may disturb one of them."""
    times = []
    while len(times) < 3 and min(times, default=1.0) > 0.02:
        forget()
        started = time.process_time()
        function(*arguments)
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("count", [4_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_fuzzed_text_never_raises_never_hangs_and_earns_zero_or_one(count):
    rng = random.Random(count)
    golds = re.split(r"\|| ; |\n", EQUAL)
    for number in range(count):
        text = hostile_text(rng, number % 8)
        gold = text if rng.random() < 0.3 else rng.choice(golds)
        completion = boxed(text) if rng.random() < 0.8 else text
        if number % 200 == 199:
            completion = text * (1_000_000 // max(1, len(text)))
        assert cpu_seconds(accuracy_reward, completion, gold) < 0.06, (text[:100], gold)
        assert accuracy_reward(completion, gold) in (0.0, 1.0)
        assert is_equivalent(text, gold) in (False, True)
        assert {earned for _, earned in adapters.step_rewards(completion)} <= {0.0, 1.0}


REPEATED = r"\boxed{ <answer> <think> #### 1 1, 1/ - 100!* ^{\circ} \ $ a ~ { \text{ \frac{ 9^{"


def test_hostile_text_earns_nothing_and_takes_no_time():
    texts = ["{" * 500_000 + "}" * 500_000, boxed("\\text{" * 60 + "}" * 60)]
    for piece in ["\x00", "\n#### ", "1 ", " ", *REPEATED.split()]:
        endless = piece * 200_000 + "1"
        assert clean(endless) == ""
        assert cpu_seconds(is_equivalent, endless, "1") < 0.06, piece
        texts += [boxed(piece * (390 // len(piece)) + "1"), "\\boxed" + endless]
        texts += [endless, "\\boxed{" + endless]
    for text in texts:
        assert accuracy_reward(text, "18") == 0.0
        assert cpu_seconds(accuracy_reward, text, "18") < 0.06, text[:20]
        assert cpu_seconds(adapters.step_rewards, text) < 0.2, text[:20]


def test_comparing_takes_little_time():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"
    pairs = [(",".join(letters), ",".join(reversed(letters)))]
    pairs.append(("+0,".join(letters), "*1,".join(reversed(letters))))
    texts = ["x" * 298, "1=" * 141, r"\pm x+" * 49, "x," * 149, "(" * 38 + "1" + ")" * 38 + "+"]
    texts.append("".join(rf"\frac{{1}}{{{p}}}+" for p in range(10007, 10043, 2)))
    texts.append("".join(f"1/{n}!+" for n in range(60, 100)))
    texts.append("".join(f"{n}^{{99}}/" for n in range(101, 132)))
    for text, other in pairs + [(text + "1", text + "7") for text in texts]:
        assert cpu_seconds(is_equivalent, text, other) < 0.06, text[:20]


def test_lists_and_depth_are_bounded():
    items = [f"{n}" for n in range(reward.MAX_ITEMS + 1)]
    assert is_equivalent(",".join(items[:-1]), ",".join(reversed(items[:-1])))
    assert not is_equivalent(",".join(items), ",".join(reversed(items)))
    assert value_of(r"\sqrt{" * 10 + "1" + "}" * 10)
    assert value_of(r"\sqrt{" * 60 + "1" + "}" * 60) is None


# --- Rewards ------------------------------------------------------------------------------------


def test_what_is_missing_too_long_or_no_text_earns_nothing():
    for gold in (None, "", " ", ".", "1" * 401, "1" * 301):
        for text in (str(gold), "18", "", "None"):
            assert accuracy_reward(boxed(text), gold) == 0.0, (text, gold)
    for completion in (None, 18, [], {}, b"\\boxed{18}", "18", boxed("")):
        assert accuracy_reward(completion, "18") == 0.0, completion


def test_rewards_of_texts_and_of_chat_messages():
    texts = [boxed("2"), boxed("3"), "2", ""]
    asked = {"role": "user", "content": boxed("2")}
    chats = [[asked, {"role": "assistant", "content": text}] for text in texts]
    for answer in ("2", "1+1=2\n#### 2", 2):
        for completions in (texts, chats):
            found = accuracy_rewards(prompts=chats, completions=completions, answer=[answer] * 4)
            assert found == [1.0, 0.0, 0.0, 0.0]
    assert accuracy_rewards(["1+1?"], [[{"content": None}]], [None], step=3) == [0.0]
    with pytest.raises(ValueError):
        accuracy_rewards(["1+1?"] * 2, texts[:2], ["2"])  # a gold is missing: no silent cut


def test_the_final_answer_of_a_solution():
    assert (
        adapters.final_answer("48/2=24\n#### 24 ")
        == adapters.final_answer("24")
        == adapters.final_answer(24)
        == "24"
    )
    assert adapters.final_answer("#### 1\n#### 2") == "2"
    assert adapters.final_answer(None) == adapters.final_answer("work\n#### ") == ""
    assert adapters.final_answer(0) == "0"


def test_a_reward_of_ones_own_is_loaded_and_asked(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def same(prompts, completions, answer):\n    return answer\n")
    same = adapters.load_reward(f"{path}:same")
    assert adapters.ask_reward(same, ["q"] * 2, ["a"] * 2, ["0.5", -1e20]) == [0.5, -1e20]
    with pytest.raises(reward.InputError, match="want 2 finite numbers"):
        adapters.ask_reward(same, ["q"] * 2, ["a"] * 2, [1.0, 1e39])  # inf in float32
    assert adapters.load_reward("") is reward.accuracy_rewards


def test_trl_takes_our_reward(tmp_path):
    """One step of its trainer, with a small model: it asks accuracy_rewards about our problems."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+1?"}], "answer": str(n + 1)}
        for n in range(16)
    ]
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_completion_length=8,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        model=str(make_chat_model(tmp_path / "model")),
        reward_funcs=accuracy_rewards,
        train_dataset=datasets.Dataset.from_list(rows),
        args=settings,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert 0 <= trainer.state.log_history[0]["rewards/accuracy_rewards/mean"] <= 1


# --- Steps that can be checked: each ends at a mark, ✓ if right and ✗ if wrong ------------------

STEPS = r"""
7+5-4=8✓⏎8+3=12✗⏎\boxed{12}|2+2=5✗|So 2 + 2 = 4.✓|2 + 2 = 4 apples.✓ And 4*2=9!✗|3 x 4 = 12✓|18
3 \times 4 = 13✗|3 × 4 = 12✓|12 \div 4 = 3✓|$5 * 3 = $15 and 15-3=12✓|$5 * 3 = $15 and 15-3=11✗
1,000 + 500 = 1,500✓|1,000 + 500 = 1,600✗|5+3=<<5+3=8>>8✓|48/2 = <<48/2=24>>25✗|(3 + 4) * 2 = 14✓
3 + 4 = 14/2 = 7✓|3 + 4 = 14/2 = 8✗|5 - 8 = -3✓|-3+9-4=2✓|-3+9-4=5✗|- 5 + 5 = 10|5 x .75 = 3.75✓
3 cups + 2 cups = 6 cups✗|1 hour + 30 minutes = 90 minutes|4 apples * $2 + $5 = $13|3:30 + 45 = 4:15
30% * $2000 + $2000 = $2600|\frac{1}{2} (4 + 6) = 5|25% of 80 + 20 = 40|19 / 4 = 4 remainder 3|5 = 5
2/3 = .667✓|2.4 + 3 = 5✗|5 - 8 = 3✗|10/4 = 2.5✓|2/3 = 0.67✓|2/3 = 0.66✗
1/3 = 0✗|-5/2 = -3✓|5/2 = 3✓|200/3 = 67✓|7/2 = 4✓|1/0 = 5
7/2 = 3✗|0.1 + 0.2 = 0.3✓|2x + 3 = 7|x = 3 + 4 = 7|1 + 1 = 2 + x|5 + 3 = 8x|f(3) + 2 = 5|x - 3 = 5
40 marbles - 3 - 5 = 32|50% * 20 = 10|9^9+1=2|2 + 2 =|= 2 + 2|一共3+4=8个。✗2+2=4。✓
First 3 * 4 = 12.✓ Then we know 3.5 + 1 = 4.5!✓  ⏎⏎So⏎4 + 4 = 8✓
"""


@each_line(STEPS)
def test_steps_whose_arithmetic_can_be_checked(line):
    for marked in ["", *line.replace("⏎", "\n").split("|")]:
        marks = enumerate(re.finditer("[✓✗]", marked))
        steps = [(mark.start() - k, float(mark[0] == "✓")) for k, mark in marks]
        assert adapters.step_rewards(re.sub("[✓✗]", "", marked)) == steps, marked
