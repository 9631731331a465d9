"""Adapters in MLflow's model registry: a registered model per base, task and chip; a version per certified adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from halora.errors import UserError, nearest
from halora.records import names, queries


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version in the registry.

    Attributes:
        name: Its registered model.
        version: Its number there.
        aliases: `candidate`, `champion`, or others that people set.
        sweep: The sweep it comes from.
        trial: Number of the trial.
        attempt: The certification it passed.
        run_id: The trial's run.
        tags: All tags, those of the gates among them.
        description: What the certificate states.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    sweep: str
    trial: int
    attempt: int
    run_id: str
    tags: Mapping[str, str]
    description: str


def log_certification(client: MlflowClient, run_id: str, attempt: int, files: Path) -> None:
    """Put the files of a certification on the trial's run, in the place of older ones."""
    client.log_artifacts(run_id, str(files), names.CERTIFICATION_FOLDER.format(attempt=attempt))


def register(
    client: MlflowClient, name: str, run: Run, tags: Mapping[str, str], description: str
) -> tuple[RegisteredAdapter, bool]:
    """Make a trial's adapter a version of a registered model, with the alias `candidate`; nothing is done twice.

    Args:
        client: MLflow.
        name: The registered model, made where it is missing.
        run: The trial's run.
        tags: Of the version; one of the same trial, attempt and adapter is taken as it is.
        description: Of the version.

    Returns:
        The version, and whether anything was changed.

    Raises:
        UserError: The run has no adapter.
    """
    model_id = queries.adapter_model_id(run)
    if model_id is None:
        raise UserError(f"run {run.info.run_id} has no adapter to register")
    own = {name: run.data.tags[name] for name in (names.SWEEP, names.LAUNCH, names.NUMBER)}
    tags = {**own, **tags}
    identity = (names.LAUNCH, names.NUMBER, names.ATTEMPT, names.ADAPTER_SHA256)
    _make_model(client, name)
    for version in _versions(client, name):
        if all(version.tags.get(key) == tags[key] for key in identity):
            found, made = version, False
            break
    else:
        # By its place: `models:/ID` is looked up in the process's default store, not in the client's.
        source = client.get_logged_model(model_id).artifact_location
        found = client.create_model_version(
            name, source, run_id=run.info.run_id, tags=tags, description=description, model_id=model_id
        )
        made = True
    changed = made or _alias(client, name, names.CANDIDATE) != int(found.version)
    if changed:
        client.set_registered_model_alias(name, names.CANDIDATE, found.version)
    return _one(client, name, int(found.version)), changed


def promote(client: MlflowClient, adapter: RegisteredAdapter) -> int | None:
    """Move the alias `champion` to a version; which version it replaced is kept in a tag.

    Returns:
        The version that was champion before; none if there was none, or if it is champion already.
    """
    before = _alias(client, adapter.name, names.CHAMPION)
    if before == adapter.version:
        return None
    replaced = "" if before is None else str(before)
    client.set_model_version_tag(adapter.name, str(adapter.version), names.REPLACED, replaced)
    client.set_registered_model_alias(adapter.name, names.CHAMPION, str(adapter.version))
    return before


def registered_adapters(client: MlflowClient) -> list[RegisteredAdapter]:
    """All versions that this project registered, by name and version."""
    found = []
    token = None
    while True:
        page = client.search_registered_models(f"tags.`{names.KIND}` = '{names.ADAPTER}'", page_token=token)
        for model in page:
            aliases = _aliases(client, model.name)
            found += [_adapter(version, aliases) for version in _versions(client, model.name)]
        token = page.token
        if not token:
            return sorted(found, key=lambda each: (each.name, each.version))


def find_adapter(client: MlflowClient, reference: str) -> RegisteredAdapter:
    """The version that `NAME@ALIAS` or `NAME/VERSION` names.

    Raises:
        UserError: There is none.
    """
    known = registered_adapters(client)
    spelled = {f"{each.name}/{each.version}": each for each in known}
    spelled |= {f"{each.name}@{alias}": each for each in known for alias in each.aliases}
    if reference not in spelled:
        there = ", ".join(spelled) or "none yet"
        raise UserError(
            f"no registered adapter '{reference}' (there: {there}){nearest(reference, spelled)}",
            "write NAME@ALIAS or NAME/VERSION; `halora adapter list` shows them",
        )
    return spelled[reference]


def _make_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name, tags={names.KIND: names.ADAPTER})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    aliases: Any = client.get_registered_model(name).aliases
    return {alias: int(version) for alias, version in aliases.items()}


def _alias(client: MlflowClient, name: str, alias: str) -> int | None:
    return _aliases(client, name).get(alias)


def _one(client: MlflowClient, name: str, version: int) -> RegisteredAdapter:
    return _adapter(client.get_model_version(name, str(version)), _aliases(client, name))


def _adapter(version: ModelVersion, aliases: Mapping[str, int]) -> RegisteredAdapter:
    number = int(version.version)
    tags = dict(version.tags)
    return RegisteredAdapter(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, at in aliases.items() if at == number)),
        sweep=tags[names.SWEEP],
        trial=int(tags[names.NUMBER]),
        attempt=int(tags[names.ATTEMPT]),
        run_id=version.run_id,
        tags=tags,
        description=version.description or "",
    )
