"""What the event logs of a store add up to, kept in a SQLite file so that a sweep of ten thousand trials reads fast.

The file is a cache: it follows the event logs from where it last read them, and is built anew where it does not fit.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from halora.analysis.trials import RecordedTrial
from halora.errors import UserError
from halora.records import event_log
from halora.records.store import Store, SweepFolder
from halora.records.sweep_state import SweepState

_VERSION = 5
_TABLES = """
create table log (sweep text primary key, identity text not null, offset integer not null) without rowid;
create table trial (sweep text, number integer, content text not null, primary key (sweep, number)) without rowid;
"""


def read_sweep_state(store: Store, sweep: str) -> SweepState:
    """Everything recorded of a sweep.

    Raises:
        UserError: Its event log is damaged.
    """
    folder = store.sweep(sweep)
    identity = event_log.identity(folder.event_log_file)
    try:
        with _database(store) as database:
            return _followed(database, folder, identity)
    except sqlite3.Error:  # a store that cannot be written, or a file that is not an index
        recorded = SweepState()
        if identity:
            recorded.take(event_log.read(folder.event_log_file)[0])
        return recorded


def recorded_trial(store: Store, sweep: str, number: int) -> RecordedTrial:
    """A trial as its sweep's event log has it.

    Raises:
        UserError: There is no such trial.
    """
    points = {point.number: point for point in read_sweep_state(store, sweep).points()}
    if number not in points:
        known = ", ".join(map(str, list(points)[:20])) + (", ..." if len(points) > 20 else "") or "none"
        raise UserError(f"no trial '{sweep}/{number}' (numbers of '{sweep}': {known})", "see `halora front show`")
    return points[number]


def forget(store: Store, sweep: str) -> None:
    """Drop what is kept of a sweep; of one that is there it is read again."""
    if store.index_file.exists():
        with suppress(sqlite3.Error), _database(store) as database:
            for table in ("log", "trial"):
                database.execute(f"delete from {table} where sweep = ?", (sweep,))


@contextmanager
def _database(store: Store) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(store.index_file, timeout=30, isolation_level=None)) as database:
        database.execute("begin immediate")
        if database.execute("pragma user_version").fetchone()[0] != _VERSION:
            for (name,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                database.execute(f'drop table "{name}"')
            for statement in _TABLES.strip().splitlines():
                database.execute(statement)
            database.execute(f"pragma user_version = {_VERSION}")
        yield database
        database.execute("commit")


def _followed(database: sqlite3.Connection, folder: SweepFolder, identity: str) -> SweepState:
    sweep = folder.name
    known = database.execute("select identity, offset from log where sweep = ?", (sweep,)).fetchone()
    offset = known[1] if known else 0
    size = folder.event_log_file.stat().st_size if identity else 0
    if not known or known[0] != identity or offset > size:
        database.execute("delete from trial where sweep = ?", (sweep,))
        offset = 0
    rows = database.execute("select number, content from trial where sweep = ?", (sweep,))
    recorded = SweepState({number: json.loads(content) for number, content in rows})
    if identity and offset < size:
        events, offset = event_log.read(folder.event_log_file, offset)
        changed = [(sweep, number, json.dumps(recorded.contents[number])) for number in recorded.take(events)]
        database.executemany("replace into trial values (?, ?, ?)", changed)
        database.execute("replace into log values (?, ?, ?)", (sweep, identity, offset))
    return recorded
