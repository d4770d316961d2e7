"""Worked pairs of answers, the normal form, boxes, and texts meant to hang a grader."""

import multiprocessing
import subprocess
import sys
import threading
import time
from math import isqrt
from pathlib import Path

import pytest

from grpo_core.grading import _evaluation, _structure
from grpo_core.grading.answers import answers_match, extract_boxed_answer, is_right, normalize_answer
from grpo_core.grading.rewards import question_only_reward_fn, r1_zero_reward_fn

EQUAL = {
    "integers": [
        ("37", "37"), (" 37 ", "37"), ("37", 37), ("037", "37"), ("+5", "5"), ("-0", "0"), ("−5", "-5"),
        ("３７", "37"),
        ("37.", "37"), ("{37}", "37"), ("--5", "5"), ("–5", "-5"),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
    "decimals": [
        ("3.0", "3"), (".5", "0.5"), ("0.50", ".5"), ("5.", "5"), ("0.5", 0.5), ("1.5e3", "1500"), ("2E-3", "0.002"),
        (1e-7, "0.0000001"), (r"1.5 \times 10^{3}", "1500"), (r"3 \cdot 10^{-2}", "0.03"), ("-0.25", r"-\frac14"),
        (r"0.\overline{3}", r"\frac{1}{3}"), (r"0.1\overline{6}", "1/6"), ("3.0", 3), (True, "True"),
    ],
    "fractions": [
        (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", r"\tfrac{1}{2}"), (r"\frac12", "1/2"),
        (r"\tfrac 1 2", "1/2"), (r"\frac1{2}", "1/2"), (r"\frac{1}2", "1/2"), ("1 / 2", "1/2"),
        (r"\cfrac{2}{4}", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", r"-\frac{1}{2}"), (r"\frac{14}{3}", "14/3"),
        ("½", "1/2"), (r"\frac{x}{\frac{1}{2}}", "2x"),
        (r"1\frac{1}{2}", r"\frac{3}{2}"), ("1 1/2", "1.5"), (r"-1\frac{1}{2}", "-3/2"),
        (r"\left(\frac{1}{2}\right)", "1/2"), (r"1 \div 2", "1/2"), ("6/3", "2"), ("3⁄4", "0.75"), ("1½", "1.5"),
        (r"\frac{\text{1}}{2}", "0.5"), ("2/1", "2"),
    ],
    "thousands": [
        ("1,234", "1234"), ("1,234,567", "1234567"), ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"1\,234", "1234"),
        ("1 234 567", "1234567"), ("1,234.5", "1234.5"), ("-1,234", "-1234"), ("10,000", r"10^4"), ("1,234", 1234),
        (r"11,\! 111,\! 111,\! 100", "11111111100"), (r"1,\! 000", "1000"), (r"5\! 0", "50"), (r"-\!5", "-5"),
        (r"\sin\!x", r"\sin x"), (r"2 , \! 3", "2,3"),
        ("100, 200, 300", "100,200,300"), ("x = 1,000", "1000"), ("1,000, 2,000", "2000, 1000"),
    ],
    "currency": [
        (r"\$1,234.50", "1234.5"), ("$5", "5"), (r"\$5", "5 dollars"), ("5€", "5"), ("£5", "5"), (r"-\$5", "-5"),
        (r"$\$5$", "5"), (r"5\$", "$5"), (r"\$5.00", 5), (r"\textdollar 5", "5"),
        ("25¢", "25"), ("25¢", "25 cents"), ("₹5", "5"), ("₹5", "5 rupees"), ("US$5", "5"), (r"US\$5", r"\$5"),
        (r"\text{\$}5", "5"), (r"5\text{\%}", r"5\%"),
    ],
    "percent": [
        (r"50\%", "50"), ("50%", r"50\%"), ("50 percent", "50%"), (r"$12.5\%$", "12.5"), (r"\frac{1}{2}\%", "0.5"),
    ],
    "degrees": [
        (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("90°", "90"), ("90 degrees", r"90^\circ"), (r"90\degree", "90"),
        (r"20^\circ\text{C}", "20"), (r"\sin 60^\circ", r"\frac{\sqrt3}{2}"),
        (r"\cos(45^\circ)", r"\frac{1}{\sqrt{2}}"),
    ],
    "units": [
        ("2/3 pounds", "2/3"), ("1/2 cup", "0.5"), ("37°C", "37"), ("8:30 AM", "8:30"),
        (r"10 \text{ cubic centimeters}", "10 cm^3"),
        (r"5 \text{ cm}", "5"), ("5 cm", "5"), ("5cm", r"5\text{ centimeters}"), (r"5\,\mathrm{cm}^2", "5"),
        (r"5\,m", "5"),
        (r"10 \text{ square inches}", "10"), ("10 square inches", r"10 \text{ in}^2"), ("60 miles per hour", "60"),
        (r"3\text{ m/s}", "3"), ("37 apples", "37"), (r"\frac{1}{2}\text{ hour}", "0.5"), (r"\text{5 cm}", "5"),
        (r"12 \mbox{ feet}", "12 ft"), (r"2\pi \text{ cm}", r"2\pi"), ("x = 5 meters", "5"), ("1,200 km", "1200"),
        (r"\left(5\right)\text{ units}", "5"),
        ("5 mph", "5 miles per hour"), ("5 mph", "5 miles/hour"), ("5 km/h", "5 kilometers per hour"),
        (r"5 \text{ meters per second}", "5 m/s"), ("5 months", "5"), ("5 pairs", "5"), ("9 squares", "9"),
        ("5 sq ft", "5 ft^2"), ("5 sq. ft.", r"5\text{ ft}^2"), ("5 cu in", "5 in^3"), ("5 sq ft", "5 square feet"),
    ],
    "wrappers": [
        ("$37$", "37"), ("$$37$$", "37"), (r"\(37\)", "37"), (r"\[37\]", "37"), (r"\boxed{37}", "37"),
        (r"\fbox{37}", "37"),
        (r"$\boxed{\frac{1}{2}}$.", "1/2"), (r"\text{37}", "37"), (r"\displaystyle\frac{1}{2}", "1/2"),
        (r"\mathbf{37}", "37"),
        (r"{\bf 37}", "37"), (r"\bf{37}", "37"), (r"{\rm 37}", "37"),
        ("37 .", "37"), (r"\ 37~", "37"), ("\n37\t", "37"), ("**37**", "37"), (" **37**.\n", "37"), ("**$37$**", "37"),
        (r"**\boxed{37}**", "37"),
    ],
    "ordinals": [
        ("13th", "13"), ("13^{th}", "13"), (r"13^\text{th}", "13"), (r"$13^{\text{th}}$", 13), ("1st", "1^{st}"),
        ("22nd", "22"), (r"3\textsuperscript{rd}", "3"),
    ],
    "spellings of one number": [
        ("74/2", "37"), (r"\frac{6}{3}", "2"), (r"-\frac{6}{3}", "-2"), ("-(-37)", "37"), ("(37)", "37"),
        ("2^{10}", "1024"), ("(-2)^{3}", "-8"), (r"\frac{1}{2^{10}}", r"\frac{1}{1024}"), ("2^{10}/3", "1024/3"),
        (r"-3.7\times10^{1}", "-37"), ("1.5e3", r"1.5\times10^3"), ("1.5e3 cm", "3000/2"),
        ("2^{10}", r"\frac{2048}{2}"), ("(74/2, 2^3)", "(37, 8)"),
    ],
    "no plain numbers": [
        ("35+2", "2+35"), ("35+2", "35 + 2"), (r"1+\sqrt{2}", r"\sqrt2+1"), ("3+4i", "4i+3"), ("x+2+3", "x+5"),
        (r"\frac{1+\sqrt{5}}{2}", r"\frac12+\frac{\sqrt5}{2}"), ("0+37i", "37i"),
        (r"\infty - \infty", r"\infty-\infty"),
        (r"5\cdot 7", "7*5"),
    ],
    "inequalities and intervals": [
        (r"x \ge 5", r"[5,\infty)"), (r"-3\le x\le 3", "[-3,3]"), ("x<2", r"(-\infty,2)"), ("5 < x", r"(5,+\infty)"),
        (r"x \le 2", r"(-\infty,2]"), ("2 > x > 1", "(1,2)"), (r"1 < x \le 2", "(1,2]"), (r"1 \le x < 2", "[1,2)"),
        (r"x_1 > \frac{1}{2}", r"(0.5,\infty)"), (r"\theta > 0", r"(0,\infty)"), ("1<x<2", r"x \in (1,2)"),
        ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"), (r"x\le 1\text{ or }x\ge 2", r"x \in [2,\infty)\cup(-\infty,1]"),
    ],
    "labels": [
        ("(x, y) = (3, 4)", "(3,4)"), ("f^{-1}(x)=x+1", "x+1"), (r"\text{Area} = 6\pi", r"6\pi"), ("AB = 5", "5"),
        (r"\angle ABC = 30^\circ", "30"),
        ("x=5", "5"), ("x = 5", "x=5"), ("5=x", "x=5"), (r"\theta = \frac{\pi}{2}", r"\pi/2"), ("f(x) = 2x", "2x"),
        ("x_1 = 3", "3"), (r"x \in [1,2]", "[1,2]"), ("y = 2x + 3", "2x+3"), (r"n=\boxed{5}", "5"), ("A'=3", "3"),
    ],
    "tuples and intervals": [
        ("(1,2)", "(1, 2)"), (r"\left(1, 2\right)", "(1,2)"), (r"(\frac12, 3)", "(0.5,3)"), ("[1,2)", "[1, 2.0)"),
        (r"(-\infty, 3]", r"(-\infty,3]"), (r"(-∞, 3]", r"\left(-\infty, 3\right]"), (r"(0, +\infty)", r"(0,\infty)"),
        (r"[0,1] \cup [2,3]", r"[2,3]\cup[0,1]"), ("(1,2) ∪ (3,4)", r"(3,4) \cup (1,2)"),
        (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"),
        ("(x, y) = (1, 2)", "(x,y)=(1,2)"), (r"(3,\frac{\pi}{2})", r"(3,\pi/2)"), ("((1,2),3)", "((1, 2), 3)"),
        ("(1,234)", "(1, 234)"), (r"\bigl[1, 2\bigr]", "[1,2]"), ("(1;2)", "(1,2)"),
    ],
    "sets and lists": [
        (r"\{1,2\}", r"\{2,1\}"), (r"\left\{1, 2\right\}", r"\{1,2\}"), (r"\{1,1,2\}", r"\{1,2\}"),
        (r"\{\}", r"\emptyset"),
        (r"\varnothing", "∅"), ("1,2", "2, 1"), ("x=1, x=2", "x=2, x=1"), ("x=1 or x=2", "1, 2"), ("1 and 2", "1,2"),
        (r"1 \text{ or } 2", "2,1"), (r"\pm 2", "2, -2"), (r"1 \pm \sqrt{2}", r"1-\sqrt2, 1+\sqrt2"),
        (r"\lbrace 1,2\rbrace", r"\{1,2\}"),
        (r"\{1,2\}", "1,2"), ("1, 2, and 3", "1,2,3"), (r"\{(1,2),(3,4)\}", r"\{(3,4),(1,2)\}"), ("±3", r"\pm3"),
    ],
    "radicals": [
        (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt2", r"\sqrt{2}"), ("√2", r"\sqrt{2}"), ("sqrt(8)", r"2\sqrt 2"),
        ("2√10", r"\sqrt{40}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt[3]{8}x", "2x"), (r"x\sqrt[3]{-8}", "-2x"),
        (r"\sqrt{4}x", "2x"),
        (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"), (r"2^{1/2}", r"\sqrt{2}"),
        (r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\sqrt{3}"),
    ],
    "expressions": [
        (r"x^2\frac{1}{2}", r"\frac{x^2}{2}"),
        (r"2\frac{\pi}{3}", r"\frac{2\pi}{3}"), (r"\frac\pi 2", r"\pi/2"),
        (r"2\overline{AB}", r"\overline{AB} \cdot 2"), ("(-1)^{3}", "-1"),
        ("1^{999999}", "1"), (r"\lceil 2.5 \rceil x", "3x"), (r"\frac{1}{3}\pi r^2 h", r"\frac{\pi r^2 h}{3}"),
        ("1+\\sqrt{2}i", r"1+i\sqrt2"),
        ("x+1", "1+x"), ("2x", "2*x"), (r"2 \cdot x", "2x"), ("2 x", "2x"), ("xy", "yx"), ("(x+1)^2", "x^2+2x+1"),
        ("x²", "x^2"),
        (r"\frac{x}{2}", "x/2"), (r"\frac{1}{2}x", "0.5x"), ("1/2x", r"\frac{x}{2}"), ("x^10", "x^{10}"),
        ("x**2", "x^2"),
        (r"\frac{\pi}{2}", "pi/2"), (r"2\pi r", r"2 r \pi"), ("10^{5}", "100000"), ("10^5", "100,000"),
        (r"2^{-1}", "1/2"),
        ("e^{2}", "e^2"), (r"\ln(e^2)", r"\log_2 4"), (r"\log_2 (8)x", "3x"), (r"\log_{10}{100}", r"\sqrt{4}"),
        ("5!x", "120x"), (r"\binom{5}{2}x", "10x"), ("5!", r"\binom{120}{1}"),
        (r"\sin^2 x + \cos^2 x", r"\frac{x}{x}"), (r"\sin 2x", r"2 \sin x \cos x"), ("|x|", r"\lvert x \rvert"),
        ("|-3|x", "3x"), (r"\lfloor 2.5 \rfloor x", "2x"), ("-(x-1)", "1-x"), ("i^2", "i^6"),
        (r"\frac{x^2-1}{x-1}", "x+1"),
        ("a_1+a_{2}", "a_2 + a_1"),
        (r"\alpha\beta", "βα"), ("(a+b)(a-b)", "a^2-b^2"), ("2^{2024}", r"4^{1012}"),
        (r"\overline{AB}", r"\overline{AB}"),
    ],
    "equations": [
        ("y = 2x + 3", "2x - y + 3 = 0"), ("x + y = 5", "5 = y + x"), ("2x + 1 = 11", "x - 5 = 0"), ("x > 5", "5 < x"),
        (r"x \geq 5", "5 ≤ x"), (r"1 < x \leq 2", r"2 \ge x > 1"), (r"x \neq 1", r"x\ne 1"),
        ("x<1 or x>2", "x>2 or x<1"),
    ],
    "matrices": [
        (r"\begin{pmatrix} 0 & 1 \\ -1 & 0 \end{pmatrix}",
         r"\left(\begin{array}{cc} 0 & 1 \\ -1 & 0\end{array}\right)"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix} \frac12 \\ 0 \end{pmatrix}", r"\begin{bmatrix} 0.5 \\ 0 \end{bmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\langle 1,2\rangle"),
    ],
    "words": [
        (r"\text{Yes}", "yes"), ("YES", "Yes."), ("True", r"\text{true}"), (r"\text{Evelyn}", "Evelyn"), ("(A)", "A"),
        (r"\text{(A)}", "A"),
        (r"\textbf{(C)}", "C"), ("B)", "(B)"), (r"\text{June 5}", "june 5"), (r"\text{neither}", "Neither"),
        ("no", "No"),
        (r"\infty", "∞"), ("infinity", r"\infty"), (r"\mathbb{R}", r"\R"),
    ],
    "small": [
        (r"e^{-1000}", r"\frac{1}{e^{1000}}"), (r"\pi\cdot10^{-200}", r"\frac{\pi}{10^{200}}"),
        (r"\sin(\pi)", r"0\cdot x"), (r"(1+\sqrt{2})^{-40}", r"(\sqrt{2}-1)^{40}"),
    ],
    "bases": [("101_2", "101_{2}"), ("101_{2}", "101_{ 2 }")],
    "unreadable but the same": [
        (r"\sum_{i=1}^{n} i", r"\sum_{i=1}^{n}i"), ("3:4", "3 : 4"), (r"\int_0^1 x\,dx", r"\int_0^1 x dx"),
    ],
}  # fmt: skip

DIFFERENT = {
    "integers": [
        ("12", "21"), ("-5", "5"), ("37", "38"), ("1", "10"), ("3", "03 0"), ("", ""), ("0", ""), ("37", "37 38"),
        ("5", 6),
    ],
    "decimals": [
        ("0.333", "1/3"), ("0.33333333333333333333", "1/3"), ("3.14", r"\pi"), ("3.141592653589793", r"\pi"),
        ("1.0", "10"),
        ("0.05", "0.5"), ("1.5e3", "1.5"), ("2e3", "2e"), ("1.414", r"\sqrt{2}"), ("1.2.3", "1.23"),
        (0.1, "0.10000000000000001"),
        (r"0.\overline{3}", "0.3"), (r"0.\overline{9}", "0.9"),
    ],
    "fractions": [
        ("1/2", "2/1"), (r"\frac{1}{2}", "12"), (r"\frac{1}{2}", r"\frac{1}{3}"), (r"-\frac{1}{2}", r"\frac{1}{2}"),
        (r"1\frac{1}{2}", "1/2"),
        (r"2\frac{1}{3}", "2/3"), ("1 1/2", "11/2"), (r"2\frac{5}{3}", "10/3"), (r"2\frac{5}{3}", "11/3"),
        ("1/0", "0"), ("1/0", "2/0"),
        (r"\frac{0}{0}", "0"),
        (r"2\frac{1}{0}", "2"),
    ],
    "thousands": [
        ("1,2", "12"), ("1,23", "123"), ("12,34", "1234"), ("1 2", "12"), ("1 2", "2"), ("1,2345", "12345"),
        ("0.123 456", "123456"),
        ("(1,234)", "1234"), (r"\{1,234\}", "1234"), ("1,,234", "1234"), ("1234,567", "1234567"), ("12 3", "123"),
        ("1,234", "1.234"),
    ],
    "small": [
        ("e^{-1000}", "e^{-500}"), (r"\pi\cdot10^{-150}", r"\pi\cdot10^{-200}"), ("e^{-1000}", "0"),
        (r"\sqrt{2}\cdot10^{-120}", r"\sqrt{3}\cdot10^{-120}"),
    ],
    "currency": [
        ("$5", "6"), (r"\$5", "5 cents"), ("25¢", "$25"), ("₹5", "$5"), ("XUS$5", "5"),
        ("$5", "£5"), (r"\$5", r"5\%"),
    ],
    "percent": [(r"50\%", "0.5"), (r"50\%", "5"), (r"0.5\%", "50"), (r"50\%", r"50^\circ")],
    "degrees": [
        (r"90^\circ", "9"), (r"90^\circ", r"\frac{\pi}{2}"), (r"\sin 30^\circ", r"\sin 30"),
        (r"20^\circ\text{C}", r"20^\circ\text{F}"),
    ],
    "units": [
        ("5 cm", "5 m"), (r"5 \text{ cm}", r"5 \text{ m}"), (r"5\text{ cm}^2", r"5\text{ cm}"),
        ("37 apples", "37 oranges"), ("5 m", "5"),
        ("5x", "5"), ("2 pi", "2"), ("3 squared", "3"), ("5 million", "5"), (r"5\text{ million}", "5"),
        ("6 or 7", "6"), ("3 halves", "3"),
        (r"5 \text{ base } 6", "5"), ("5 theta", "5"), ("5 factorial", "5"), ("5 sqrt", "5"), ("5 abc", "5"),
        (r"5\text{ (mod 7)}", "5"),
        ("5 more than", "5"), ("apples", "37 apples"), ("5 square", "5"), ("5 mph", "5 km/h"),
        ("5 apples and/or 6", "5"),
        (r"5\text{ k}", "5"), ("5 sq", "5"), ("5 cubic", "5"), ("5 sq ft", "5 ft"), ("5rs", "5"), ("5–3", "5"),
    ],
    "words that change a value": [
        (f"5 {word}", "5") for word in (
            "negative", "minus", "sevenths", "thirds", "twelfth", "billionths", "trillions", "milliard", "lakh",
            "crores",
            "halved", "doubled", "squared", "quadruple", "tenfold", "reciprocal", "inverse", "false", "incorrect",
            "wrong", "gross", "dozens", "hundreds", "thousands", "score", "approximately", "roughly", "zero",
            "permille", "permil", "basis points", "binary", "octal", "hexadecimal", "imaginary", "besides", "below",
            "fewer", "radicals", "remainder", "factorials", "excluding 3", "unless", "debt", "through", "nope",
        )
    ] + [(r"5\text{ sevenths}", "5"), (r"2\text{ lakh}", "2"), ("5 sevenths apples", "5")],
    "work left undone": [
        ("35+2", "37"), ("35 + 2", 37), ("40-3", "37"), (r"5\cdot 7", "35"), ("5*7", "35"), ("2(3)", "6"),
        ("37+0", "37"),
        ("37*1", "37"), ("74/2/1", "37"), (r"\frac{35+2}{1}", "37"), (r"\frac{\frac{1}{2}}{3}", "1/6"),
        ("0.74/0.02", "37"),
        ("1/0.5", "2"), ("35+2 apples", "37"), (r"(35+2)\%", "37"), ("x=35+2", "x=37"), ("x=35+2", "37"),
        ("37=x", "x=35+2"),
        ("x-35=2", "x=37"), ("2x = 10", "x = 5"), (r"\frac{2x}{x}", "2"), ("x+37-x", "37"), (r"37+\pi-\pi", "37"),
        (r"37\cdot\frac{\pi}{\pi}", "37"), (r"2\sqrt{4}", "4"), (r"\sqrt{16}", "4"), (r"\sqrt[3]{8}", "2"),
        ("4^{1/2}", "2"),
        ("37^{2-1}", "37"), ("(35+2)^1", "37"), ("(1/2)^3", "1/8"), (r"3.7 \cdot 10", "37"),
        (r"37 \times 2^{0}", "37"),
        (r"2^3 \cdot 10^1", "80"), ("2^2/(1/2)", "8"), ("1+1/2", "1.5"), (r"37 \cdot 10^{1-1}", "37"),
        (r"\sin 30^\circ", r"\frac12"), (r"\cos(60^\circ)", "0.5"), (r"\ln(e^2)", "2"), (r"\log_2 8", "3"),
        ("5!", "120"),
        (r"\binom{5}{2}", "10"), ("|-3|", "3"), (r"\lfloor 2.5 \rfloor", "2"), ("i^2", "-1"), ("5+0i", "5"),
        (r"\sin^2 x + \cos^2 x", "1"), ("(1+1,3)", "(2,3)"), (r"\{1+1,3\}", r"\{2,3\}"), ("[1+1,3]", "[2,3]"),
        ("1+1, 3", "2, 3"), (r"1\pm 2", "3, -1"), ("x>1+1", "x>2"), ("x>1+1", r"(2,\infty)"),
        (r"\begin{pmatrix}1+1\\2\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}"),
        (r"(-\infty,1+1)\cup(3,4)", r"(-\infty,2)\cup(3,4)"),
    ],
    "infinity": [
        (r"\infty - \infty", "0"), (r"\infty-\infty", "x-x"), (r"\frac{\infty}{\infty}", r"\frac{x}{x}"),
        (r"2\infty", r"\infty\cdot 2"), (r"\infty", r"-\infty"), (r"\emptyset+1", r"1+\emptyset"),
    ],
    "inequalities and intervals": [
        ("x<2", r"(-\infty,2]"), (r"x \ge 5", r"(5,\infty)"), (r"x \ge 5", r"(-\infty,5]"),
        (r"x \ge 5", r"[5,\infty]"),
        ("1<x<2", "[1,2]"), (r"1<x\le 2", "[1,2)"), ("1<x<2", r"\{1,2\}"), ("1<x<2", "1,2"), ("x<y", r"(-\infty,y)"),
        ("1<x<2", r"y\in(1,2)"), ("1<x>2", "(1,2)"), ("1<2", r"(1,\infty)"), (r"\pi>0", r"(0,\infty)"),
        ("i>0", r"(0,\infty)"),
        ("x<1, x>2", r"(-\infty,1)\cup(2,\infty)"), ("x<1 and x>2", r"(-\infty,1)\cup(2,\infty)"),
        ("x<1 or y>2", r"(-\infty,1)\cup(2,\infty)"), ("x<1 or 2", r"(-\infty,1)\cup(2,\infty)"), ("x<1<2<3", "(1,2)"),
        ("1<x<2", "[1,2,3]"), (r"x\ne 2", r"(2,\infty)"), (r"1<x<2", r"x=(1,2)"),
    ],
    "ordinals": [("13^{th", "13"), ("13th", "14"), ("1/5th", "1/5"), ("5ths", "5"), ("13^{t}", "13")],
    "limits": [
        (r"\lfloor \pi \rfloor", r"\lfloor 3.5 \rfloor"), (r"\binom{2.5}{1}", r"\frac{5x}{2x}"),
        ("0^0", r"\frac{x}{x}"),
        (r"\sqrt[x]{2}", r"\sqrt[x]{2}+0"), (r"\exp(60000)", r"\exp(60000)+0"), ("9^{99999999}", "0+9^{99999999}"),
        (r"\sin(10^{200})", r"0+\sin(10^{200})"), (r"\pi^{999999}", r"0+\pi^{999999}"),
        (r"\exp(40000)\exp(40000)", r"0+\exp(40000)\exp(40000)"),
        (r"\frac{1}{1-1}", r"\frac{2}{1-1}"), (r"10^{3000}\cdot 10^{3000}", r"0+10^{3000}\cdot 10^{3000}"),
    ],
    "Markdown": [("**5", "5"), ("2**3**2", "64"), ("**2**3**", "8"), ("**5** **6**", "5"), ("**5** or 6", "5"),
    ],
    "labels": [
        ("x=5", "y=5"), ("x=5", "6"), ("x+1=5", "5"), ("2x=5", "5"), ("xy=5", "x=5"), ("x<5", "5"), ("5=5", "5"),
        ("x=5", "x<5"), (r"x\in[1,2]", "x=[1,2]"),
    ],
    "tuples and intervals": [
        ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("(1,2)", "12"), ("(1,2]", "[1,2)"),
        ("(1,2,3)", "(1,2)"), ("(1,2)", r"\{1,2\}"),
        (r"(-\infty, 3]", r"(-\infty,3)"), (r"(-\infty,3)", r"(\infty,3)"), ("[5]", "5"), (r"[0,1]\cup[2,3]", "[0,1]"),
        (r"[0,1]\cup[2,3]", "[0,3]"),
        (r"[0,1]\cup[2,3]", r"[0,1]\cap[2,3]"), ("(1,2", "(1,2)"), ("1,2)", "(1,2)"), (r"\langle 1,2\rangle", "(1,2)"),
        ("(1,2),(3,4)", "(1,2,3,4)"),
        ("(1,)", "1"), ("(1,2)(3,4)", "(1,2)"), ("((1,2),3)", "(1,2,3)"), ("(1,2}", "(1,2)"),
    ],
    "sets and lists": [
        (r"\{1,2\}", r"\{1,3\}"), (r"\{1,2\}", r"\{1,2,3\}"), (r"\{1,2\}", r"\{3,1,2\}"), ("1,2", "1,1,2"),
        (r"\{5\}", "5"), ("37, 38", "37"),
        ("37 or 38", "37"), ("37 and 37", "37"),
        (r"\pm 2", "2"), (r"\pm 2", "-2"), (r"\emptyset", "0"), ("1,2", "1,3"), (r"\{1,2\}", "(1,2)"),
        ("1,1,2", "1,2,2"),
    ],
    "radicals": [
        (r"\sqrt{8}", "8"), (r"\sqrt{2}", "2"), (r"\sqrt[3]{8}", r"\sqrt{8}"), (r"2\sqrt{2}", r"\sqrt{2}"),
        (r"\sqrt{12}", r"\sqrt{1}2"), (r"\sqrt12", r"\sqrt{12}"),
    ],
    "expressions": [
        (r"x^2\frac{1}{2}", "x^{5/2}"), (r"\sin(10^{200})", r"\sin(10^{200}+1)"),
        (r"\sqrt{2}", f"1.{isqrt(2 * 10**240) - 10**120}"),
        ("2^3^2", "2^9"), (r"1\frac12^2", "9/4"), (r"12\overline{3}", "12"), ("0^0", "1"),
        (r"\pi^{999999}", r"\pi^{999998}"), (r"\sqrt[x]{2}", "2"),
        (r"\exp(60000)", r"\exp(60001)"), (r"10^{3000}\cdot 10^{3000}", "10^{5999}"), (r"\exp(40000)\exp(40000)", "1"),
        (r"\ln 0", "0"),
        (r"\lfloor \pi \rfloor", "4"), (r"\binom{2.5}{1}", "2.5"),
        ("x^2", "2x"), ("x+1", "x-1"), ("x", "X"), ("x", "y"), ("x2", "x^2"), ("x2", "2x"), ("|x|", "x"),
        (r"\sqrt{x^2}", "x"), ("x_1", "x_2"), ("x_1", "x"),
        ("1/xy", "y/x"), (r"\sin x", r"\cos x"), (r"\log 100", "2"), (r"\ln x", r"\log x"), (r"\pi", "22/7"),
        ("e", "2.718281828"), ("2^{10}", "210"), ("x^{-1}", "x"),
        ("9^{99999999}", "9^{99999998}"), ("x+", "x"), ("(x", "x"), ("2^", "2"), ("abcd", "dcba"), ("10^{-200}", "0"),
        (r"\sin^{-1} x", r"\frac{1}{\sin x}"),
    ],
    "equations": [
        ("x+y=5", "x+y=6"), ("x > 5", "x < 5"), ("x > 5", r"x \ge 5"), ("x=5", "x^2=25"), ("1=1", "2=2"),
        ("x+=5", "x+5=0"), (r"x\ne 1", "x=1"), ("y=x", "y=-x"),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    ],
    "words": [
        ("yes", "no"), ("no", "on"), ("Monday", "Tuesday"), ("A", "B"), ("(A)", "a"), ("yes", "y"), ("eat", "tea"),
        ("The answer is not 37", "37"), ("I think 5", "5"), ("yes", "0"),
    ],
    "bases": [("101_2", "101"), ("101_2", "5"), ("101_2", "101_3"), ("101_2", "1012")],
    "hedges": [
        ("37...", "37"), ("37..", "37"), ("37 maybe", "37"), ("37 maybe thirty eight", "37"), ("37 or", "37"),
        ("or 37", "37"), ("37,", "37"), ("~37", "-37"),
        ("37 if x else 38", "37"), (r"37 \text{ if wrong } 38", "37"), (r"37\text{ is wrong}", "37"),
        (r"\max(37,38)", "37"), ("37!", "37"), ("37*", "37"),
        (r"37 \pmod{100}", "37"), (r"37\ldots", "37"), ("x=5=6", "5"), ("x=5=6", "6"), ("x=5,6", "5"), ("A or B", "A"),
        ("AB", "A"), ("A, B", "A"), ("yes/no", "yes"),
        ("yes no", "yes"), ("not yes", "yes"), (r"5\pm 1", "5"), ("<5", "5"), ("37 apples and 38 oranges", "37"),
        ("$3$7", "37"), ("$3$$7$", "37"), (r"\text{3}\text{7}", "37"), ("3{7}", "37"), ("3{7}", "21"),
        (r"\boxed{3}7", "37"), ("3\n7", "37"), (r"3\\7", "37"),
        ("2(3)", "23"), ("1/2/3", "1/(2/3)"), ("5+0i", "5i"), ("1e98", "1e99"), ("10^{9000}", "10^{9001}"),
        (r"\pi", "3." + "14159265358979323846264338327950288419716939937510"),
        ("37 38", "37"), ("37/38", "37"), ("37; 38", "37"), ("37|38", "37"), (r"\boxed{37} \boxed{38}", "37"),
        ("37 (or 38)", "37"), ("37?", "37"), ("not 37", "37"),
    ],
    "no sense": [
        ("[]", ""), ("\\", "1"), ("^", "1"), ("{", "{}"), (r"\frac{1}", "1"), (r"\sqrt", "0"),
        (r"\begin{pmatrix}", "1"), ("\x00", "0"), (r"\frac", r"\sqrt"), ("+", "0"), ("()", "0"),
    ],
}  # fmt: skip


def failing(pairs, is_right_pair):
    """The pairs of a table that do not have the property; one pytest item checks a whole table."""
    return [pair for pair in pairs if not is_right_pair(*pair)]


@pytest.mark.parametrize("kind", EQUAL)
def test_equal(kind):
    assert (
        failing(EQUAL[kind], lambda first, second: answers_match(first, second) and answers_match(second, first)) == []
    )


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different(kind):
    assert failing(DIFFERENT[kind], lambda *pair: not answers_match(*pair) and not answers_match(*pair[::-1])) == []


# Right where the second is the reference, and not the other way round.
RIGHT = {
    "letters that are units": [
        ("5 m", "5"), ("5m", "5"), ("5 g", "5"), ("10 h", "10"), ("10 s", "10"), ("2 L", "2"), ("100 m^2", "100"),
        ("100 m²", "100"), ("1.5 m", r"\frac{3}{2}"), (r"\frac{1}{2} h", "0.5"), ("1,200 m", "1200"),
        (r"\boxed{5 m}", "5"), ("x = 5 m", "5"), (r"\text{5 m}", "5"), ("5 m", r"5\text{ m}"), ("5 m", "5 meters"),
        ("5 m^2", "5 square meters"),
    ],
    "what arithmetic comes to": [
        ("40320", "8!"), ("37", "35+2"), ("28", r"\binom{8}{2}"), ("2147483647", "2^{31}-1"), ("4", r"\sqrt{16}"),
        ("0.5", r"\sin 30^\circ"), (r"\frac{5}{6}", "1/2+1/3"), ("162", r"2\cdot 3^4"), (r"37\text{ cm}", "35+2"),
        ("37", r"35+2\text{ cm}"),
    ],
}  # fmt: skip
NOT_RIGHT = {
    "letters that are variables": [
        ("5x", "5"), ("2a", "2"), ("3n", "3"), ("5 k", "5"), ("5K", "5"), ("5M", "5"), ("5 t", "5"), ("5 m", "5x"),
        ("5 m", "6"), ("5 m", "5 cm"), ("5 m^2", "5 meters"), ("5 m", "m"), ("2x m", "2"), ("x_5 m", "5"),
        ("5^m", "5"), ("35+2 m", "37"), ("5 m or 6 m", "5"), ("5 m s", "5"), ("m5", "5"),
        ("5mg", "5 g"), ("5 m^4", "5"),
        ("5", "5m"), ("5", "5 m"),
    ],
    "what arithmetic does not come to": [
        ("8!", "40320"), ("40321", "8!"), ("7!*8", "9"), ("x", "x+0+1"), ("3", "x+3-x"), ("3.14", r"\pi"),
        ("35+2", "37"), (r"\infty", r"\infty+1"), ("37 km", r"35+2\text{ cm}"), ("2", r"\log 100"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_right_by_what_the_reference_is(kind):
    def is_right_one_way(answer, reference):
        one_way = not is_right(reference, answer) or answer.endswith("cm}")  # a unit may be missing on either side
        return is_right(answer, reference) and not answers_match(answer, reference) and one_way

    assert failing(RIGHT[kind], is_right_one_way) == []


def is_right_as_text(answer, reference):
    return is_right(str(answer).strip(), str(reference).strip())


@pytest.mark.parametrize("kind", NOT_RIGHT)
def test_not_right(kind):
    assert failing(NOT_RIGHT[kind], lambda *pair: not is_right_as_text(*pair)) == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_is_different_is_not_right(kind):
    pairs = [pair for pair in DIFFERENT[kind] if pair != ("5 m", "5")]
    assert failing(pairs, lambda *pair: not is_right_as_text(*pair)) == []


@pytest.mark.parametrize("kind", EQUAL)
def test_what_is_equal_is_right(kind):
    assert failing(EQUAL[kind], is_right_as_text) == []


DATA = Path(__file__).resolve().parents[1] / "data_grading"


@pytest.mark.parametrize("kind", sorted(file.stem for file in DATA.glob("*.txt")))
def test_answers_in_the_style_of_public_data_sets(kind):
    """A line is `= reference  ::  answer` for a right answer, `!` for a wrong one, for both rewards."""
    lines = (DATA / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
    wrong = []
    for line in lines:
        if not line.startswith("#"):
            reference, answer = line[2:].split("  ::  ")
            verdicts = {
                r1_zero_reward_fn(f"So. </think> <answer> {answer} </answer>", reference)["reward"],
                question_only_reward_fn(rf"\boxed{{{answer}}}", reference)["reward"],
            }
            wrong += [line] if verdicts != {float(line[0] == "=")} else []
    assert wrong == []
    assert {line[0] for line in lines} >= {"=", "!"}


def test_the_table_is_large():
    assert sum(map(len, EQUAL.values())) >= 150
    assert sum(map(len, DIFFERENT.values())) >= 150


NORMAL = [
    ("  37. ", "37"), (r"$\dfrac{1}{2}$", r"\frac{1}{2}"), (r"\boxed{ x }", "x"), (r"\text{ Yes}", "yes"),
    ("1,234", "1234"), (r"\$1,234.50", "1234.50"),
    (r"5 \text{ cm}", "5"), (r"50\%", "50"), (r"90^{\circ}", "90"), (r"\left( 1 , 2 \right)", "(1,2)"),
    ("x \\leq 2", r"x\le2"), ("2 \\pi  r", r"2\pi r"),
    ("−１", "-1"), ("x²", "x^{2}"), ("", ""), ("  ", ""), ("$$", ""), (".", ""), ("1 2", "1 2"), (r"\text{}", ""),
    (" " + "7" * 1001 + " ", "7" * 1001),
    ("XY", "XY"), ("(1,234)", "(1,234)"),
]  # fmt: skip


def test_normal_form():
    assert failing(NORMAL, lambda answer, normal: normalize_answer(answer) == normal) == []


BOXED = [
    (r"\boxed{37}", "37"), (r"so \boxed{3} and \boxed{ 4 }.", "4"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed {5}", "5"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."), (r"\boxed{}", ""), ("37", None), ("", None),
    (r"\boxed{37", None), (r"\boxed{3} \boxed{4", None), (r"\boxed", None), ("boxed{3}", None),
    (r"\boxed{\boxed{5}}", "5"), (r"\boxed{a}b}", "a"), ("\\boxed{1\n2}", "1\n2"),
    (r"so \boxed 5", "5"), (r"so $\boxed5$.", "5"), (r"\(\boxed -3/4\), so", "-3/4"),
    ("\\boxed 56.\nDone", "56"),
    (r"\boxed{3}, no, \boxed 4.", "4"), (r"\boxed 4, no, \boxed{3}", "3"), (r"\boxed 5 or 6", None),
    (r"$\boxed 5\sqrt2$", None), (r"$\boxed x$", None), (r"\boxedfoo{5}", None),
    (r"\boxed{5}. Check: $\boxed", "5"), (r"\boxed{5} is what \boxed holds", "5"), (r"\boxed{5} \boxed{", None),
]  # fmt: skip


def test_boxed_answer():
    assert failing(BOXED, lambda text, boxed: extract_boxed_answer(text) == boxed) == []


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_must_be_finite(number):
    with pytest.raises(ValueError, match=r"second=.* must be finite"):
        answers_match("1", number)


HOSTILE = {
    "tower": "9^{9^{9^{9}}}", "factorials": "9!!!!!!!", "factorial": "(10^9)!", "binomial": r"\binom{10^9}{10^8}",
    "exponentials": r"\exp(\exp(\exp(\exp(9))))",
    "complex tower": "i^{i^{i^{i}}}", "open braces": "{" * 10_000, "braces": "{" * 10_000 + "1" + "}" * 10_000,
    "parentheses": "(" * 490 + "1" + ")" * 490,
    "under the depth": "(" * 23 + "x" + ")" * 23, "digits": "9" * 1_000_000, "digits squared": "9" * 900 + "^2",
    "decimals": "0." + "9" * 990, "sum": "x+" * 500_000,
    "roots": r"\sqrt" * 190, "fractions": r"\frac1" * 160, "mixed": r"1\frac{" * 23 + "1" + "}{2}" * 23,
    "signs": "-" * 998 + "x", "commas": "," * 999, "list": "1," * 499 + "1",
    "unit": "1 " + "a " * 499, "text": "1" + r"\text{a}" * 120, "dollars": "$" * 999, "stops": "." * 999,
    "spaces": "1" + " " * 998 + "1", "newlines": "1" + "\n" * 998 + "1",
    "boxes": r"\boxed{" * 120 + "1" + "}" * 120, "open boxes": r"\boxed{" * 100_000, "powers": "((x+1)^{999})^{999}",
    "matrices": r"\begin{pmatrix}" * 40 + r"\end{pmatrix}" * 40,
    "relations": "=" * 999, "labels": "x=" * 499 + "1", "plus-minus": r"\pm" * 300,
    "nested plus-minus": r"(\pm1," * 23 + "1" + ")" * 23, "backslashes": "\\" * 999, "zeros": "\0" * 999,
    "functions": "+".join([r"\arcsin(ix)"] * 80), "sines": r"\sin" * 240 + " x", "thousands": "1,234" * 190,
    "spaced thousands": "1 " + "111 " * 240, "scientific": "1e999999999",
    "superscripts": "²" * 999, "subscripts": "x_" * 499, "bars": "|" * 999, "surrogate": "\ud800" * 900,
    "floors": r"\lfloor" * 120 + "1" + r"\rfloor" * 120,
    "divisions": "1/" * 400 + "2", "repeating": r"0.\overline{" + "3" * 900 + "}", "and": "and " * 240,
    "statements": r"\textcircled{1}" * 60, "circled": "①" * 999, "number words": "twenty " * 140,
    "Chinese": "十" * 999,
    "complements": r"\mathbb{R}\setminus" + r"\{1\}\setminus" * 80 + r"\{2\}",
    "builders": r"\{x|" * 23 + "x>1" + r"\}" * 23,
    "conditions": "x>1 and " * 110 + "x>2", "unequal": r"x\ne 1," * 120 + r"x\ne 2",
    "intervals": r"\cup".join(f"({i},{i}.5)" for i in range(90)), "units": "1 " + "m/s " * 240,
    "text units": "1" + r"\text{kg}" * 100, "quantities": "1 h 2 min " * 90, "labels in words": "area " * 190 + "= 1",
    "matrix": r"\begin{pmatrix}" + "1&" * 450 + r"1\end{pmatrix}",
    "system": r"\begin{cases}" + r"x=1\\" * 150 + r"\end{cases}",
    "chain": "=".join(["1+1"] * 240), "approximations": r"\approx".join(["1.1"] * 90), "ratio": "1:" * 490 + "2",
    "options": "(A) " * 240, "sentences": "the answer is " * 70, "repeated digits": "0." + "3" * 900 + "...",
    "doubled": "\\\\frac" * 160, "stars": "*" * 999, "quotes": '"' * 999, "modulus": r"\pmod" * 190,
    "named values": ",".join(f"x_{i}={i}" for i in range(120)), "scaled": "1 million " * 99,
    "unions": r"\cup" * 240, "logs": r"\log_2" * 160 + "8",
}  # fmt: skip
GOLDS = [
    "37",
    r"\sqrt{2}",
    "x^2+1",
    r"\{1,2,3\}",
    r"(1,\pi)",
    r"\pm 1",
    "x=5",
    r"\arcsin(ix)+1",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
]


def slowest(answer):
    """Seconds of the slowest call, and whether any gold matched."""
    worst, matched = 0.0, False
    for gold in GOLDS:
        start = time.thread_time()
        matched |= answers_match(answer, gold)
        worst = max(worst, time.thread_time() - start)
    return worst, matched


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_at_once(name):
    seconds, matched = slowest(HOSTILE[name])
    assert not matched
    assert seconds < 1.0


@pytest.mark.parametrize(
    "part",
    [
        r"\sin\cos\tan x",
        "x^{x^x}",
        r"\arcsin(ix)",
        r"\sqrt[999]{x}",
        "e^{9999ix}",
        "x^{99}",
        "3^{1200}/7^{600}",
        "900!",
        "(x+y+z)^9",
    ],
)
def test_a_long_equal_answer_is_decided_at_once(part):
    """Here no early difference ends the work: the budget does."""
    first = "+".join([part] * (900 // len(part)))
    start = time.thread_time()
    answers_match(first, "0+" + first)
    assert time.thread_time() - start < 5.0


def test_a_comparison_past_its_budget_is_refused():
    """Long before it takes long; half of it is decided."""
    long, half = ("+".join([r"\arctan(x)"] * count) for count in (90, 40))
    assert answers_match(half, "0+" + half)
    assert not answers_match(long, "0+" + long)
    for count, decided in ((60, True), (150, False)):
        upwards, downwards = ",".join(map(str, range(count))), ",".join(f"{i}.0" for i in reversed(range(count)))
        assert answers_match(rf"\{{{upwards}\}}", rf"\{{{downwards}\}}") == decided


def test_many_parts_share_one_budget():
    sets = [r"\{" + ",".join(rf"\{name}{i}x" for i in range(2, 130)) + r"\}" for name in ("sin", "cos")]
    start = time.thread_time()
    assert not answers_match(*sets)
    assert time.thread_time() - start < 5.0


def test_a_hostile_answer_is_refused_in_every_thread():
    results = []
    threads = [
        threading.Thread(target=lambda: results.append([slowest(text) for text in HOSTILE.values()])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert not any(matched for result in results for _, matched in result)
    assert max(seconds for result in results for seconds, _ in result) < 5.0


def test_threads_agree_with_the_main_thread():
    """The arithmetic of inexact values is each thread's own."""
    pairs = EQUAL["radicals"] + EQUAL["expressions"] + EQUAL["no plain numbers"]
    results = []
    work = [
        threading.Thread(target=lambda: results.append([answers_match(*pair) for pair in pairs])) for _ in range(4)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [[True] * len(pairs)] * 4


def test_each_thread_has_its_own_arithmetic():
    contexts = [_evaluation.arithmetic()]
    thread = threading.Thread(target=lambda: contexts.append(_evaluation.arithmetic()))
    thread.start()
    thread.join()
    assert contexts[0] is _evaluation.arithmetic()
    assert contexts[1] is not contexts[0]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of forking a process with threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_daemonic_child_process_grades(method):
    answers_match(r"\sqrt{8}", r"2\sqrt{2}")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(answers_match, (r"\sqrt{8}", r"2\sqrt{2}")).get(timeout=60)
        for answer in ("9^{9^{9^{9}}}", "{" * 10_000, "9" * 1_000_000):
            assert not pool.apply_async(answers_match, (answer, r"2\sqrt{2}")).get(timeout=20)


def test_the_plain_path_imports_no_torch_and_no_symbolic_library():
    code = (
        "import sys; from grpo_core import r1_zero_reward_fn as reward;"
        "assert reward(' </think> <answer> 1/2 </answer>', '0.5')['reward'] == 1;"
        "heavy = {'torch', 'mpmath', 'sympy', 'math_verify', 'latex2sympy2_extended'};"
        "assert not heavy & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_text_over_the_limit_equals_itself_only():
    text = "x+" * 600 + "x"
    assert answers_match(text, f" {text} ")
    assert not answers_match(text, "601x")
    assert answers_match("0" * 2000 + "7", "7")


def test_the_reading_of_an_answer_is_kept():
    _structure.readings.cache_clear()
    for answer in ("x+1", "x+2", "x+3"):
        answers_match(answer, "y+1")
    assert _structure.readings.cache_info().hits == 2
