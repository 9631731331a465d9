"""Two or more ways to do the same work, timed side by side in one run, and the record of how they compare.

The ways take turns: each round runs every way once, in an order that rotates, so that a slow minute of the machine
meets all of them. Each way says what work it did, and a run in which they did not do the same ends in an error.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from halora.trial_folder import RESULT_FILE, past_reports

FOLDER = Path(__file__).parent
RESULTS_FILE = "results.json"
README_FILE = "README.md"
_TABLE_BEGINS, _TABLE_ENDS = "<!-- results: written by the benchmarks -->", "<!-- end of results -->"


def _commit() -> str:
    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(FOLDER), *arguments]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip()

    not_results = ["--", ":/", f":!{RESULTS_FILE}", f":!{README_FILE}"]  # a benchmark before this one wrote those
    changed = git("status", "--porcelain", "--untracked-files=no", *not_results)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


_COMMIT = _commit()  # as this process found it: files may change while it measures


@dataclass(frozen=True)
class Work:
    """What one run of a way did.

    Attributes:
        rows: Rows trained on, or scored.
        dtype: Of the base model's weights.
        threads: Of torch, in each process.
        loss_tokens: Tokens whose log-likelihood was asked for, padding apart.
    """

    rows: int
    dtype: str
    threads: int
    loss_tokens: int


Way = Callable[[], Work]


def interleave(
    ways: Mapping[str, Way], rounds: int, *, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds that every way took in each round, after some rounds that do not count.

    Args:
        ways: What to run, by name.
        rounds: Number of rounds that count.
        warm_up: Number of rounds before them.
        clock: Gives the time in seconds.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + rounds):
        done: dict[str, Work] = {}
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            done[name] = ways[name]()
            if i >= warm_up:
                seconds[name].append(clock() - start)
        check_same_work(done)
        if i >= warm_up:
            _say(", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names))
    return seconds


def rows_done(trials: Sequence[Path], batch_size: int) -> int:
    """Rows that trials of ours trained on and scored, by what is in their folders."""
    steps = sum(int(past_reports(trial)[-1]["step"]) for trial in trials)
    scored = sum(len(json.loads((trial / RESULT_FILE).read_text(encoding="utf-8"))["row_ids"]) for trial in trials)
    return steps * batch_size + scored


def check_same_work(done: Mapping[str, Work]) -> None:
    """Refuse a comparison of ways that did not do the same.

    Raises:
        AssertionError: They did not.
    """
    (name, work), *others = done.items()
    for other, its_work in others:
        assert work == its_work, f"not the same work: {name} {work}, {other} {its_work}"


@dataclass(frozen=True)
class Record:
    """How our way compares with another.

    Attributes:
        name: Benchmark and case, `benchmark/case`.
        ratio: Median over the rounds of ours / other; below 1 ours is better.
        ours: Median of our way, in `unit`.
        other: Median of the other way, in `unit`.
        unit: Of both.
        spread: Lowest and highest ratio of a round.
        machine: Processor, whether it has bfloat16 instructions, cores, memory and torch.
        commit: Of this repository, with `+` where files differed from it; empty outside of git.
        command: What repeats the measurement.
    """

    name: str
    ratio: float
    ours: float
    other: float
    unit: str
    spread: tuple[float, float]
    machine: str
    commit: str
    command: str


def record(name: str, ours: Sequence[float], other: Sequence[float], unit: str = "s") -> Record:
    """The record of rounds in which both ways were measured."""
    ratios = [mine / its for mine, its in zip(ours, other, strict=True)]
    return Record(
        name=name,
        ratio=_rounded(median(ratios)),
        ours=_rounded(median(ours)),
        other=_rounded(median(other)),
        unit=unit,
        spread=(_rounded(min(ratios)), _rounded(max(ratios))),
        machine=_machine(),
        commit=_COMMIT,
        command=shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    )


def save(records: Sequence[Record], folder: Path = FOLDER) -> None:
    """Put a benchmark's records in the place of its former ones, in `results.json` and in a README's table."""
    (benchmark,) = {_benchmark(each.name) for each in records}
    path = folder / RESULTS_FILE
    known = [Record(**content) for content in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    kept = [each for each in known if _benchmark(each.name) != benchmark]
    merged = sorted([*kept, *records], key=lambda each: _benchmark(each.name))
    path.write_text(json.dumps([asdict(each) for each in merged], indent=1) + "\n", encoding="utf-8")
    if (readme := folder / README_FILE).exists():
        before, _, rest = readme.read_text(encoding="utf-8").partition(_TABLE_BEGINS)
        _, _, after = rest.partition(_TABLE_ENDS)
        readme.write_text(f"{before}{_TABLE_BEGINS}\n{table(merged)}{_TABLE_ENDS}{after}", encoding="utf-8")
    for each in records:
        medians = f"ours {each.ours:.4g}, other {each.other:.4g} {each.unit}"
        _say(f"{each.name}: ratio {each.ratio:.3g}, rounds {_span(each)}, {medians}")


def table(records: Sequence[Record]) -> str:
    """The records as Markdown, with the machines and commands they come from."""
    lines = ["| benchmark | ratio | rounds | ours | other | unit | commit |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {each.name} | **{each.ratio:.2f}** | {_span(each)} | {each.ours:.4g} | {each.other:.4g} | {each.unit} "
        f"| {each.commit} |"
        for each in records
    ]
    sources = dict.fromkeys(f"`{each.command}` on {each.machine}" for each in records)
    return "\n".join([*lines, "", *(f"- {source}" for source in sources)]) + "\n"


def parser(description: str, rounds: int = 7, threads: int | None = 2) -> argparse.ArgumentParser:
    """Arguments that benchmarks share: `--rounds`, `--results` and, where it is theirs to choose, `--threads`."""
    made = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    made.add_argument("--results", type=Path, default=FOLDER, help="folder of results.json and README.md")
    if threads is not None:
        made.add_argument("--threads", type=int, default=threads, help="of torch, in each process")
    return made


def use_threads(threads: int) -> None:
    """Give torch as many threads in this process, and in those it starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def run(command: list[str]) -> None:
    """Carry out a command in this repository.

    Raises:
        RuntimeError: It failed; with what it said last.
    """
    # Ray's workers are nice to all others by default, which nobody wants of a sweep; ours are not either.
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    ended = subprocess.run(
        command, cwd=FOLDER.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stdout[-4000:]}")


def _benchmark(name: str) -> str:
    return name.partition("/")[0]


def _span(each: Record) -> str:
    return f"{each.spread[0]:.2f} to {each.spread[1]:.2f}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _machine() -> str:
    path = Path("/proc/cpuinfo")
    facts = (
        dict(line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if "\t" in line)
        if path.exists()
        else {}
    )
    name = facts.get("model name", "unknown processor").removeprefix(": ")
    bf16 = "with" if "bf16" in facts.get("flags", "") else "without"
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{name} {bf16} bfloat16, {os.cpu_count()} cores, {memory_gib:.0f} GiB, torch {version('torch')}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
