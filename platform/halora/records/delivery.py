"""How far a sweep's event log is delivered."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from halora.events import Event
from halora.files import write_whole
from halora.records import event_log
from halora.records.store import Store, SweepFolder


class DeliveryOffset:
    """How far an event log is delivered to one MLflow; another MLflow gets it from its beginning.

    Args:
        folder: The sweep's folder.
        server: URI of that MLflow; empty for the store's own, wherever the store is.
    """

    def __init__(self, folder: SweepFolder, server: str) -> None:
        self._folder = folder
        self._what = {"log": event_log.identity(folder.event_log_file), "server": server}
        self.offset = 0
        with suppress(OSError, ValueError):  # none yet, or one that a power cut emptied
            sent = json.loads(folder.sent_file.read_text(encoding="utf-8"))
            if self._what.items() <= sent.items():
                self.offset = int(sent["offset"])

    def move(self, offset: int) -> None:
        """Remember that all before is delivered."""
        self.offset = offset
        write_whole(
            self._folder.sent_file, json.dumps({**self._what, "offset": offset}), durable=False
        )  # else some is delivered again

    def left(self) -> int:
        """Number of events that are not delivered."""
        return len(event_log.read(self._folder.event_log_file, self.offset)[0])


def undelivered(store: Store, sweep: str) -> int:
    """Number of a sweep's events that its MLflow lacks."""
    folder = store.sweep(sweep)
    return DeliveryOffset(folder, store.serving(sweep).server).left() if folder.event_log_file.exists() else 0


def refused(folder: SweepFolder) -> dict[int | None, str]:
    """Why MLflow refused records of a sweep, by the trial they are of; none for the sweep itself.

    They are kept in the sweep's `refused_file` until they are delivered after all, perhaps to another MLflow.
    """
    return {each["event"]["trial"]: str(each["error"]) for each in _refused(folder)}


def keep_refused(folder: SweepFolder, event: Event, error: str) -> None:
    """Keep an event and why it was refused, once, however often it is."""
    others = [each for each in _refused(folder) if _text(each["event"]) != _text(event.to_json())]
    _write_refused(folder, [*others, {"event": event.to_json(), "error": error}])


def keep_delivered(folder: SweepFolder, events: Sequence[Event]) -> None:
    """Forget that events were refused which now are delivered."""
    if kept := _refused(folder):
        delivered = {_text(event.to_json()) for event in events}
        left = [each for each in kept if _text(each["event"]) not in delivered]
        if len(left) < len(kept):
            _write_refused(folder, left)


def _text(event: Mapping[str, Any]) -> str:
    """The same for the same event, where a metric is not a number too."""
    return json.dumps(event, sort_keys=True)


def _refused(folder: SweepFolder) -> list[dict[str, Any]]:
    if not folder.refused_file.exists():
        return []
    return [json.loads(line) for line in folder.refused_file.read_text(encoding="utf-8").splitlines()]


def _write_refused(folder: SweepFolder, kept: Sequence[Mapping[str, Any]]) -> None:
    if kept:
        write_whole(folder.refused_file, "".join(f"{json.dumps(each)}\n" for each in kept))
    else:
        folder.refused_file.unlink()
