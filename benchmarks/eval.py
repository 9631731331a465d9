"""Scoring an adapter on chip instances: ours against noisy copies of the weights and every option in full.

A round scores 200 rows of ARC-Easy on clean weights and on one chip instance, another in every round, 8 by default. The
other way writes weights plus noise into the model and scores every option in a sequence of its own with the whole
prompt: 16 sequences as they come, or 32 sorted by length. Before that, both must give the same margins on the same
noisy weights.

    python -m benchmarks.eval
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel

from benchmarks import plain
from benchmarks.harness import Way, Work, interleave, parser, record, save, use_threads
from benchmarks.ways import SIGMA, PlainSteps, trial
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.instance import ChipInstance
from halora.settings.trial import TrialConfig
from halora.training.batches import pack
from halora.training.models import find_model
from halora.trial_runner import TrialRunner

_TOLERANCE_NATS = 1e-3  # in fp32; sums in another order
_CHECKED_ROWS = 40


def main() -> None:
    """Measure and save."""
    command = parser(__doc__, rounds=8)
    command.add_argument("--rows", type=int, default=200, help="rows scored in a round")
    arguments = command.parse_args()
    use_threads(arguments.threads)
    records = []
    with TemporaryDirectory() as folder:
        adapter = Path(folder)
        make_adapter(adapter, trial({}))
        checked = check_equal_margins(trial(_settings("fp32", _CHECKED_ROWS)), adapter)
        print(f"margins differ by {checked:.2g} nats at most, fp32, {_CHECKED_ROWS} rows, clean and on a chip instance")
        for dtype in ("bf16", "fp32"):
            config = trial(_settings(dtype, arguments.rows))
            ways: dict[str, Way] = {
                "ours": OurScores(config, adapter),
                "16 unsorted": PlainScores(config, adapter, batch_size=16, by_length=False),
                "32 sorted": PlainScores(config, adapter, batch_size=32, by_length=True),
            }
            seconds = interleave(ways, arguments.rounds, warm_up=0)
            ours = seconds.pop("ours")
            records += [record(f"eval/{dtype}, against {other}", ours, its) for other, its in seconds.items()]
    save(records, arguments.results)


class OurScores:
    """Scores an adapter as a trial does after its training, each time on the next chip instance."""

    def __init__(self, config: TrialConfig, adapter: Path) -> None:
        self._config, self._adapter = config, adapter
        self._chips = count()
        self._runner = TrialRunner()
        base, _ = self._runner.base(config)
        rows = self._runner.scored_rows(config)
        tokens = sum(len(pack(row, base.tokenizer).sources) for row in rows)
        self._work = Work(len(rows), plain.dtype_name(base.causal_lm), torch.get_num_threads(), tokens)
        self.margins: tuple[tuple[float, ...], ...] = ()

    def __call__(self) -> Work:
        """Score on clean weights and on a chip instance."""
        scores = self._runner.evaluate(self._config, self._adapter, first_chip=next(self._chips))
        self.margins = (scores.clean, *scores.noisy)
        return replace(self._work, rows=len(scores.row_ids))


class PlainScores:
    """Scores an adapter in the user's script, each time on fresh noise.

    Args:
        config: The trial.
        adapter: Folder of the adapter.
        batch_size: Options in a batch.
        by_length: Whether they are sorted by their length.
        put_noise: Puts the noise on the weights; drawn as the script draws it when left out.
    """

    def __init__(
        self,
        config: TrialConfig,
        adapter: Path,
        *,
        batch_size: int,
        by_length: bool,
        put_noise: Callable[[plain.NoisyWeights], None] = plain.NoisyWeights.redraw,
    ) -> None:
        self._batch_size, self._by_length, self._put_noise = batch_size, by_length, put_noise
        self._rows = TrialRunner().scored_rows(config)
        model, self._tokenizer = plain.load(find_model(config.model, config.training.dtype), config.training.dtype)
        self._noise = plain.NoisyWeights(model, SIGMA)
        self._model = PeftModel.from_pretrained(model, adapter)
        options = [plain.example(row.prompt, text, self._tokenizer) for row in self._rows for text in row.options]
        tokens = sum(label != -100 for option in options for label in option["labels"])
        self._work = Work(len(self._rows), plain.dtype_name(model), torch.get_num_threads(), tokens)
        self.margins: tuple[list[float], ...] = ()

    def __call__(self) -> Work:
        """Score on clean weights and on noisy ones."""
        self._noise.restore()
        clean = self._scores()
        self._put_noise(self._noise)
        self.margins = (clean, self._scores())
        return self._work

    def _scores(self) -> list[float]:
        scores = plain.option_scores(self._model, self._tokenizer, self._rows, self._batch_size, self._by_length)
        return plain.margins(scores, self._rows)


def make_adapter(folder: Path, config: TrialConfig) -> None:
    """Write an adapter that was trained for two steps, so that neither A nor B is zero."""
    steps = PlainSteps(config)
    steps()
    steps()
    steps.save(folder)


def check_equal_margins(config: TrialConfig, adapter: Path) -> float:
    """Refuse to compare unless both ways have the same margins, clean and on the weights of the first chip instance.

    Returns:
        The largest difference in nats.

    Raises:
        AssertionError: They have not.
    """
    _, array = TrialRunner().base(config)

    def put_chip_instance(noise: plain.NoisyWeights) -> None:
        array.program(ChipInstance(config.chip, NoiseKey(role=Role.SEARCH, chip_seed=0), config.chip.noise.level))
        for layer in array.mapped(config.chip):
            noise.linears[layer.name].weight.data = layer.effective_weight()

    ours = OurScores(config, adapter)
    work = ours()
    largest = 0.0
    for batch_size, by_length in ((16, False), (32, True)):
        other = PlainScores(config, adapter, batch_size=batch_size, by_length=by_length, put_noise=put_chip_instance)
        assert work == other()
        found = [
            abs(margin - its_margin)
            for margins, its_margins in zip(ours.margins, other.margins, strict=True)
            for margin, its_margin in zip(margins, its_margins, strict=True)
        ]
        largest = max(largest, *found)
    assert largest < _TOLERANCE_NATS, f"margins differ by {largest} nats"
    return largest


def _settings(dtype: str, rows: int) -> dict[str, Any]:
    return {"training.dtype": dtype, "evaluation": {"rows": rows, "chip_instances": 1}}


if __name__ == "__main__":
    main()
