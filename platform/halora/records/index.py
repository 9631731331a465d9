"""What the journals of a store add up to, kept in a SQLite file so that a sweep of ten thousand trials reads fast.

The file is a cache: it follows the journals from where it last read them, and is built anew where it does not fit.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

from halora.analysis.trials import RecordedTrial
from halora.errors import UserError
from halora.records import journal
from halora.records.ledger import Ledger
from halora.records.store import Store, SweepFolder

_VERSION = 3
_TABLES = """
create table journal (sweep text primary key, identity text not null, offset integer not null) without rowid;
create table trial (sweep text, number integer, content text not null, primary key (sweep, number)) without rowid;
"""


def read_ledger(store: Store, sweep: str) -> Ledger:
    """Everything recorded of a sweep.

    Raises:
        UserError: Its journal is damaged.
    """
    folder = store.sweep(sweep)
    identity = journal.identity(folder.journal_file)
    try:
        with _database(store) as database:
            return _followed(database, folder, identity)
    except sqlite3.Error:  # a store that cannot be written, or a file that is not an index
        ledger = Ledger()
        if identity:
            ledger.take(journal.read(folder.journal_file)[0])
        return ledger


def recorded_trial(store: Store, sweep: str, number: int) -> RecordedTrial:
    """A trial as its sweep's journal has it.

    Raises:
        UserError: There is no such trial.
    """
    points = {point.number: point for point in read_ledger(store, sweep).points()}
    if number not in points:
        known = ", ".join(map(str, list(points)[:20])) + (", ..." if len(points) > 20 else "") or "none"
        raise UserError(f"no trial '{sweep}/{number}' (numbers of '{sweep}': {known})", "see `halora front show`")
    return points[number]


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


def _followed(database: sqlite3.Connection, folder: SweepFolder, identity: str) -> Ledger:
    sweep = folder.name
    known = database.execute("select identity, offset from journal where sweep = ?", (sweep,)).fetchone()
    offset = known[1] if known else 0
    size = folder.journal_file.stat().st_size if identity else 0
    if not known or known[0] != identity or offset > size:
        database.execute("delete from trial where sweep = ?", (sweep,))
        offset = 0
    rows = database.execute("select number, content from trial where sweep = ?", (sweep,))
    ledger = Ledger({number: json.loads(content) for number, content in rows})
    if identity and offset < size:
        entries, offset = journal.read(folder.journal_file, offset)
        changed = [(sweep, number, json.dumps(ledger.contents[number])) for number in ledger.take(entries)]
        database.executemany("replace into trial values (?, ?, ?)", changed)
        database.execute("replace into journal values (?, ?, ?)", (sweep, identity, offset))
    return ledger
