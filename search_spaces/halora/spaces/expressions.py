"""Arithmetic over dotted names, for derived values; nothing of Python beyond it is evaluated."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from halora.errors import nearest

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}
_LONGEST = 500
_LARGEST = 2.0**63
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round, "sqrt": math.sqrt, "int": int}


class Expression:
    """A formula such as `max(training.steps // 10, 1)`.

    Args:
        text: Numbers, dotted names, `+ - * / // %`, brackets, and min, max, round, sqrt, int.

    Raises:
        ValueError: The text is anything else.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > _LONGEST:
            raise ValueError(f"a formula has {_LONGEST} characters at most, got {len(text)}")
        try:
            self._body = ast.parse(text, mode="eval").body
            self.names = frozenset(self._names(self._body))
        except (SyntaxError, RecursionError, MemoryError):  # the last two by nesting
            raise ValueError(f"'{text}' is not a formula") from None

    def value(self, values: Mapping[str, Any]) -> int | float:
        """The formula's value, given that of every name.

        Raises:
            ValueError: A named value is not a number, or the formula has no value there.
        """
        try:
            number: int | float = self._value(self._body, values)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"'{self.text}' has no value: {error}") from None
        if not abs(number) < _LARGEST:  # nor NaN
            raise ValueError(f"'{self.text}' has no value: it is too large")
        return number

    def _names(self, node: ast.AST) -> list[str]:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float()):
                return []
            case ast.Name() | ast.Attribute():
                return [_dotted(node, self.text)]
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return [*self._names(node.left), *self._names(node.right)]
            case ast.UnaryOp(op=ast.USub()):
                return self._names(node.operand)
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                if name not in _FUNCTIONS:
                    known = f"(known: {', '.join(sorted(_FUNCTIONS))})"
                    raise ValueError(f"'{self.text}': no function '{name}'{nearest(name, _FUNCTIONS)} {known}")
                return [found for argument in node.args for found in self._names(argument)]
        raise ValueError(
            f"'{self.text}': a formula has numbers, names, + - * / // % and {', '.join(sorted(_FUNCTIONS))} only"
        )

    def _value(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.BinOp():
                return _OPERATORS[type(node.op)](self._value(node.left, values), self._value(node.right, values))
            case ast.UnaryOp():
                return -self._value(node.operand, values)
            case ast.Call(func=ast.Name(id=name)):
                return _FUNCTIONS[name](*(self._value(argument, values) for argument in node.args))
        name = _dotted(node, self.text)
        if isinstance(values[name], bool) or not isinstance(values[name], int | float):
            raise ValueError(f"{name} is {values[name]!r}, not a number")
        return values[name]


def _dotted(node: ast.AST, text: str) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=parent, attr=name):
            return f"{_dotted(parent, text)}.{name}"
    raise ValueError(f"'{text}': a name is a dotted path such as training.steps")
