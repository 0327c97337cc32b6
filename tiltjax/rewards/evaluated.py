"""Which texts are harmless to a scorer that hands them to ``eval``.

Some puzzle scorers evaluate an answer as Python, or through sympy, which does. An answer is what a model wrote: it
reaches them only if it is plainly a literal, or a formula that is cheap to evaluate.
"""

import ast
import warnings

__all__ = ["is_formula", "is_inert"]

# fmt: off
_FUNCTIONS = frozenset((
    "Abs", "acos", "asin", "atan", "cos", "cosh", "cot", "csc", "exp", "ln", "log", "sec", "sin", "sinh", "sqrt", "tan",
    "tanh",
))
# fmt: on
_LONGEST = 1000
"""Characters of a formula."""
_STEEPEST = 100
"""Product of all exponents that act on one number: 9**100 is quick, 9**9**9 is not."""


def _parse(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse(text.strip(), mode="eval").body


def is_inert(text: str) -> bool:
    r"""Whether ``eval`` of a text runs nothing: it is no Python at all, or a name, a literal or a list of such.

    Example:
      >>> is_inert("[[1, 2], ['a']]"), is_inert("1 0\n0 1"), is_inert("[exit()]"), is_inert("'a' * 10**9")
      (True, True, False, False)
    """

    def plain(node: ast.expr) -> bool:
        match node:
            case ast.Constant() | ast.Name():
                return True
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return all(plain(element) for element in elements)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
                return plain(operand)
            case ast.BinOp(op=ast.Add() | ast.Sub(), left=left, right=right):
                return plain(left) and plain(right)
        return False

    try:
        return plain(_parse(text))
    except (SyntaxError, ValueError):
        return True
    except (RecursionError, MemoryError):
        return False


def _exponent(node: ast.expr) -> float:
    """An upper bound of the numbers in an exponent; infinite for a power or a call inside."""
    if any(isinstance(child, ast.Pow | ast.Call) for child in ast.walk(node)):
        return float("inf")
    bound = 1.0
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, int | float) and child.value:
            bound *= max(abs(child.value), 1 / abs(child.value))
    return bound


def _steepness(node: ast.expr) -> float:
    """Product of the exponents on the steepest path of a formula; infinite for anything that is no formula."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e15:
            return 1.0
        case ast.Name():
            return 1.0
        case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
            return _steepness(node.operand)
        case ast.BinOp(op=ast.Pow()):
            return max(_steepness(node.left) * _exponent(node.right), _steepness(node.right))
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            return max(_steepness(node.left), _steepness(node.right))
        case ast.Call(func=ast.Name(id=function), keywords=[], args=[argument]) if function in _FUNCTIONS:
            return _steepness(argument)
    return float("inf")


def is_formula(text: str) -> bool:
    """Whether a text is an arithmetic formula: names, numbers, ``+ - * / **`` and elementary functions of one argument.

    Example:
      >>> is_formula("x**2/2 + sin(x) + C"), is_formula("exit()"), is_formula("9**9**9"), is_formula("x.y")
      (True, False, False, False)
    """
    try:
        return len(text) <= _LONGEST and _steepness(_parse(text)) <= _STEEPEST
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
