"""Oracles: sigma by definition, the library's own curves and programmed weights, the decoded picture, a chip file that
is read again, and the contract of the command line: data on stdout, talk on stderr, mistakes all at once, exit code 2.
"""

import csv
import json
from math import log10

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.cell_arrays import write_verify_factor
from halora.hardware.chip import load_chip
from halora.hardware.chip_files import preset_names
from halora.hardware.error_curves import stated_cell_error
from halora.hardware.noise import noise_to_signal_db, programmed_weight
from halora.training.models import load_base


@pytest.fixture
def answer(halora_json):
    """What `halora noise ... --format json` says."""
    return lambda arguments: halora_json(f"noise {arguments}")


def _pixels(path):
    pixels = matplotlib.image.imread(path)
    assert np.ptp(pixels[..., :3]) > 0.9
    return pixels.shape[:2]


def test_sigma_is_told_with_what_it_is_relative_to(answer):
    said = answer("show --chip halora-2026 --set noise.sigma=0.02 --set write_verify.pulses=10")
    (row,) = said["rows"]
    assert row["std"] == pytest.approx(0.02 * write_verify_factor(10.0))
    assert (row["sigma"], row["times"]) == (0.02, "max|W| of the tile (64 inputs x 64 outputs)")
    (row,) = answer("show --set tile.columns=32 --set coding.slices=2 --set coding.replicas=4")["rows"]
    assert row["std"] == pytest.approx(0.01 / 4 / 2)
    assert row["times"] == "max|W| of the tile (64 inputs x 32 outputs)"
    (row,) = answer("show --chip halora-2026-tensor-max")["rows"]
    assert row["times"] == "max|W| of the whole matrix"


@pytest.mark.parametrize("preset", ["neurram-2022", "cmo-hfox"])
def test_cells_have_a_curve_at_both_ends_of_the_refresh_interval(preset, answer):
    said, chip = answer(f"show --chip {preset}"), load_chip(preset)
    assert said["chip_hash"] == chip.content_hash
    conductance = torch.linspace(chip.cells.g_min_us, chip.cells.g_max_us, 11)
    for moment in ("start", "end"):
        rows = [row for row in said["rows"] if row["moment"] == moment]
        curve = stated_cell_error(chip, conductance, moment)
        assert [row["conductance_us"] for row in rows] == pytest.approx(curve.target)
        assert [row["std_us"] for row in rows] == pytest.approx(curve.std)
        assert [row["mean_error_us"] for row in rows] == pytest.approx(curve.mean, abs=1e-8)
        assert all(row["std_of_g_max"] == row["std_us"] / chip.cells.g_max_us for row in rows)
    assert {row["time_s"] for row in rows} == {86400.0}


def test_table_and_csv_go_to_stdout_and_the_rest_to_stderr(halora):
    code, table, err = halora("noise show --chip neurram-2022")
    assert code == 0
    assert "conductance_us" in table
    assert "in the chip: IR drop, read noise, DAC, ADC" in err
    code, text, _ = halora("noise show --chip neurram-2022 --format csv")
    assert code == 0
    assert len(list(csv.DictReader(text.splitlines()))) == 22


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_picture(preset, halora, tmp_path):
    code, out, err = halora(f"noise show --chip {preset} --picture {tmp_path / 'noise.png'} --format json")
    assert code == 0, err
    assert json.loads(out)["chip"] == preset
    assert _pixels(tmp_path / "noise.png") == (
        420,
        500 * (2 if preset in ("neurram-2022", "cmo-hfox", "pcm-like") else 1),
    )


def test_with_a_model_every_layer_in_rram_has_its_realised_noise(answer, tiny_models, tmp_path):
    path = tmp_path / "noise.png"
    said = answer(f"show --model {tiny_models['llama']} --set 'mapping.sram=[\"*.v_proj\"]' --picture {path}")
    chip = load_chip({"preset": "halora-2026", "mapping": {"sram": ["*.v_proj"]}})
    linears = dict(load_base(tiny_models["llama"], "fp32").causal_lm.named_modules())
    assert len(said["layers"]) == 12
    for row in said["layers"]:
        weight = linears[row["layer"]].weight
        key = NoiseKey(role=Role.SEARCH, chip_seed=0, module=row["layer"], purpose="programming")
        held = programmed_weight(weight, chip, key, chip.noise.level)
        assert row["noise_db"] == pytest.approx(noise_to_signal_db(weight, held), abs=1e-4)
    powers = [10 ** (row["noise_db"] / 10) for row in said["layers"]]
    assert said["mean_db"] == pytest.approx(10 * log10(np.mean(powers)))
    assert _pixels(path) == (420, 1000)


