"""How far a sweep's event log is delivered."""

import json
from contextlib import suppress

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

    It would refuse them again; they are kept in the sweep's `refused_file`.
    """
    if not folder.refused_file.exists():
        return {}
    kept = [json.loads(line) for line in folder.refused_file.read_text(encoding="utf-8").splitlines()]
    return {each["event"]["trial"]: str(each["error"]) for each in kept}
