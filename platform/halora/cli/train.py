"""`halora train` and `halora evaluate`: one configuration outside a sweep, by the code that a sweep runs."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halora.cli.arguments import overrides_from
from halora.cli.output import Format, FormatOption, say, show_rows
from halora.errors import UserError

if TYPE_CHECKING:
    from halora.evaluation.chips import ChipScores
    from halora.evaluation.harness import HarnessScore
    from halora.settings.trial import TrialConfig
    from halora.trial_runner import TrialRunner

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a value of the trial, e.g. training.steps=40."),
]


def train(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A trial's YAML file, or a sweep, whose fixed values are taken.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, reports, scores and the adapter.")],
    set_: SetOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train so many adapters, from the trial's seed on, each in a folder of its own.")
    ] = 1,
    scores: Annotated[bool, typer.Option(help="Score the adapter on chip instances once it is trained.")] = True,
    form: FormatOption = Format.TABLE,
) -> None:
    """Train one configuration, resuming from its last checkpoint in the output folder, and score its adapter."""
    from halora.spaces.sweep import load_trial

    config = load_trial(file, overrides_from(set_, example="training.steps=40"))
    runs = {output: config} if seeds == 1 else _by_seed(output, config, seeds)
    for folder, each in runs.items():
        _check_output(folder, each)

    from halora.evaluation.chips import summary_over_seeds
    from halora.files import write_json
    from halora.pricing import trial_energy
    from halora.trial_folder import RESULT_FILE, adapter_folder
    from halora.trial_runner import TrialRunner

    runner = TrialRunner()
    found: list[ChipScores] = []
    for folder, each in runs.items():
        if seeds > 1:
            say(f"seed {each.seed}, {len(found) + 1} of {seeds}")
        _train(runner, each, folder)
        adapter = adapter_folder(folder)
        say(f"adapter: {adapter}")
        if scores:
            say(f"scoring on {each.evaluation.chip_instances} chip instances")
            found.append(runner.evaluate(each, adapter))
            write_json(folder / RESULT_FILE, found[-1].to_json())
    if not found:
        return
    summary = summary_over_seeds(found) | trial_energy(config).metrics
    show_rows(_by_name(summary, form), form, str(output))
    _tell_scope(seeds, config.evaluation.chip_instances)


def _by_seed(output: Path, config: "TrialConfig", seeds: int) -> "dict[Path, TrialConfig]":
    """The trial with so many seeds, from its own on, and the folder of each.

    Raises:
        UserError: The folder holds a trial of its own.
    """
    from halora.trial_folder import TRIAL_FILE

    if (output / TRIAL_FILE).exists():
        raise UserError(f"'{output}' holds a trial of one seed", "name another folder")
    each = [config.seed + i for i in range(seeds)]
    return {output / f"seed-{seed:05d}": config.model_copy(update={"seed": seed}) for seed in each}


def _tell_scope(seeds: int, chips: int) -> None:
    """Say what the intervals are over."""
    from halora.evaluation.decisions import ENOUGH_SEEDS

    over = "rows alone" if chips == 1 else "chips and rows"
    said = f"intervals are over {'training seeds, ' if seeds > 1 else ''}{over}"
    if seeds < ENOUGH_SEEDS:
        which = "this adapter" if seeds == 1 else f"these {seeds} adapters"
        said += f"; this speaks of {which}, not of the method (--seeds {ENOUGH_SEEDS} or more)"
    if chips == 1:
        said += "; one chip says nothing about others"
    say(said)


def _train(runner: "TrialRunner", config: "TrialConfig", output: Path) -> None:
    """Train, or resume from the last checkpoint in the folder."""
    try:
        with redirect_stdout(sys.stderr), _session(config.training.workers - 1):  # DeepSpeed talks
            training = runner.train(config, output)
            try:
                while not training.done:
                    report = training.advance()
                    losses = f"loss {report['train_loss']:.4f}, strength {report['train_strength']:.3g}"
                    say(f"step {report['step']}/{config.training.steps}, {losses}")
            finally:
                training.close()
    except FloatingPointError as error:
        say(f"failed: {error}; lower training.learning_rate or the noise and train again in another folder")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted; the same command resumes from the last report")
        raise


def _session(num_peers: int) -> AbstractContextManager[None]:
    """Ray for so many further workers; a single worker needs none."""
    if not num_peers:
        return nullcontext()
    from halora.sweep.cluster.session import ray_session

    return ray_session(num_peers)


def evaluate(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="A trial's folder, or a PEFT folder in safetensors; with --base also a trial's file or a sweep.",
        ),
    ],
    chip: Annotated[
        str | None, typer.Option(help="A preset's name or a YAML file; default: the trial's.", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Default: the trial's.", show_default=False)] = None,
    instances: Annotated[
        int | None, typer.Option("--instances", "--chips", min=1, help="Number of chip instances.", show_default=False)
    ] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="Number of validation rows.", show_default=False)] = None,
    first_chip: Annotated[int, typer.Option(min=0, help="Number of the first chip instance of the search pool.")] = 0,
    first_row: Annotated[int, typer.Option(min=0, help="Validation rows to leave out.")] = 0,
    base: Annotated[
        bool, typer.Option("--base", help="Score the untrained base alone: what the chip does to it before training.")
    ] = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASK[,TASK]",
            help="Score by tasks of lm-evaluation-harness instead: its names, or YAML files; --rows limits their "
            "documents.",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
    form: FormatOption = Format.TABLE,
) -> None:
    """Score an adapter, or the untrained base, on chip instances of the search pool, by its trial or as told here."""
    from halora.api.evaluation import evaluated, evaluated_by_harness

    if lm_eval is not None and first_row:
        raise UserError("--first-row does not go with --lm-eval", "the harness takes a task's first documents")
    overrides = overrides_from(set_, example="chip.adc.bits=6")
    told: dict[str, Any] = {"chip": chip, "instances": instances, "first_chip": first_chip, "base": base}
    if lm_eval is not None:
        overrides |= {} if task is None else {"task": task}
        tasks = [name for name in lm_eval.split(",") if name]
        _show_harness(evaluated_by_harness(adapter, tasks, documents=rows, overrides=overrides, say=say, **told), form)
        return
    found = evaluated(adapter, task=task, rows=rows, first_row=first_row, overrides=overrides, **told)
    if found.damage:
        say(found.damage.warning or found.damage.said)
    show_rows(_by_name(found.to_json(), form), form)
    if len(found.scores.chip_seeds) == 1:
        say("one chip: the intervals are over rows alone, and say nothing about other chips")


def _show_harness(found: "Sequence[HarnessScore]", form: Format) -> None:
    rows = [each.to_json() for each in found]
    if form is not Format.JSON:
        for row in rows:
            row["by_chip"] = " ".join(f"{value:.4g}" for value in row["by_chip"])
    show_rows(rows, form)


def _by_name(values: dict[str, Any], form: Format) -> list[dict[str, Any]]:
    """One row of many keys for programs, a row per key for people."""
    if form is not Format.TABLE:
        return [values]
    return [{"name": name, "value": value} for name, value in values.items()]


def _check_output(output: Path, config: "TrialConfig") -> None:
    from halora.api.evaluation import described_trial
    from halora.trial_folder import TRIAL_FILE

    described = output / TRIAL_FILE
    if output.exists() and not output.is_dir():
        raise UserError(f"--output '{output}' is a file", "name a folder")
    if described.is_file():
        if described_trial(described) != config.model_dump(mode="json"):
            raise UserError(f"'{output}' holds another trial", "name another folder, or repeat that trial's settings")
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output '{output}' is not empty and holds no trial", "name an empty or new folder")
