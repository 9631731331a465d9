"""How far a sweep's journal is delivered."""

import json
from contextlib import suppress

from halora.files import write_whole
from halora.records import journal
from halora.records.store import Store, SweepFolder


class Position:
    """How far a journal is delivered to one MLflow; another MLflow gets it from its beginning.

    Args:
        folder: The sweep's folder.
        tracking_uri: Of that MLflow.
    """

    def __init__(self, folder: SweepFolder, tracking_uri: str) -> None:
        self._folder = folder
        self._what = {"journal": journal.identity(folder.journal_file), "tracking_uri": tracking_uri}
        self.offset = 0
        with suppress(OSError, ValueError):  # none yet, or one that a power cut emptied
            sent = json.loads(folder.sent_file.read_text(encoding="utf-8"))
            if self._what.items() <= sent.items():
                self.offset = int(sent["offset"])

    def move(self, offset: int) -> None:
        """Remember that all before is delivered."""
        self.offset = offset
        write_whole(self._folder.sent_file, json.dumps({**self._what, "offset": offset}))

    def left(self) -> int:
        """Number of entries that are not delivered."""
        return len(journal.read(self._folder.journal_file, self.offset)[0])


def undelivered(store: Store, sweep: str) -> int:
    """Number of a sweep's entries that its MLflow lacks."""
    folder = store.sweep(sweep)
    return Position(folder, store.serving(sweep).tracking_uri).left() if folder.journal_file.exists() else 0
