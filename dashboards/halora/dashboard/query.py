"""What a page shows, as its URL says it: constraints, sorting, shortlist."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

_BOUNDS = {"accuracy": ">=", "energy": "<=", "drop": "<=", "rank": "<="}
_FIELDS = {"energy": "energy_uj_per_token"}
_MOST_PICKED = 24
_LONGEST = 400  # characters of one text


@dataclass(frozen=True)
class SweepQuery:
    """State of a sweep's page.

    Attributes:
        accuracy: Least accuracy under noise, as typed; empty for any.
        energy: Most energy per token in microjoule, as typed.
        drop: Most that noise may cost in accuracy, as typed.
        rank: Highest rank, as typed.
        method: The only training method; empty for any.
        model: The only model; empty for any.
        filter: Further conditions, see `halora.analysis.trials.filtered`.
        pick: Numbers of the shortlisted trials.
        colour: Label that colour and shape stand for.
        shown: Accuracy drawn upwards: under noise, or clean.
        sort: Column that the table is sorted by, with `-` before it for falling.
        page: Page of the table.
    """

    accuracy: str = ""
    energy: str = ""
    drop: str = ""
    rank: str = ""
    method: str = ""
    model: str = ""
    filter: tuple[str, ...] = ()
    pick: tuple[int, ...] = ()
    colour: str = "method"
    shown: str = "accuracy"
    sort: str = "energy_uj_per_token"
    page: int = 1

    @classmethod
    def of(cls, params: QueryParams) -> "SweepQuery":
        """The state a URL holds; what is malformed is left out."""
        texts = {name: params.get(name, "").strip()[:_LONGEST] for name in (*_BOUNDS, "method", "model")}
        filters = dict.fromkeys(text.strip()[:_LONGEST] for text in params.getlist("filter"))
        picks = dict.fromkeys(int(text) for text in params.getlist("pick") if text.isdecimal() and len(text) < 9)
        page, colour = params.get("page", ""), params.get("colour", "")
        return cls(
            **texts,
            filter=tuple(text for text in filters if text),
            pick=tuple(picks)[:_MOST_PICKED],
            colour=colour if colour in ("method", "model", "chip") else cls.colour,
            shown="clean_accuracy" if params.get("shown") == "clean_accuracy" else "accuracy",
            sort=params.get("sort", "")[:_LONGEST] or cls.sort,
            page=int(page) if page.isdecimal() and 0 < len(page) < 7 and int(page) else 1,
        )

    @property
    def problems(self) -> list[str]:
        """Bounds that are not numbers."""
        return [f"{name}: '{text}' is not a number" for name, text in self._bounds() if not _is_number(text)]

    @property
    def conditions(self) -> list[str]:
        """All constraints as conditions."""
        bounds = [f"{_FIELDS.get(name, name)}{_BOUNDS[name]}{text}" for name, text in self._bounds()]
        labels = [f"{name}={getattr(self, name)}" for name in ("method", "model") if getattr(self, name)]
        return [*bounds, *labels, *self.filter]

    def _bounds(self) -> list[tuple[str, str]]:
        return [(name, text) for name in _BOUNDS if (text := getattr(self, name))]

    def url(self, **changes: Any) -> str:
        """The query of this state with changes, without what is as by default: `?...`, or `?` alone."""
        state = replace(self, **changes)
        pairs: list[tuple[str, Any]] = []
        for each in fields(self):
            value = getattr(state, each.name)
            if isinstance(value, tuple):
                pairs += [(each.name, item) for item in value]
            elif value != each.default:
                pairs.append((each.name, value))
        return "?" + urlencode(pairs, errors="surrogatepass")

    def without_filter(self, text: str) -> str:
        """The query without one of its conditions."""
        return self.url(filter=tuple(each for each in self.filter if each != text), page=1)

    def without_pick(self, number: int) -> str:
        """The query without one of its shortlisted trials."""
        return self.url(pick=tuple(each for each in self.pick if each != number))

    def sorted_by(self, column: str) -> str:
        """The query sorted by a column, the other way round if it is already."""
        return self.url(sort=f"-{column}" if self.sort == column else column, page=1)


def sort_direction(query: SweepQuery, column: str) -> str:
    """`ascending` or `descending` where the table is sorted by the column, else `none`."""
    return {column: "ascending", f"-{column}": "descending"}.get(query.sort, "none")


def page_of[T](items: Sequence[T], page: int, size: int) -> tuple[Sequence[T], int, int]:
    """The items of a page, the number of the page that is there, and the number of pages."""
    pages = max(-(-len(items) // size), 1)
    page = min(page, pages)
    return items[(page - 1) * size : page * size], page, pages


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
