"""Where a sweep's study lives: a journal file in its folder, or a database, which may be away for a while."""

import os
import time
from collections.abc import Callable
from typing import Any, cast

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from halora.errors import UnreachableError, UserError
from halora.records.store import SweepFolder

STUDY_URL = "HALORA_STUDY_URL"
"""Environment variable: SQLAlchemy's address of a database for studies, such as a cluster's PostgreSQL."""

_PATIENCE_S = 900.0  # how long a running sweep waits for a database that has gone
_LONGEST_DELAY_S = 5.0


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
        return JournalStorage(JournalFileBackend(str(folder.study_file)))
    if not url:
        raise UserError(f"the study of sweep '{folder.name}' is in a database", f"set ${STUDY_URL} to its address")
    try:
        storage = PatientStorage(url, say)
    except Exception as error:  # SQLAlchemy and its drivers raise many kinds; their texts may hold the password
        kind = type(error).__name__
        raise UnreachableError(f"the study's database (${STUDY_URL}) cannot be opened: {kind}") from None
    folder.database_mark.touch()
    return storage


class PatientStorage(RDBStorage):
    """Optuna's storage in a database that may go away for some minutes: whatever is asked of it meanwhile waits.

    A question is asked again, and a change made again; one that the database had made before it went is not made
    twice.

    Args:
        url: SQLAlchemy's address of the database.
        say: Told in one line when it has gone, and when it is back.
    """

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        super().__init__(url, engine_kwargs={"pool_pre_ping": True})
        self._say = say

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
        """What `call` gives, or `again` gives once the database is back."""
        end, delay_s, gone = time.monotonic() + _PATIENCE_S, 0.2, False
        while True:
            try:
                found = (again if again and gone else call)()
            except (StorageInternalError, SQLAlchemyError) as error:
                if not _is_away(error):
                    raise
                if time.monotonic() > end:
                    told = f"the study's database has been away for {_PATIENCE_S / 60:.0f} minutes"
                    raise UnreachableError(told, "start it and resume the sweep") from None
                if not gone:
                    self._say("the study's database has gone; the sweep waits for it")
                gone = True
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            else:
                if gone:
                    self._say("the study's database is back")
                return found


def _waiting(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    def call(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return self._patiently(lambda: method(self, *arguments, **named))

    return cast(Callable[..., Any], call)


for _name in (
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
    """Whether an error is for want of the database, and not by it; it may have led to others on its way."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DBAPIError) and (found.connection_invalidated or "connection" in str(found).lower()):
            return True
        found = found.__cause__ or found.__context__
    return False