def test_groups_of_layers_have_noise_of_their_own(answer, tiny_models):
    groups = '{v: {match: "*.v_proj", coding: {replicas: 4}}, last: {depth: [0.5, 1], tile: {rows: 128}}}'
    stated = {row["layers"]: row for row in answer(f"show --set 'layers={groups}'")["rows"]}
    assert [*stated] == ["the others", "v", "last"]
    assert stated["v"]["std"] == stated["the others"]["std"] / 2
    assert "128 inputs" in stated["last"]["times"]
    shown = answer(f"show --model {tiny_models['llama']} --set 'layers={groups}'")["layers"]
    of_groups = {row["layer"]: row["groups"] for row in shown}
    assert of_groups["model.layers.0.self_attn.v_proj"] == "v"
    assert of_groups["model.layers.1.self_attn.v_proj"] == "v last"
    assert of_groups["model.layers.0.mlp.up_proj"] == ""
    before = {row["layer"]: row["noise_db"] for row in answer(f"show --model {tiny_models['llama']}")["layers"]}
    for row in shown:
        if row["groups"] == "v":
            assert row["noise_db"] == pytest.approx(before[row["layer"]] - 6, abs=1.5)
        if row["groups"] == "":
            assert row["noise_db"] == before[row["layer"]]


def test_a_chip_without_error_has_no_ratio(answer, halora, tiny_models, tmp_path):
    said = answer(f"show --chip ideal --model {tiny_models['llama']}")
    assert {row["noise_db"] for row in said["layers"]} == {said["mean_db"]} == {None}
    settings = f"--model {tiny_models['llama']} --set mapping.sram_fraction=1 --picture {tmp_path / 'none.png'}"
    code, _, err = halora(f"noise show {settings}")
    assert code == 0
    assert "no layer is in RRAM: no picture" in err


@pytest.fixture
def measured(halora, tiny_models, tiny_task):
    """What `halora noise sensitivity` of the tiny model says in a form, and its talk."""

    def ask(form):
        code, out, err = halora(
            f"noise sensitivity {tiny_models['llama']} --task {tiny_task} --rows 2 --set adc.bits=6 --format {form}"
        )
        assert code == 0, err
        return out, err

    return ask


def test_sensitivities_are_sorted_and_become_a_chip_s_ranking(measured, answer, tiny_models, tmp_path):
    out, err = measured("json")
    said = json.loads(out)
    densities = [layer["change_nats"] / layer["weights"] for layer in said["layers"]]
    assert len(densities) == 14
    assert densities == sorted(densities, reverse=True)
    assert said["ranking"] == [layer["layer"] for layer in said["layers"]]
    assert said["layers"][-1]["weights_share_so_far"] == 1
    assert "layer 14 of 14" in err
    assert "--chip ranked.yaml --set mapping.sram_fraction=0.1" in err

    path = tmp_path / "ranked.yaml"
    path.write_text(measured("yaml")[0])
    assert yaml.safe_load(path.read_text())["mapping"]["ranking"] == said["ranking"]
    ranked = load_chip({"preset": "halora-2026", "adc": {"bits": 6}, "mapping": {"ranking": said["ranking"]}})
    assert load_chip(str(path)).content_hash == ranked.content_hash
    shown = answer(f"show --chip {path} --model {tiny_models['llama']} --set mapping.sram_fraction=0.5")
    assert said["ranking"][0] not in [row["layer"] for row in shown["layers"]]


def test_sensitivities_as_csv(measured):
    rows = list(csv.DictReader(measured("csv")[0].splitlines()))
    assert len(rows) == 14
    assert all(float(row["change_nats"]) > 0 > float(row["noise_db"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "show --chip halora-2025 --model nowhere --picture no/folder/noise.jpg",
            [
                "no chip 'halora-2025'",
                "did you mean 'halora-2026'",
                "no model 'nowhere'",
                "the name must end in .png",
                "there is no folder 'no/folder'",
            ],
        ),
        (
            "sensitivity nowhere --task arc-esy --rows 0 --set noise.sigma=-1 --set tile.row=3",
            [
                "no model 'nowhere'",
                "no task 'arc-esy'",
                "did you mean 'arc-easy'",
                "--rows: must be 1 or more, got 0",
                "chip.noise",
                "got -1",
                "chip.tile.row: unknown key",
            ],
        ),
        (
            "sensitivity smollm2-135m-instruct --rows -1 --set mapping.sram=[model.layers.99.*]",
            ["'model.layers.99.*' matches no layer", "--rows: must be 1 or more, got -1"],
        ),
        ("show --chip neurram-2022 --set retention.refresh_interval_s=1e6", ["was measured from 1 to 172800 s"]),
    ],
)
def test_mistakes_are_told_at_once(arguments, told, halora):
    code, out, err = halora(f"noise {arguments}")
    assert (code, out) == (2, "")
    assert [part for part in told if part not in err] == []
    assert "Traceback" not in err


def test_help_says_where_the_order_goes(halora):
    code, out, _ = halora("noise sensitivity --help")
    assert code == 0
    assert "mapping.ranking" in " ".join(out.split())
