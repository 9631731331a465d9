"""YAML as people write it: keys once, numbers as YAML 1.2 has them (1e-4 is one), mistakes told in one sentence."""

import re
from pathlib import Path
from typing import Any

import yaml

from halora.errors import UserError
from halora.reading import bounded, finite, read_text

_WHAT_BAD_VALUES_RAISE = (  # e.g. `2001-13-45`, `!!int ''`, `!!timestamp x`
    *(yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
)
_MOST_VALUES = 200_000
"""Values of a file once its aliases are written out; ten aliases of ten aliases of ten ... would fill a machine."""
_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._refuse(f"the key {key!r} is not text; write it in quotes", key_node)
            if key in seen:
                self._refuse(f"the key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """A scalar's text, surrogate pairs joined as JSON has them."""
        text = super().construct_scalar(node)
        if not isinstance(text, str) or text.isascii():
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._refuse("half of a surrogate pair is no character", node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return bounded(super().construct_yaml_int(node), node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = super().construct_yaml_float(node)
        return number if node.value.lstrip("+-").lower() in (".inf", ".nan") else finite(number, node.value)

    def measure(self, node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Number of values of a node with its aliases written out, and how deep they are nested.

        Raises:
            ConstructorError: They are too many, nested too deep, or without an end.
        """
        if not isinstance(node, yaml.CollectionNode):
            return 1, 1
        if id(node) not in known:
            known[id(node)] = 0, 0  # until its own values are known
            below = [each for item in node.value for each in (item if isinstance(item, tuple) else (item,))]
            sizes, depths = zip((0, 0), *(self.measure(each, known) for each in below), strict=True)
            known[id(node)] = 1 + sum(sizes), 1 + max(depths)
        size, depth = known[id(node)]
        if not size:
            self._refuse("a value that holds itself", node)
        if size > _MOST_VALUES or depth > _DEEPEST:
            self._refuse(f"more than {_MOST_VALUES} values, or nested deeper than {_DEEPEST}", node)
        return size, depth

    @staticmethod
    def _refuse(problem: str, node: yaml.Node) -> Any:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would take for a number."""


for _end in (_Loader, _Dumper):  # PyYAML's own asks for a dot and a sign
    _end.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: The text.
        where: What it is, for the message.

    Raises:
        UserError: It is not YAML, has a key twice or one that is not text, a value that is none, or more than any
            description has.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        loader.measure(node, {})
        return loader.construct_document(node)
    except _WHAT_BAD_VALUES_RAISE as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserError(f"{where} is not YAML: {said or type(error).__name__}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path, where: str) -> Any:
    """The value that a YAML file in UTF-8 stands for.

    Raises:
        UserError: It cannot be read, or see `parse_yaml`.
    """
    return parse_yaml(read_text(path, where, "YAML"), where)


def to_yaml(value: Any) -> str:
    """Plain values as YAML text that `parse_yaml` reads back as they were, numbers bit for bit."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
