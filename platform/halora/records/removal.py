"""What MLflow has of a launch, counted and removed.

MLflow marks a run or a logged model as deleted, and keeps its rows and files until somebody who runs the server calls
`mlflow gc`, which takes everything that anybody has marked there. So files are removed here, by the same call that
`mlflow gc` makes, and the rows are left marked. A registered version is gone at once; the name of the registered model
stays, so that no number of a version is given twice.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from halora.errors import UnreachableError
from halora.records import names
from halora.records.queries import runs
from halora.records.registry import RegisteredAdapter, registered_adapters
from halora.records.tracking import first_line, is_silence


def runs_of(client: MlflowClient, launch: str) -> list[Run]:
    """The runs of a launch that are not marked as deleted, its parent run last."""
    found = list(runs(client, names.query({names.LAUNCH: launch})))
    return sorted(found, key=lambda run: run.data.tags.get(names.KIND) == "sweep")


def adapters_of(client: MlflowClient, launch: str) -> list[RegisteredAdapter]:
    """The registered versions that come from a launch."""
    return [each for each in registered_adapters(client) if each.tags.get(names.LAUNCH) == launch]


def remove_from_mlflow(client: MlflowClient, launch: str, say: Callable[[str], None]) -> None:
    """Remove registered versions and files of a launch, and mark its runs and logged models as deleted.

    To be repeated after whatever ended it: a run goes after all that is found by it.

    Raises:
        UnreachableError: MLflow does not answer, or not any more.
    """
    try:
        for adapter in adapters_of(client, launch):
            client.delete_model_version(adapter.name, str(adapter.version))
        for run in runs_of(client, launch):
            _remove_run(client, run, say)
    except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds
        if not is_silence(error):
            raise
        told = f"MLflow at '{client.tracking_uri}' does not answer: {first_line(error)}"
        raise UnreachableError(told, "repeat the command: it goes on where it was") from None


def _remove_run(client: MlflowClient, run: Run, say: Callable[[str], None]) -> None:
    query = f"source_run_id = '{run.info.run_id}'"
    for model in client.search_logged_models([run.info.experiment_id], query):
        _remove_files(client, model.artifact_location, say)
        client.delete_logged_model(model.model_id)
    _remove_files(client, run.info.artifact_uri, say)
    client.delete_run(run.info.run_id)


def _remove_files(client: MlflowClient, place: str, say: Callable[[str], None]) -> None:
    """Remove the artifacts at a place; where they may not be removed, that is told."""
    try:
        get_artifact_repository(place, tracking_uri=client.tracking_uri).delete_artifacts()
    except FileNotFoundError:
        pass
    except Exception as error:  # of whatever stores them
        if is_silence(error):
            raise
        say(f"artifacts are left at '{place}': {first_line(error)}")
    if (url := urlsplit(place)).scheme == "file":
        with suppress(OSError):  # the folder of the run or the model, unless it has anything else
            Path(url2pathname(url.path)).parent.rmdir()
