"""What a user is told when something they can fix is wrong; imports nothing of the project."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """One or more mistakes a user can fix, all told at once, with the next step.

    Args:
        problems: One sentence each: where, what was given, what is allowed.
        next_step: What to do now; left empty where the problems say it themselves.
    """

    def __init__(self, problems: str | Sequence[str], next_step: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.next_step = next_step
        super().__init__("; ".join(self.problems) + (f" ({next_step})" if next_step else ""))

    def __reduce__(self) -> tuple[type["UserError"], tuple[list[str], str]]:
        return type(self), (self.problems, self.next_step)


class UnreachableError(UserError):
    """The cluster or the tracking store cannot be reached or written."""


class StorageError(UnreachableError):
    """Storage cannot be reached, read or written now; what is in it is as it was."""


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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing."""
    matches = get_close_matches(name, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""
