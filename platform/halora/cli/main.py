"""Entry point: the noun groups, the error contract, and the exit codes.

Data goes to stdout, talk to stderr. Exit codes: 0 ok, 1 a trial or a check failed, 2 usage or configuration,
3 cluster, tracking, storage or disk unreachable or full. Heavy imports wait until a command needs them.
"""

import sys
import warnings
from typing import Annotated, NoReturn

import typer

from halora.cli import (
    adapter,
    cluster,
    dashboard,
    doctor,
    ending,
    energy,
    front,
    init,
    noise,
    space,
    sweep,
    train,
    trial,
)
from halora.cli.output import talk
from halora.cli.remote_commands import check_client
from halora.errors import UnreachableError, UserError
from halora.files import unwritable
from halora.sweep.cluster.interrupts import signals_as_interrupt

app = typer.Typer(
    help="Search HaLoRA finetuning under simulated RRAM noise for the Pareto front of accuracy against energy.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (ending.archive, ending.unarchive, ending.delete):
    sweep.app.command()(command)
app.add_typer(sweep.app, name="sweep")
app.add_typer(space.app, name="space")
app.add_typer(front.app, name="front")
app.add_typer(trial.app, name="trial")
app.add_typer(adapter.app, name="adapter")
app.add_typer(noise.app, name="noise")
app.add_typer(cluster.app, name="cluster")
app.command("init")(init.init)
app.command("train")(train.train)
app.command("evaluate")(train.evaluate)
app.command("energy")(energy.energy)
app.command("doctor")(doctor.doctor)
app.command("dashboard")(dashboard.dashboard)


def _show_version(wanted: bool) -> None:
    if wanted:
        from halora.records.provenance import program

        print("halora-sweep", *filter(None, program().values()))
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake becomes a message, never a traceback."""
    warnings.simplefilter("ignore")  # of libraries, for their developers; tests see them
    signals_as_interrupt()
    try:
        check_client()
        app()
    except UserError as error:
        _end_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if told := unwritable(error):
            _end_with(told)
        raise


def _end_with(error: UserError) -> NoReturn:
    for problem in error.problems:
        talk.print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.next_step:
        talk.print(f"next: {error.next_step}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(3 if isinstance(error, UnreachableError) else 2)


if __name__ == "__main__":
    main()
