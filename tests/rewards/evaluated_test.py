import time

import pytest
import sympy

from tiltjax.rewards.evaluated import is_formula, is_inert


@pytest.mark.parametrize(
    "text",
    ["", "1", "-1", "1 -2", "abc", "'abc'", "['a', 'b']", "[[1, 0], (0, 1)]", "1 2 3", "_ _ Q", "\x00", "((", "x = 1"],
)
def test_inert(text):
    assert is_inert(text)


@pytest.mark.parametrize(
    "text",
    [
        "exit()",
        "[exit()]",
        "(lambda: 1)()",
        "[x for x in y]",
        "f'{exit()}'",
        "().__class__",
        "a[0]",
        "'a' * 10**9",
        "9**9**9",
        "1 << 10**9",
        "(x := 1)",
        "{1: exit()}",
    ],
)
def test_not_inert(text):
    assert not is_inert(text)
    assert not is_formula(text)


@pytest.mark.parametrize(
    "text",
    ["6*(98 - 54) - 34 - 66", "-5*X**9 - 2*X**6/3 + C", "2*(4*x + 2)**(3/2)/3 + C", "exp(x)*sin(x)**3", "x**-2", "+.5"],
)
def test_formula(text):
    assert is_formula(text)
    sympy.parse_expr(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x!",
        "5! + exit()",
        "exit(x)",
        "sin(x, evaluate=False)",
        "sin(exit())",
        "x.y",
        "'a' + 'b'",
        "True",
        "1 if x else 2",
        "9**9**9",
        "(9**99)**99",
        "9**(99*99*99)",
        "2**(1/0.000001)",
        "9**exp(99)",
        "9**99999999",
        "(1, 2)",
        "1 +" * 1000 + "1",
        "(" * 5000 + "1" + ")" * 5000,
    ],
)
def test_no_formula(text):
    assert not is_formula(text)


def test_the_steepest_formula_is_quick():
    text = "*".join(["(999999999999999**100)"] * 40)
    assert is_formula(text)
    start = time.monotonic()
    sympy.parse_expr(text)
    assert time.monotonic() - start < 20
