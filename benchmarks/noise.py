"""What the noise costs: our HaLoRA step against our own step on clean weights.

The noise is redrawn at every step, its weights made in the forward and again in the backward (`regenerate`) or kept
from one to the other (`materialise`); or it is drawn once and kept (`kept`), as for the paper's 400 steps. A fast clean
step makes the same noise a larger share: the cost in seconds is ours less the other.

    python -m benchmarks.noise
"""

from typing import Any

from benchmarks.harness import interleave, parser, record, save, use_threads
from benchmarks.ways import CLEAN, SIGMA, OurSteps, trial

_EVERY_STEP = {"strength_start": SIGMA, "redraw_steps": 1}
_ONCE = {"strength_start": SIGMA, "redraw_steps": 400}
_CASES: dict[str, dict[str, Any]] = {
    "clean": CLEAN,
    "regenerate": {"training.schedule": _EVERY_STEP, "training.noisy_weights": "regenerate"},
    "materialise": {"training.schedule": _EVERY_STEP, "training.noisy_weights": "materialise"},
    "kept": {"training.schedule": _ONCE, "training.noisy_weights": "materialise"},
}


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__).parse_args()
    use_threads(arguments.threads)
    records = []
    for dtype in ("bf16", "fp32"):
        settings = {"training.dtype": dtype, "training.batch_size": 16, "training.steps": arguments.rounds + 1}
        ways = {name: OurSteps(trial({**settings, **case})) for name, case in _CASES.items()}
        seconds = interleave(ways, arguments.rounds)
        for way in ways.values():
            way.close()
        clean = seconds.pop("clean")
        records += [
            record(f"noise/{dtype}, {name}, against the clean step", noisy, clean) for name, noisy in seconds.items()
        ]
    save(records, arguments.results)


if __name__ == "__main__":
    main()
