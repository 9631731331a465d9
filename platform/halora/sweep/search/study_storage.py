"""Where a sweep's study lives: a journal file in its folder, or a database, which may be away for a while."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from halora.errors import UnreachableError, UserError, causes
from halora.files import locked
from halora.records.event_log import append_line
from halora.records.store import SweepFolder
from halora.retries import backoff_s, retried

STUDY_URL = "HALORA_STUDY_URL"
"""Environment variable: SQLAlchemy's address of a database for studies, such as a cluster's PostgreSQL."""

_PATIENCE_S = 900.0  # how long a running sweep waits for a database that has gone
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 5.0
_CONNECTING_S = 10  # that a database may take to answer


def storage_of(folder: SweepFolder, say: Callable[[str], None] = lambda text: None) -> BaseStorage:
    """Where the sweep's study lives: a journal file in its folder, or the database that `$HALORA_STUDY_URL` named.

    Args:
        folder: The sweep's folder.
        say: Told in one line when the database has gone, and when it is back.

    Raises:
        UserError: The study is in a database, and the variable is not set.
        UnreachableError: The database cannot be opened.
    """
    url = os.environ.get(STUDY_URL)
    if folder.study_file.exists() or not (url or folder.database_mark.exists()):
        return JournalStorage(StudyFile(str(folder.study_file)))
    if not url:
        raise UserError(f"the study of sweep '{folder.name}' is in a database", f"set ${STUDY_URL} to its address")
    storage = _opened(url, say)
    folder.database_mark.touch()
    return storage


def check_study(folder: SweepFolder) -> None:
    """Open the database that a sweep's study is in, if it is in one; see `storage_of` for errors."""
    if folder.database_mark.exists():
        storage_of(folder)


def remove_study(folder: SweepFolder, name: str) -> None:
    """Remove a study from the database that it is in; one in a journal goes with the sweep's folder. To be repeated.

    Raises:
        UserError: It is in a database, and the variable is not set.
        UnreachableError: The database cannot be opened, or has gone.
    """
    if not folder.database_mark.exists():
        return
    storage = storage_of(folder)
    try:
        optuna.delete_study(study_name=name, storage=storage)
    except KeyError:
        pass  # removed before
    except (StorageInternalError, SQLAlchemyError) as error:
        told = f"the study's database refuses, or has gone: {_cause(error, os.environ.get(STUDY_URL, ''))}"
        raise UnreachableError(told, "repeat the command: it goes on where it was") from None


def check_database() -> None:
    """Refuse to launch where the database for studies, if there is one, cannot be opened.

    Raises:
        UnreachableError: It cannot.
    """
    if url := os.environ.get(STUDY_URL):
        _opened(url, lambda text: None)


def _opened(url: str, say: Callable[[str], None]) -> "PatientStorage":
    try:
        return PatientStorage(url, say)
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds
        told = f"the study's database (${STUDY_URL}) cannot be opened: {_cause(error, url)}"
        raise UnreachableError(told) from None


