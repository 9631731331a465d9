"""What a user is told when something they can fix is wrong."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches

from halora.secret_urls import hidden

_LONGEST = 1000
"""Characters of one problem; what is in the middle of a longer one is left out."""
_MOST = 200
"""Problems told at once."""


class UserError(ValueError):
    """One or more mistakes a user can fix, all told at once, with the next step.

    Problems quote what was given, whatever that is: they are bounded in length and number, and can be printed;
    URLs with a secret are told by their scheme alone.

    Args:
        problems: One sentence each: where, what was given, what is allowed.
        next_step: What to do now; left empty where the problems say it themselves.
    """

    def __init__(self, problems: str | Sequence[str], next_step: str = "") -> None:
        given = [problems] if isinstance(problems, str) else list(problems)
        if len(given) > _MOST:
            given[_MOST - 1 :] = [f"and {len(given) - _MOST + 1} more problems"]
        self.problems = [printable(shortened(hidden(problem))) for problem in given]
        self.next_step = printable(shortened(hidden(next_step)))
        super().__init__("; ".join(self.problems) + (f" ({self.next_step})" if next_step else ""))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[str], str]]:
        return type(self), (self.problems, self.next_step)


class UnreachableError(UserError):
    """The cluster or the tracking store cannot be reached or written."""


class StorageError(UnreachableError):
    """Storage cannot be reached, read or written now; what is in it is as it was."""


def shortened(text: str, most: int = _LONGEST) -> str:
    """A text with its middle left out where it has more than so many characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def printable(text: str) -> str:
    """A text as a terminal and a file can take it: control characters and lone surrogates by their escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, from the last to the first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def attempt[T](problems: list[str], call: Callable[[], T]) -> T | None:
    """What `call` gives, or nothing and its problems, added to `problems`."""
    try:
        return call()
    except UserError as error:
        problems += error.problems
        return None


def check_all(*checks: Callable[[], object]) -> None:
    """Make several checks, and tell the problems of all of them at once.

    Raises:
        UserError: Some failed; an `UnreachableError` at once.
    """
    problems: list[str] = []
    next_steps: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except UnreachableError:
            raise
        except UserError as error:
            problems += error.problems
            next_steps |= {error.next_step: None} if error.next_step else {}
    if problems:
        raise UserError(list(dict.fromkeys(problems)), "; ".join(next_steps))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing."""
    spelled = {each.lower(): each for each in known}
    matches = get_close_matches(name.lower(), list(spelled), n=1)
    return f"; did you mean '{spelled[matches[0]]}'?" if matches else ""
