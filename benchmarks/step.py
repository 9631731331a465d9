"""A HaLoRA step against a plain LoRA step.

Ours redraws the noise on all mapped weights at every step and has L_reg in its loss. The other is LoRA without noise
through transformers and PEFT: batches padded to their longest row, logits for every token. Once more with our attention
given to it. And a step on a chip that keeps a thousandth of its weights in SRAM against one on a chip that keeps none.

    python -m benchmarks.step
"""

from math import isclose
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from benchmarks.harness import Record, Way, interleave, parser, record, save, use_threads
from benchmarks.ways import CHIP, CLEAN, OurSteps, PlainSteps, trial
from halora.hardware.addressing import derive_seed
from halora.settings.trial import TrialConfig
from halora.training.attention import RowLayout, attend_on_cpu

PADDED_ATTENTION = "halora_padded"
_MU = 0.1
_TOLERANCE = 1e-3  # of a loss in fp32, relative; a sum in another order


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__).parse_args()
    use_threads(arguments.threads)
    register_padded_attention()
    check_equal_losses(trial({"training.dtype": "fp32", "training.mu": _MU, **CLEAN}), steps=3)
    records = []
    for dtype in ("bf16", "fp32"):
        for batch_size in (8, 16):
            settings = {"training.dtype": dtype, "training.batch_size": batch_size, "training.mu": _MU}
            config = trial({**settings, "training.steps": arguments.rounds + 1})
            ours = OurSteps(config)
            ways: dict[str, Way] = {
                "ours": ours,
                "plain": PlainSteps(config),
                "plain with our attention": PlainSteps(config, attention=PADDED_ATTENTION),
            }
            seconds = interleave(ways, arguments.rounds)
            ours.close()
            mine = seconds.pop("ours")
            case = f"step/{dtype}, {batch_size} rows, against"
            records += [record(f"{case} {other}", mine, its) for other, its in seconds.items()]
    records.append(outliers_record(arguments.rounds))
    save(records, arguments.results)


def outliers_record(rounds: int) -> Record:
    """What outliers in SRAM add to a step whose noise is redrawn."""
    settings = {"training.dtype": "fp32", "training.batch_size": 8, "training.mu": _MU, "training.steps": rounds + 1}
    ways = {
        share: OurSteps(trial({**settings, "chip": {**CHIP, "mapping": {"outliers": {"share": share}}}}))
        for share in (0.001, 0.0)
    }
    seconds = interleave({f"share {share:g}": way for share, way in ways.items()}, rounds)
    for way in ways.values():
        way.close()
    with_outliers, without = seconds.values()
    return record("step/fp32, 8 rows, a share of 0.001 in SRAM, against none", with_outliers, without)


def check_equal_losses(config: TrialConfig, steps: int) -> None:
    """Refuse to compare unless both ways, trained on clean weights with L_reg, have the same losses step by step.

    Raises:
        AssertionError: They have not.
    """
    ours = OurSteps(config)
    other = PlainSteps(config, sigma=0.0, mu=config.training.mu, seed=derive_seed("adapter", config.seed))
    for step in range(steps):
        assert ours() == other(), f"not the same work at step {step}"
        loss, its_loss = ours.losses[-1], other.losses[-1]
        assert isclose(loss, its_loss, rel_tol=_TOLERANCE), f"losses at step {step}: ours {loss}, plain {its_loss}"
    ours.close()


def register_padded_attention() -> None:
    """Offer our attention to any model of `transformers`, for batches padded to their longest row."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: RowLayout, *, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (states.transpose(0, 1).flatten(1, 2)[None] for states in (query, key, value))
        found = attend_on_cpu(query, key, value, mask, scaling)
        return found.view(len(mask.visible), -1, *found.shape[2:]), None

    def layout(*arguments: Any, **settings: Any) -> RowLayout:
        visible = sdpa_mask(*arguments, **settings | {"allow_is_causal_skip": False})
        places = torch.arange(visible.shape[0] * visible.shape[2])
        return RowLayout(places, visible, places % visible.shape[2])

    AttentionInterface.register(PADDED_ATTENTION, attend)
    AttentionMaskInterface.register(PADDED_ATTENTION, layout)


if __name__ == "__main__":
    main()