class StudyFile(JournalFileBackend):
    """Optuna's journal file, of which a crash or a full disk leaves whole lines only.

    Optuna's own lock is a second file, which a process that is killed leaves behind; this one is the system's.
    """

    def append_logs(self, logs: Sequence[Any]) -> None:
        """Add lines, all of them or none."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with locked(Path(self._file_path)), open(self._file_path, "r+b", buffering=0) as file:
            append_line(file.fileno(), lines.encode())
            os.fsync(file.fileno())


class PatientStorage(RDBStorage):
    """Optuna's storage in a database that may go away for some minutes: whatever is asked of it meanwhile waits.

    A question is asked again, and a change made again; one that the database had made before it went is not made
    twice.

    Args:
        url: SQLAlchemy's address of the database.
        say: Told in one line when it has gone, and when it is back.
    """

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        known = url.startswith(("postgresql", "mysql", "mariadb"))
        waiting = {"connect_timeout": _CONNECTING_S} if known else {}
        super().__init__(url, engine_kwargs={"pool_pre_ping": True, "connect_args": waiting})
        self._say, self._given_up = say, False

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        assert template_trial is not None  # trials are begun with all their values
        begun = template_trial.datetime_start

        def again() -> FrozenTrial:
            known = RDBStorage._get_trials(self, study_id, None, set(), -1)
            made = next((trial for trial in known if trial.datetime_start == begun), None)
            return made or create()

        def create() -> FrozenTrial:
            return RDBStorage._create_new_trial(self, study_id, template_trial)

        return self._patiently(create, again)

    def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
        """See the base class."""

        def change() -> bool:
            return RDBStorage.set_trial_state_values(self, trial_id, state, values)

        def again() -> bool:
            try:
                return change()
            except UpdateFinishedTrialError:  # it was made
                return True

        return self._patiently(change, again)

    def _patiently[T](self, call: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """What `call` gives, or `again` gives once the database is back.

        Raises:
            UnreachableError: It stays away, or refuses for a reason that waiting does not change.
        """
        gone = False

        def waiting() -> None:
            nonlocal gone
            if not gone:
                self._say("the study's database has gone; the sweep waits for it")
            gone = True

        waits_s = () if self._given_up else backoff_s(_FIRST_DELAY_S, _LONGEST_DELAY_S, _PATIENCE_S)
        try:
            found = retried(lambda: (again if again and gone else call)(), _is_away, waits_s, waiting)
        except (StorageInternalError, SQLAlchemyError) as error:
            if not _is_away(error):
                told = f"the study's database refuses: {_cause(error, self.url)}"
                raise UnreachableError(told, "put that right and resume the sweep") from None
            self._given_up = True  # what is still to be written at the end of the sweep waits no more
            told = f"the study's database has been away for {_PATIENCE_S / 60:.0f} minutes"
            raise UnreachableError(told, "start it and resume the sweep") from None
        if gone:
            self._say("the study's database is back")
        return found


def _waiting(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    def call(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return self._patiently(lambda: method(self, *arguments, **named))

    return cast(Callable[..., Any], call)


for _name in (
    "create_new_study",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_trial_id_from_study_id_trial_number",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "_set_trial_param",
    "_get_trials",
    "get_trial",
):
    setattr(PatientStorage, _name, _waiting(_name))


def _is_away(error: BaseException) -> bool:
    """Whether an error is for want of the database, and not by it; it may have led to others on its way.

    A server that can be reached and refuses says why with the code of its error, or as FATAL while it is connected to.
    """
    if not isinstance(error, StorageInternalError | SQLAlchemyError):
        return False
    for each in causes(error):
        if isinstance(each, DBAPIError):
            text, code = str(each.orig), str(getattr(each.orig, "sqlstate", None) or "")
            if code.startswith(_AWAY_CODES) or _AWAY.search(text):
                return True
            if not code and not _REFUSED.search(text) and (each.connection_invalidated or _CUT_OFF.search(text)):
                return True
    return False


_AWAY_CODES = ("08", "57P", "53300")  # of PostgreSQL: the connection, the server's end or start, too many connections
_AWAY = re.compile(r"starting up|shutting down|in recovery|too many (clients|connections)|terminating connection", re.I)
_CUT_OFF = re.compile(r"connect|resolve|closed|timeout|timed out|network|route to host", re.I)
_REFUSED = re.compile(r"FATAL|authentication|does not exist|denied|database is full|readonly", re.I)


def _cause(error: BaseException, url: str) -> str:
    """What a database said, on one line, without its password."""
    said = next((each.orig for each in causes(error) if isinstance(each, DBAPIError) and each.orig), None)
    if said is None:
        return type(error).__name__  # its text may hold the password
    text = " ".join(str(said).split())[:300]
    password = make_url(url).password
    return text.replace(str(password), "***") if password else text
