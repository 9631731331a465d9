"""Files that people and other programs write are read here, so that whatever is wrong with one is told in a sentence.

Text, JSON, JSON lines, CSV and safetensors; YAML is read by `halora.yaml_files`, which builds on this. Loads no torch.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

from halora.errors import UserError, shortened

_LARGEST_TEXT = 16 * 2**20
"""Bytes of a file that is read whole, or of a line of JSONL; a description has a few thousand."""
_LARGEST_TABLE = 256 * 2**20
"""Bytes of a CSV table."""
_LARGEST_NUMBER = 2**63
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def is_folder(name: Any) -> bool:
    """Whether a text a user gave names a folder; one that cannot be a path names none."""
    return _stands(name, stat.S_ISDIR)


def is_file(name: Any) -> bool:
    """Whether a text a user gave names a regular file: not a device or a pipe, which could be read for ever."""
    return _stands(name, stat.S_ISREG)


def _stands(name: Any, kind: Any) -> bool:
    try:
        return bool(kind(Path(name).stat().st_mode))
    except (OSError, ValueError):  # no such path, one too long, one with a zero byte
        return False


def check_regular(path: Path, most_bytes: int) -> None:
    """Refuse links, devices and pipes, which hang or lead elsewhere, and files of more bytes.

    Raises:
        UserError: It is one of these, or is not there.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a regular file")
    if found.st_size > most_bytes:
        raise UserError(f"{path} has {found.st_size:,} bytes, more than the {most_bytes:,} that such a file may have")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of bounded size, see `check_regular`.

    Raises:
        UserError: It is none, or too large, or cannot be read.
    """
    check_regular(path, most_bytes)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(most_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path, where: str, what: str = "text", most_bytes: int = _LARGEST_TEXT) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        where: What it is, for the message.
        what: What it should be, for the message: `YAML`, `JSON` ...
        most_bytes: Size above which it is refused.

    Raises:
        UserError: It is no regular file, cannot be read, is too large, or is not UTF-8.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{where} cannot be read: it is a {_KINDS.get(stat.S_IFMT(about.st_mode), 'special file')}")
        if about.st_size > most_bytes:
            raise UserError(f"{where} is too large: {about.st_size} bytes, {most_bytes} at most")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decoded(content, where, what)


_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def decoded(content: bytes, where: str, what: str = "text") -> str:
    """The text of some bytes in UTF-8, with or without a byte order mark.

    Raises:
        UserError: They are none.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = " but UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(f"{where} is not {what}: it is not UTF-8{utf_16} (byte {error.start})") from None


def parse_json(text: str, where: str, most: int = _LARGEST_TEXT) -> Any:
    """The value that a JSON text stands for.

    Raises:
        UserError: It is not JSON, nested too deep, or has a number or a character that nothing can be done with.
    """
    try:
        return json_value(text, most)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def json_value(text: str, most: int = _LARGEST_TEXT) -> Any:
    """The value that a JSON text stands for, strictly: keys once, numbers finite, text that can be written.

    Raises:
        ValueError: What is wrong with it, in a few words.
    """
    if len(text) > most:
        raise ValueError(f"{len(text)} characters, {most} at most")
    try:
        value = json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_float,
            parse_int=_whole,
            object_pairs_hook=_once,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}, is no character") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _float(text: str) -> float:
    return finite(float(text), text)


def _whole(text: str) -> int:
    return bounded(int(text) if len(text) < 100 else _LARGEST_NUMBER, text)


def finite(number: float, text: str) -> float:
    """A number as it is, if the text that it was read from does not go beyond all numbers.

    Raises:
        ValueError: It does.
    """
    if not isfinite(number):
        raise ValueError(f"the number {shortened(text, 40)} is too large")
    return number


def bounded(number: int, text: str) -> int:
    """A whole number as it is, if it has 64 bits or fewer.

    Raises:
        ValueError: It has more.
    """
    if abs(number) >= _LARGEST_NUMBER:
        raise ValueError(f"the number {shortened(text, 40)} is too large")
    return number


def read_object(path: Path, where: str, most_bytes: int = _LARGEST_TEXT) -> dict[str, Any]:
    """The object that a JSON file stands for.

    Raises:
        UserError: See `read_text` and `parse_json`; or it is none.
    """
    found = parse_json(read_text(path, where, "JSON", most_bytes), where, most_bytes)
    if not isinstance(found, dict):
        raise UserError(f"{where} is not a JSON object but {type(found).__name__}")
    return found


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The value of every line of a JSONL file with where it is; in the place of a line that is none the cause.

    Yields:
        Where the line is, and its value or a `ValueError`. Empty lines are left out.

    Raises:
        UserError: The file cannot be read.
    """
    if not is_file(path):
        raise UserError(f"'{path}' is not a file")
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path} line {number}", _line_value(line, number)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from None


def _line_value(line: bytes, number: int) -> Any:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json_value(text.strip())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} of the line)")
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def read_csv(path: Path, where: str) -> list[list[str]]:
    """The cells of a CSV file, line by line; numbers of lines are those of the file where no cell has several lines.

    Raises:
        UserError: See `read_text`; or the csv module cannot read it.
    """
    text = read_text(path, where, "a table", _LARGEST_TABLE)
    try:
        return list(csv.reader(StringIO(text, newline=""), skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"{where} is not a table: {error}") from None


def tensor_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors file, by name; reads its header alone.

    Raises:
        UserError: It cannot be read, is not safetensors, or has a tensor without elements.
    """
    from safetensors import SafetensorError, safe_open

    if not is_file(path):
        raise UserError(f"{where} is not a file")
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} is not safetensors: {str(error).strip() or type(error).__name__}") from None
    if empty := [
        f"{where}: tensor '{name}' has no elements, its shape is {list(shape)}"
        for name, shape in shapes.items()
        if 0 in shape
    ]:
        raise UserError(empty)
    return shapes


def read_tensors(path: Path, where: str) -> Mapping[str, Any]:
    """Tensors of a safetensors file by name; loads torch.

    Raises:
        UserError: See `tensor_shapes`.
    """
    from safetensors.torch import load_file

    tensor_shapes(path, where)
    return load_file(path)
