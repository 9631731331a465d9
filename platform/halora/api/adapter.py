"""An adapter: scored, certified and handed over."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from halora.analysis.trials import RecordedTrial, filtered
from halora.api.evaluation import Evaluation, base_of, evaluated, found_adapter
from halora.api.store import Store
from halora.errors import UserError
from halora.records import store as records
from halora.spaces.gates import Gates
from halora.spaces.mistakes import describe
from halora.spaces.sweep import SweepConfig

if TYPE_CHECKING:
    from halora.analysis.candidates import Preference, Standing
    from halora.selection.claims import Certification
    from halora.selection.selecting import Selection


Format = Literal["bundle", "peft", "gguf", "merged"]


class Adapter:
    """An adapter in a folder, of a trial, or in the registry.

    Args:
        source: Folder of a trial, of an adapter as PEFT stores it, or of a bundle; a trial of the store,
            `SWEEP/NUMBER`; or a registered adapter, `NAME@ALIAS` or `NAME/VERSION`.
        store: A `Store` or its folder.

    Raises:
        UserError: There is none.
    """

    def __init__(self, source: str | Path, *, store: Store | str | Path | None = None) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self.source = str(source)
        self._trial = None if Path(source).is_dir() else _trial_of(self.source, self.store.place)
        self._registered = "" if Path(source).is_dir() or self._trial else self.source
        if self._registered:
            _registered(self.store.place, self._registered)

    def evaluate(
        self,
        *,
        chip: str | Path | None = None,
        task: str | None = None,
        instances: int | None = None,
        rows: int | None = None,
        first_chip: int = 0,
        first_row: int = 0,
        overrides: Mapping[str, Any] | None = None,
        base: bool = False,
    ) -> Evaluation:
        """Score it on chip instances of the search pool and validation rows, by its trial or as told here.

        Args:
            chip: A preset's name or a YAML file; the trial's where left out.
            task: The trial's where left out.
            instances: Number of chip instances.
            rows: Number of validation rows.
            first_chip: Number of the first chip instance.
            first_row: Validation rows to leave out.
            overrides: Other values of the trial, by dotted path.
            base: Score the untrained base alone.

        Raises:
            UserError: With every mistake; or too little is known of its trial.
        """
        with self._folder() as folder:
            return evaluated(
                folder,
                chip=chip,
                task=task,
                instances=instances,
                rows=rows,
                first_chip=first_chip,
                first_row=first_row,
                overrides=overrides,
                base=base,
            )

    def certify(self, gates: Mapping[str, Any] | None = None, *, progress: bool = True) -> "Certification":
        """Certify it on chips that no search saw and on test rows, and register it as `candidate` if it passes.

        Every certification takes its part of the error level of its test rows, see docs/statistics.md.

        Args:
            gates: Gates that replace the sweep's, e.g. `{"min_accuracy": 0.5}`.
            progress: Say on stderr what is being done.

        Raises:
            UserError: It is not a trial of a store, does not qualify, or a gate is wrong.
        """
        if self._trial is None:
            raise UserError(f"'{self.source}' is not a trial of a store", "certify one by SWEEP/NUMBER")
        from halora.api.progress import say

        sweep, number = self._trial
        tell = say if progress else _silent
        chosen = Choice.of(self.store.place, sweep, gates or {}, trial=number)
        found = chosen.certify("knee", tell)
        if not found.certifications:
            (standing,) = found.standings
            raise UserError([f"trial '{self.source}' does not qualify: {reason}" for reason in standing.reasons])
        if found.registered is not None:
            self._registered = f"{found.registered.name}/{found.registered.version}"
        return found.certifications[-1]

    def export(
        self, place: str | Path, *, format: Format = "bundle", base: str | None = None, sign: Path | None = None
    ) -> str:
        """Write it to a new folder; for `gguf` to a new file.

        Args:
            place: The folder; that of a bundle may be on a URL.
            format: `bundle`: with chip, energy and certificate, of a registered adapter; `peft`: PEFT's two files;
                `gguf`: a LoRA for llama.cpp; `merged`: one model of `transformers`, base and adapter.
            base: Its base model, a name, hub id or folder, where its trial does not tell or is elsewhere.
            sign: File of a private Ed25519 key to sign a bundle with.

        Returns:
            What is given up by the format; else empty.

        Raises:
            UserError: The place exists, the adapter is not registered, or the format has no place for it.
        """
        if format != "bundle":
            from halora.selection.handover import MERGED, hand_over

            if sign is not None:
                raise UserError("sign: a bundle is signed, and nothing else")
            with self._folder() as folder:
                hand_over(found_adapter(folder)[0], Path(place), format, base or base_of(folder))
            return MERGED if format == "merged" else ""
        if not self._registered:
            raise UserError(
                f"'{self.source}' is not registered, and a bundle holds a certificate",
                "certify it first, name a registered adapter (NAME@ALIAS), or export it as peft, gguf or merged",
            )
        from halora.records.registry import find_adapter
        from halora.records.tracking import open_client
        from halora.selection.bundle import export_to

        client = open_client(self.store.place)
        export_to(client, find_adapter(client, self._registered), str(place), sign)
        return ""

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The folder of its files; of one that MLflow has, a copy."""
        if not self._trial and not self._registered:
            yield Path(self.source)
            return
        place = self.store.place
        if self._trial and (own := place.sweep(self._trial[0]).trial(self._trial[1])).is_dir():
            from halora.trial_folder import adapter_folder

            if adapter_folder(own):
                yield own
                return
        with TemporaryDirectory() as scratch:
            yield _download(place, self._trial, self._registered, Path(scratch))

    def __repr__(self) -> str:
        return f"Adapter({self.source!r})"


