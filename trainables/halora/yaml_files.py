"""YAML as people write it: keys once, numbers as YAML 1.2 has them (1e-4 is one), mistakes told in one sentence."""

import re
from pathlib import Path
from typing import Any

import yaml

from halora.errors import UserError

_WHAT_BAD_VALUES_RAISE = (yaml.YAMLError, ValueError, IndexError, RecursionError)  # e.g. `2001-13-45`, `!!int ''`


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._refuse(f"the key {key!r} is not text; write it in quotes", key_node)
            if key in seen:
                self._refuse(f"the key '{key}' is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refuse(problem: str, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_implicit_resolver(  # PyYAML's own asks for a dot and a sign
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: The text.
        where: What it is, for the message.

    Raises:
        UserError: It is not YAML, has a key twice or one that is not text, or a value that is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _WHAT_BAD_VALUES_RAISE as error:
        said = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise UserError(f"{where} is not YAML: {said or type(error).__name__}") from None


def read_yaml(path: Path, where: str) -> Any:
    """The value that a YAML file in UTF-8 stands for.

    Raises:
        UserError: It cannot be read, or see `parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not YAML: it is not UTF-8 (byte {error.start})") from None
    return parse_yaml(text, where)
