"""A sweep as a job of Slurm: one file for `sbatch`, which holds the sweep and says what becomes of it at the limit."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halora.errors import UnreachableError, UserError
from halora.records.store import Store
from halora.spaces.sweep import SweepConfig
from halora.yaml_files import to_yaml

PAUSED = 75
"""Exit code of a job that paused its sweep and left something to do: EX_TEMPFAIL, as `sysexits.h` has it."""

_WORD = re.compile(r"[A-Za-z0-9_.,:=@/+*%\[\]-]+")
_OWN = ("array", "job-name", "nodes", "ntasks", "ntasks-per-node", "output", "requeue", "signal", "time", "wrap")
_SPARE = 1 / 3  # of the notice, for a pause at once where no trial came to a report


@dataclass(frozen=True)
class SlurmJob:
    """What a sweep asks of Slurm.

    Attributes:
        nodes: Number of nodes.
        time: Wall-clock limit, in one of Slurm's forms.
        cpus: Cores of each node; whole nodes for none.
        partition: Slurm's `--partition`; the site's own for none.
        account: Its `--account`, likewise.
        gres: Its `--gres`, for each node.
        options: Further options of `sbatch`, without their dashes.
        notice_s: Seconds before the limit at which the sweep is paused.
        jobs: Jobs of a chain, each of which goes on where the one before was paused; 1 is one job that is requeued.
        container: An Apptainer image to run in; none.
    """

    nodes: int
    time: str
    cpus: int | None = None
    partition: str = ""
    account: str = ""
    gres: str = ""
    options: Sequence[str] = field(default_factory=tuple)
    notice_s: int = 300
    jobs: int = 1
    container: Path | None = None

    def check(self) -> None:
        """Refuse what Slurm would, and what would end a job before its sweep is paused.

        Raises:
            UserError: With every mistake.
        """
        problems = [
            f"--{name}: {value}; write at least {least}"
            for name, value, least in (
                ("nodes", self.nodes, 1),
                ("cpus", self.cpus, 1),
                ("notice", self.notice_s, 60),  # Slurm may be a minute early
                ("jobs", self.jobs, 1),
            )
            if value is not None and value < least
        ]
        seconds = seconds_of(self.time)
        if seconds is None:
            problems.append(f"--time {self.time}: write MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, e.g. 8:00:00")
        elif self.notice_s >= 60 and seconds <= self.notice_s + 60:
            notice = f"the {self.notice_s} s of --notice and the minute that Slurm may be early"
            problems.append(f"--time {self.time}: no longer than {notice}; ask for more, or write a shorter --notice")
        named = {"partition": self.partition, "account": self.account, "gres": self.gres}
        for name, value in named.items():
            if value and not _WORD.fullmatch(value):
                problems.append(f"--{name} '{value}': one word of letters, digits and _.,:=@/+*%[]-")
        for option in self.options:
            name = option.partition("=")[0]
            if not _WORD.fullmatch(option) or option.startswith("-"):
                problems.append(f"--sbatch '{option}': write NAME or NAME=VALUE, without dashes, e.g. constraint=a100")
            elif name in _OWN or name in named:
                own = f"write --{name}" if name in ("nodes", "time", *named) else "the script sets it itself"
                problems.append(f"--sbatch {option}: {own}")
        if self.container and not self.container.exists():
            problems.append(f"--container '{self.container}': no such image")
        if problems:
            raise UserError(problems)

    def script(self, sweep: SweepConfig, store: Store) -> str:
        """The file for `sbatch`.

        Args:
            sweep: The sweep, which the file holds.
            store: Where it is recorded; all nodes have to see it.
        """
        told = to_yaml(sweep.model_dump(mode="json", exclude_defaults=True, exclude={"launch", "chips_read"}))
        end = "END_OF_SWEEP"
        while end in told.splitlines():
            end += "_"
        places = {
            "HALORA_STORE": str(store.root),
            "HALORA_TRACKING_URI": store.server,
            "HALORA_CHECKPOINT_URL": store.checkpoint_url,
        }
        return _SCRIPT.format(
            name=sweep.name,
            directives="\n".join(f"#SBATCH --{line}" for line in self._directives(sweep.name, store)),
            exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in places.items() if value),
            notice=self.notice_s,
            python=shlex.join(self._python(store)),
            sweep=shlex.quote(sweep.name),
            patience=round(self.notice_s * (1 - _SPARE)),
            end=end,
            yaml=told.rstrip("\n"),
            after=_NEXT_OF_CHAIN if self.jobs > 1 else _REQUEUE,
        )

    def _directives(self, name: str, store: Store) -> list[str]:
        asked = [("partition", self.partition), ("account", self.account), ("gres", self.gres)]
        chain, folder = self.jobs > 1, str(jobs_folder(store)).replace("%", "%%")
        return [
            f"job-name=halora-{name}",
            f"nodes={self.nodes}",
            "ntasks-per-node=1",
            *([f"cpus-per-task={self.cpus}"] if self.cpus else ["exclusive", "mem=0"]),
            f"time={self.time}",
            *(f"{option}={value}" for option, value in asked if value),
            *self.options,
            f"signal=B:USR1@{self.notice_s}",
            *([f"array=1-{self.jobs}%1", "no-requeue"] if chain else ["requeue", "open-mode=append"]),
            "no-kill",
            f"output={shlex.quote(folder + ('/%A_%a.log' if chain else '/%j.log'))}",
        ]

    def _python(self, store: Store) -> list[str]:
        if not self.container:
            return [sys.executable]
        gpus = ["--nv"] if "gpu" in self.gres else []
        return ["apptainer", "exec", *gpus, "--bind", str(store.root), str(self.container.resolve()), "python"]


def seconds_of(time: str) -> int | None:
    """Seconds of a wall-clock limit as Slurm reads it; none of what it does not read.

    Source: sbatch(1), `--time`: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def job_name() -> str:
    """The job that runs this process, as Slurm's commands know it; empty outside of one."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def jobs_folder(store: Store) -> Path:
    """Where jobs have their output and their folders."""
    return store.root / "jobs"


def make_jobs_folder(store: Store) -> None:
    """Make that folder: Slurm makes none, and a job whose output has no place ends without a word.

    Raises:
        UserError: The store cannot be written.
    """
    store.check_writable()
    jobs_folder(store).mkdir(mode=0o700, exist_ok=True)


def submit(script: str) -> str:
    """Submit a job; its number.

    Raises:
        UnreachableError: There is no Slurm here, or it refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False, encoding="utf-8"
        )
    except FileNotFoundError:
        raise UnreachableError(
            "there is no `sbatch` on this machine",
            "submit from a login node of the cluster; without --submit the file is printed",
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UnreachableError(f"Slurm refuses the job: {said}", "see `sinfo` for partitions and their limits")
    return done.stdout.strip().partition(";")[0]


_SCRIPT = """\
#!/bin/bash
# Sweep '{name}' as a job of Slurm, written by `halora cluster slurm`. It can be submitted again at any time: it
# goes on with a sweep that was begun, and ends at once where nothing is left to do.
{directives}

set -euo pipefail
{exports}

# This start's own folder, which only its user can enter: address and token of its Ray, a log of every node.
folder=$(mktemp -d "$HALORA_STORE/jobs/$SLURM_JOB_ID-XXXXXX")

# Slurm tells the job {notice} s before its limit; trials pause at their next reports.
trap 'touch "$folder/pause"' USR1

# Each node runs Ray, and the first one also the sweep's driver. A node that dies does not end the job.
srun --no-kill --kill-on-bad-exit=0 --wait=0 --input=0 \\
    {python} -m halora.sweep.cluster.slurm_node "$folder" {sweep} {patience} <<'{end}' &
{yaml}
{end}
while [[ -n $(jobs -rp) ]]; do wait || true; done

code=1
if [[ -s $folder/code ]]; then code=$(<"$folder/code"); fi
{after}
exit "$code"
"""

_REQUEUE = f"""\
if [[ $code == {PAUSED} ]]; then # something is left to do
    scontrol requeue "$SLURM_JOB_ID" || echo 'this job cannot be requeued; submit it again, and it goes on' >&2
fi"""

_NEXT_OF_CHAIN = f"""\
if [[ $code == {PAUSED} ]]; then
    echo 'paused: the next job of this array goes on'
    code=0
else
    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" # nothing is left to do, or nothing can be done
fi"""
