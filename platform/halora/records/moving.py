"""A store that was moved or copied: MLflow keeps absolute places of artifacts, and its own are made to follow it."""

import sqlite3
from contextlib import closing

from halora.records.store import Store

_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold the place of an artifact."""


def follow(store: Store) -> None:
    """Have the store's own database name artifacts where they are now; a server keeps artifacts itself.

    Raises:
        sqlite3.Error: The database cannot be read or written now.
    """
    if store.server or not (store.database_file.exists() and store.artifacts.is_dir()):
        return
    here = store.artifacts.as_uri()
    with closing(sqlite3.connect(store.database_file, timeout=30)) as database, database:
        if not database.execute("select 1 from sqlite_master where name = 'model_versions'").fetchone():
            return  # another process is making it
        families = database.execute("select artifact_location, name from experiments").fetchall()
        for place in {place.removesuffix(f"/{name}") for place, name in families if _is_ours(place, name)} - {here}:
            for table, column in _PLACES:
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                    (here, len(place) + 1, len(place) + 1, f"{place}/"),
                )


def _is_ours(place: str | None, family: str) -> bool:
    return place is not None and place.startswith("file:") and place.endswith(f"/artifacts/{family}")
