"""Memory of noisy trials side by side, against independent processes that do the same.

A model of Llama-3.2-1B's dimensions with random weights in bf16 is trained by HaLoRA, 8 rows a step, the noise redrawn
at every step and made again in every pass, one thread per process. Counted is the sum of the proportional set sizes
(PSS: a page that n processes share counts 1/n in each), at its highest over two steps of every process. The other way
keeps the clean weights beside the noisy ones, and has its base from `from_pretrained` in every process, which maps the
file where the dtype is stored.

    python -m benchmarks.memory
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.harness import Work, check_same_work, parser, record, save, use_threads
from halora.training.models import cache_dir, find_model

_BATCH_SIZE = 8
_STEPS = 2  # of every process while it is watched
_LOADING_S = 1800.0


def main() -> None:
    """Measure and save; with `--train`, be one of the processes."""
    command = parser(__doc__, rounds=5, threads=1)
    command.add_argument("--model", type=Path, help="folder of a model; one of random weights when left out")
    command.add_argument("--train", choices=["ours", "other"], help="train until ended, as one of the processes")
    command.add_argument("--report", type=Path, help="with --train: a line of work done is added for every step")
    arguments = command.parse_args()
    if arguments.train:
        use_threads(arguments.threads)
        train(arguments.train, arguments.model, arguments.report)
    model = arguments.model or random_llama()
    two, one, other_two = [], [], []
    for _ in range(arguments.rounds):
        ours, work = peak_gib("ours", 2, model, arguments.threads)
        others, its_work = peak_gib("other", 2, model, arguments.threads)
        check_same_work({"ours": work, "other": its_work})
        alone, _ = peak_gib("ours", 1, model, arguments.threads)
        two.append(ours)
        other_two.append(others)
        one.append(alone)
        print(f"two trials {ours:.2f} GiB, two processes {others:.2f} GiB, one trial {alone:.2f} GiB", file=sys.stderr)
    base_gib = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**30
    further = [both - alone for both, alone in zip(two, one, strict=True)]
    records = [
        record("memory/two trials, against two processes", two, other_two, "GiB"),
        record("memory/a further trial, against the base's weights", further, [base_gib] * len(further), "GiB"),
    ]
    save(records, arguments.results)


def peak_gib(way: str, trials: int, model: Path, threads: int) -> tuple[float, Work]:
    """Highest sum of the processes' PSS in GiB, and the work of a step."""
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{i}.jsonl" for i in range(trials)]
        command = [sys.executable, "-m", "benchmarks.memory", "--train", way, "--model", str(model)]
        command += ["--threads", str(threads)]
        log = Path(folder) / "log.txt"
        with log.open("w", encoding="utf-8") as out:
            processes = [
                subprocess.Popen([*command, "--report", str(report)], stdout=out, stderr=out) for report in reports
            ]
        try:
            peak, deadline = 0, time.monotonic() + _LOADING_S
            while (steps := min(map(_steps, reports))) <= _STEPS:
                ended = any(process.poll() is not None for process in processes)
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"a process of '{way}' ended or took too long:\n{log.read_text(encoding='utf-8')[-4000:]}"
                    )
                if steps:  # all have taken the first, which makes the optimiser's state
                    peak = max(peak, sum(psutil.Process(process.pid).memory_full_info().pss for process in processes))
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        works = [Work(**json.loads(report.read_text(encoding="utf-8").partition("\n")[0])) for report in reports]
        check_same_work(dict(zip(map(str, reports), works, strict=True)))
        return peak / 2**30, works[0]


def train(way: str, model: Path, report: Path) -> None:
    """Train until the process is ended."""
    from benchmarks.ways import SIGMA, OurSteps, PlainSteps, trial

    settings = {"model": str(model), "training.dtype": "bf16", "training.batch_size": _BATCH_SIZE}
    config = trial({**settings, "training.noisy_weights": "regenerate", "training.steps": 100})
    steps = OurSteps(config) if way == "ours" else PlainSteps(config, sigma=SIGMA, mu=config.training.mu)
    while True:
        work = steps()
        with report.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(work)) + "\n")


def random_llama() -> Path:
    """Folder of a model of Llama-3.2-1B's dimensions with random weights, made on first use; 2.5 GB."""
    folder = cache_dir() / "benchmarks" / "llama-3.2-1b-random"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(scratch)
        AutoTokenizer.from_pretrained(find_model("smollm2-135m-instruct")).save_pretrained(scratch)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _steps(report: Path) -> int:
    return report.read_text(encoding="utf-8").count("\n") if report.exists() else 0


if __name__ == "__main__":
    main()