def _silent(text: str) -> None:
    """Says nothing."""


def _trial_of(reference: str, place: records.Store) -> tuple[str, int] | None:
    """Sweep and number of a trial of the store; nothing where the reference is none."""
    sweep, _, number = reference.rpartition("/")
    if not number.isdecimal() or sweep not in place.sweeps(archived=True):
        return None
    from halora.records.index import recorded_trial

    recorded_trial(place, sweep, int(number))
    return sweep, int(number)


def _registered(place: records.Store, reference: str) -> Any:
    from halora.records.registry import find_adapter
    from halora.records.tracking import open_client

    if not place.root.exists():
        raise UserError(
            f"no adapter '{reference}': no folder, and there is no store '{place.root}'",
            "name a folder, SWEEP/NUMBER, NAME@ALIAS or NAME/VERSION",
        )
    return find_adapter(open_client(place), reference)


def _download(place: records.Store, trial: tuple[str, int] | None, registered: str, scratch: Path) -> Path:
    """A copy of an adapter's files and of its trial, from MLflow."""
    from halora.files import write_json
    from halora.records import queries
    from halora.records.tracking import open_client
    from halora.sweep.run.state import load_sweep_of
    from halora.trial_folder import TRIAL_FILE

    if trial:
        sweep, number = trial
        client = open_client(place.serving(sweep))
        run = queries.trial_run(client, sweep, load_sweep_of(place.existing(sweep)).launch, number)
    else:
        client = open_client(place)
        run = client.get_run(_registered(place, registered).run_id)
    folder = queries.download_adapter(client, run, scratch / "adapter")
    if folder is None:
        raise UserError("the trial has no adapter", "name a finished trial")
    write_json(scratch / TRIAL_FILE, queries.logged_config(client, run.info.run_id).model_dump(mode="json"))
    return folder


class Choice:
    """Trials of a sweep from which one is to be certified, and the gates it has to pass.

    Attributes:
        place: The store, with the server that the sweep is recorded in.
        sweep: The sweep.
        gates: Its gates, or what replaces them.
        points: The trials.
    """

    def __init__(self, place: records.Store, sweep: SweepConfig, gates: Gates, points: Sequence[RecordedTrial]) -> None:
        self.place, self.sweep, self.gates, self.points = place, sweep, gates, list(points)

    @classmethod
    def of(
        cls,
        place: records.Store,
        name: str,
        asked: Mapping[str, Any],
        *,
        trial: int | None = None,
        conditions: Sequence[str] = (),
    ) -> "Choice":
        """One trial of a sweep, or all that meet conditions, and its gates with others in their places.

        Raises:
            UserError: There is no such sweep or trial, none meets the conditions, a condition or a gate is wrong, or no
                gate bounds the accuracy.
        """
        from halora.records.index import recorded_trial
        from halora.sweep.run.state import load_sweep_of

        sweep = load_sweep_of(place.existing(name))
        try:
            gates = Gates.model_validate(sweep.gates.model_dump() | dict(asked))
        except ValidationError as error:
            raise UserError([f"gates.{problem}" for problem in describe(error, Gates)]) from None
        if place.sweep(name).simulated:
            raise UserError(f"sweep '{name}' is simulated from recorded curves: there is no adapter to certify")
        points = Store(place).trials(name) if trial is None else [recorded_trial(place, name, trial)]
        if not points:
            raise UserError(f"sweep '{name}' has no trial yet")
        found = filtered(points, conditions)
        if not found:
            raise UserError(f"no trial of sweep '{name}' meets {' and '.join(conditions)}")
        if not gates.min_accuracy:
            raise UserError(
                "gates.min_accuracy: 0, which every chip reaches; a certificate says something only above it",
                f"halora adapter select {name} --min-accuracy 0.5, or set gates.min_accuracy in the sweep file",
            )
        return cls(place.serving(name), sweep, gates, found)

    def standings(self, prefer: "Preference") -> "list[Standing]":
        """All trials, candidates first in the order they are preferred."""
        from halora.analysis.candidates import standings
        from halora.analysis.trials import sweep_objectives

        return standings(self.points, self.gates, prefer, sweep_objectives(self.sweep))

    def certify(self, prefer: "Preference", say: Callable[[str], None]) -> "Selection":
        """Certify the preferred candidate, or the next, and register the first that passes."""
        from halora.selection.selecting import select

        return select(self.place, self.sweep, self.points, self.gates, prefer, say)
