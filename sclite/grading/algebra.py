r"""Comparison of two formulas, parsed by math-verify. Runs in a worker, because it imports sympy and may never end.

Expressions are equal if they have the same values: exactly if they are rational, else to 100 digits, and at a few points
if they have variables. (math-verify rounds differences to 15 places and so takes 1/2^98 for 1/2^99.) Equations are equal
if the differences of their sides are the same up to a constant factor; inequalities also if they have the same solutions.
"""

import functools
import random
import re
from typing import Any

from sclite.grading.equality import Verdict
from sclite.grading.numbers import is_close

_PATTERNS = [
    (r"\\frac ?(\\[a-z]+|\w)(?= ?[\\{\w])", r"\\frac{\1}"),
    (r"(\\frac\{[^{}]*\}) ?(\\[a-z]+|\w)", r"\1{\2}"),
    (r"\\sqrt ?(\w|\\[a-z]+)", r"\\sqrt{\1}"),
    # latex2sympy reads 4/3\pi as 4/(3\pi)
    (r"(?<![\w.^}])(\d+)/(\d+)(?= ?[A-Za-z\\(])", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^}])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
    (r"(?<=[\d)])(?<!_\d)(?=\(-?\d)", r"\\cdot "),
    (r"(?<![A-Za-z\\])T(?![A-Za-z])", r"\\tau "),  # the parser takes ^T for a transpose
    (r"\\(max|min)\\?\{([^{}\\]*)\\?\}", r"\\\1(\2)"),
]
_FIXES = [(re.compile(pattern), new) for pattern, new in _PATTERNS]
# the parser misreads these: x' as x, 2 3 as their sum, 9^9^9 as (9^9)^9
_MISREAD = re.compile(r"'|\^ ?\{? ?T|(?<![_\d])\d+ \d|\^ ?(?:\\?\w+|\{[^{}]*\}) ?\^")


def same_formula(given: str, gold: str) -> Verdict:
    """Whether two formulas are equal; None if the comparison fails. Text that is not a formula equals nothing."""
    from math_verify import verify
    from sympy import And, Eq, Expr, Set, simplify
    from sympy.logic.boolalg import BooleanAtom

    try:
        a, b = _parse(given), _parse(gold)
        if a is None or b is None:
            return False
        if isinstance(a, Expr) and isinstance(b, Expr):
            long_decimals = re.findall(r"\.(\d{6,})", f"{given} {gold}")
            places = len(long_decimals[0]) if len(long_decimals) == 1 else None
            a, b = a.doit(), b.doit()
            if a == b:
                return True
            if a.is_Rational and b.is_Rational and places is None:
                return False
            seen = 0
            for point in _points({s.name for s in a.free_symbols | b.free_symbols}):
                x, y = _value(a, point), _value(b, point)
                if x is None or y is None:
                    continue
                size = max(abs(x), abs(y))
                if abs(x - y) > 1e-100 * size and not (places and is_close(x, y, places)):
                    return bool(size < 1e-100) and simplify(a - b) == 0
                seen += 1
            return bool(seen) or simplify(a - b) == 0
        if _is_relation(a) and _is_relation(b) and _is_multiple(a, b):
            return True
        if isinstance(a, BooleanAtom) or isinstance(b, BooleanAtom):
            return False
        equations = [x.args for x in (a, b) if isinstance(x, And) and all(isinstance(y, Eq) for y in x.args)]
        if equations:
            return len(equations) == 2 and set(equations[0]) == set(equations[1])
        a, b = _solutions(a, b), _solutions(b, a)
        if isinstance(a, Set) and isinstance(b, Set):
            return a == b or bool((a ^ b).is_empty)
        if _is_relation(a) or _is_relation(b) or isinstance(a, Expr) or isinstance(b, Expr):
            return False
        return bool(verify(a, b, timeout_seconds=None, raise_on_error=True))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError):
        return None


@functools.lru_cache(1024)  # gold answers recur with every attempt
def _parse(text: str) -> Any:
    """The formula in sympy, with `x < 1 or x > 3` as a set and i as the imaginary unit; None if it is not a formula."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Basic, Float, I, Rational, Symbol, Union

    sides = re.split(r",? or ", text)
    if len(sides) > 1:
        read = [_parse(side) for side in sides]
        return Union(*(side.as_set() for side in read)) if all(map(_is_relation, read)) else None
    for pattern, new in _FIXES:
        text = pattern.sub(new, text)
    if _MISREAD.search(text):
        return None
    normal = NormalizationConfig(malformed_operators=True, boxed="none")
    case = ConversionConfig(lowercase_symbols=False)
    try:
        read = latex2sympy(normalize_latex(text, normal), normalization_config=None, conversion_config=case)
    except Exception as error:
        if type(error) is not Exception:  # the parser raises a bare Exception if this is not a formula
            raise
        return None
    if not isinstance(read, Basic):
        return read
    known = {
        s: I if s.name == "i" else Symbol(s.name, real=True)
        for s in read.free_symbols
        if isinstance(s, Symbol)
    }
    return read.xreplace(known | {f: Rational(str(f)) for f in read.atoms(Float)})


def _is_relation(read: object) -> bool:
    return getattr(read, "is_Relational", False)


def _solutions(read: Any, other: Any) -> Any:
    """The solution set of relations in one variable, if `other` is a set or an inequality; else `read` itself."""
    from sympy import Eq, Intersection, Set

    parts = [read] if _is_relation(read) else list(getattr(read, "args", ()))
    if not parts or not all(map(_is_relation, parts)) or len(read.free_symbols) != 1:
        return read
    if isinstance(read, Eq) and not isinstance(other, Set):
        return read
    if not isinstance(other, Set) and other.free_symbols != read.free_symbols:
        return read
    return Intersection(*(part.as_set() for part in parts))


def _points(names: set[str]) -> list[dict[str, Any]]:
    """Test points: values of the variables, all positive, all negative, then mixed."""
    from sympy import Rational

    dice = random.Random(0)
    signs = [(1,), (-1,), (-1, 1), (-1, 1), (-1, 1)] if names else [(1,)]
    points = [{n: dice.choice(s) * Rational(dice.randint(20, 400), 97) for n in sorted(names)} for s in signs]
    return points + [{n: Rational(dice.randint(3, 12)) for n in sorted(names)}] * bool(names)


def _value(read: Any, point: dict[str, Any]) -> Any:
    """The value at a point to 120 digits; None if it is undefined."""
    number = read.xreplace({s: point[s.name] for s in read.free_symbols}).evalf(120)
    parts = number.as_real_imag()
    return number if all(part.is_Number and part.is_finite for part in parts) else None


def _is_multiple(a: Any, b: Any) -> bool:
    """Whether one relation is the other times a constant."""
    from sympy import Eq, Ge, Gt, Ne, fraction, together

    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    if isinstance(a, (Ge, Gt)) != isinstance(b, (Ge, Gt)):
        b = b.reversed
    if a.func != b.func:
        return False
    left, right = (r.lhs.doit() - r.rhs.doit() for r in (a, b))
    if isinstance(a, (Eq, Ne)):  # a denominator is never zero
        left, right = (fraction(together(side))[0] for side in (left, right))
    ratios = []
    for point in _points({s.name for s in a.free_symbols}):
        x, y = _value(left, point), _value(right, point)
        if x is not None and y is not None and x != 0 != y:
            ratios.append(x / y)
    if len(ratios) < 3 or any(abs(r - ratios[0]) > 1e-100 * abs(r) for r in ratios):
        return False
    return isinstance(a, (Eq, Ne)) or bool(ratios[0] > 0)
