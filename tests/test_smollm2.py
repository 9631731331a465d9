"""Oracles on the embedded model: the same weights in another architecture, the exact converter path, and chance."""

import numpy as np
import pytest
import torch

from halora.evaluation.chips import ChipScores
from halora.evaluation.scoring import margin, option_scores
from halora.hardware.chip import load_chip
from halora.hardware.converters import tilewise_product
from halora.settings.trial import TrialConfig
from halora.training.batches import lay_out, pack, pack_answer
from halora.training.calibration import calibrate
from halora.training.models import load_base
from halora.training.rram import RramLinear, install
from halora.trial_runner import TrialRunner, task_rows

MODEL = "smollm2-135m-instruct"


@torch.no_grad()
def test_the_weights_compute_the_same_as_a_qwen2_model():
    rows = task_rows("arc-easy", "validation", 16)
    tokens = torch.arange(1000, 1048).reshape(2, 24)
    logits, margins = [], []
    for name in (MODEL, f"{MODEL}-qwen2"):
        base = load_base(name, "fp32")
        packed = [pack(row, base.tokenizer) for row in rows]
        scores = option_scores(base.causal_lm, install(base.causal_lm), packed, batch_size=8)
        logits.append(base.causal_lm(input_ids=tokens).logits)
        margins.append([margin(s, row.answer) for s, row in zip(scores, packed, strict=True)])
        assert base.causal_lm.config.model_type == ("qwen2" if name.endswith("qwen2") else "llama")
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert np.sign(margins[1]).tolist() == np.sign(margins[0]).tolist()
    assert margins[1] == pytest.approx(margins[0], abs=1e-3)
    assert sum(value > 0 for value in margins[0]) >= 8  # the model knows something: chance is 4 of 16


@pytest.fixture(scope="module")
def runner() -> TrialRunner:
    """The embedded model, loaded once."""
    return TrialRunner()


def _evaluate(runner: TrialRunner, chip: object, rows: int, chips: int, converters: str = "exact") -> ChipScores:
    evaluation = {"rows": rows, "chip_instances": chips, "batch_size": 8, "converters": converters}
    content = {
        "model": MODEL,
        "task": "arc-easy",
        "chip": chip,
        "training": {"steps": 0},
        "evaluation": evaluation,
    }
    return runner.evaluate(TrialConfig.model_validate(content), None)


@pytest.mark.slow
def test_noise_of_the_paper_costs_the_untuned_model(runner):
    summary = _evaluate(runner, "halora-2026", rows=60, chips=2).summary()
    accuracy_lost = summary["clean_accuracy"] - summary["accuracy"]
    margin_lost = summary["clean_margin"] - summary["margin"]
    assert summary["clean_accuracy"] > 0.37  # chance and two standard errors
    assert accuracy_lost >= 0.05 or margin_lost >= 0.3


@pytest.mark.slow
def test_a_huge_sigma_leaves_chance(runner):
    chip = {"preset": "halora-2026", "noise": {"sigma": 10.0}}
    scores = _evaluate(runner, chip, rows=100, chips=1)
    rows = {row.row_id: row for row in task_rows("arc-easy", "validation", None)}
    chances = np.array([1 / len(rows[row_id].options) for row_id in scores.row_ids])
    standard_error = np.sqrt((chances * (1 - chances)).sum()) / len(chances)
    assert abs(np.mean(np.array(scores.noisy) > 0) - chances.mean()) < 2 * standard_error


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_converter_model_costs_as_much_accuracy_as_the_exact_converters(runner, bits):
    chip = {"preset": "halora-2026", "adc": {"bits": bits}}
    exact, modelled = (
        _evaluate(runner, chip, rows=40, chips=3, converters=converters) for converters in ("exact", "statistical")
    )
    accuracies = [(np.array(scores.noisy) > 0).mean() for scores in (exact, modelled)]
    standard_error = np.sqrt(accuracies[0] * (1 - accuracies[0]) / 40)  # of the rows; chips share them
    print(f"{bits} bits: accuracy {accuracies[0]:.3f} exact, {accuracies[1]:.3f} modelled, SE {standard_error:.3f}")
    print(f"mean margins {np.mean(exact.noisy):.2f} exact, {np.mean(modelled.noisy):.2f} modelled")
    assert abs(accuracies[0] - accuracies[1]) <= standard_error


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "driven"), [(4, 8), (6, 8), (8, 8), (8, 4), (8, 1)])
def test_the_converter_model_has_the_error_of_the_exact_converters_in_every_kind_of_layer(bits, driven):
    """On tokens that the calibration has not seen; every token counts alike, whatever the size of its output."""
    chip = load_chip({"preset": "halora-2026", "adc": {"bits": bits}, "dac": {"bits": driven}})
    base = load_base(MODEL, "fp32")
    array = install(base.causal_lm)
    models = calibrate(base, array, chip, task_rows("arc-easy", "train", 128), 128, "statistical")
    ratios = {}

    def compare(layer: RramLinear, x: torch.Tensor) -> None:
        model, tokens = models[layer.name], x[0]
        product = tokens @ layer.weight.T
        size = product.square().mean(dim=1, keepdim=True).sqrt()
        driven = model.drive(tokens)
        unit = torch.randn(product.shape, generator=torch.Generator().manual_seed(len(ratios)))
        read = model.read(driven.inputs @ layer.weight.T, driven, unit)
        exact = tilewise_product(tokens, layer.weight, chip, model.converters)
        modelled, true = (((y - product) / size).square().mean() for y in (read, exact))
        ratios.setdefault(layer.name, []).append((modelled.item(), true.item()))

    with torch.no_grad(), array.watching_inputs(compare):
        for row in task_rows("arc-easy", "validation", 8):
            lay_out([pack_answer(row, base.tokenizer)]).hidden(base.causal_lm)
    by_layer = np.array([np.sqrt(np.mean(pairs, axis=0)) for pairs in ratios.values()])
    ratio = by_layer[:, 0] / by_layer[:, 1]
    print(
        f"{bits} bits: std modelled over exact, quantiles over {len(ratio)} layers",
        np.quantile(ratio, [0, 0.1, 0.5, 0.9, 1]),
    )
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    assert np.mean(np.abs(ratio - 1) < 0.05) > 0.75
    assert np.mean(np.abs(ratio - 1) < 0.15) > 0.95
