"""Oracles: the totals published for HaLoRA (arXiv 2502.19747), the library's own breakdown, the table in the
documentation, and the contract of the command line: data on stdout, talk on stderr, mistakes all at once, exit code 2.
"""

import csv
import json
import re
from pathlib import Path

import pytest

from halora.hardware.chip import load_chip
from halora.hardware.chip_files import preset_names
from halora.hardware.energy import energy_per_token
from halora.hardware.latency import Phase
from halora.hardware.shapes import named_shapes
from halora.settings.training import LoraSettings

DOCS = Path(__file__).parents[1] / "docs" / "hardware.md"

STABLE_KEYS = {
    "total_mj",
    "components_mj",
    "lora_share",
    "baseline",
    "baseline_mj",
    "ratio",
    "boundary",
    "phase",
    "tokens",
    "chip_hash",
    "area_mm2",
    "latency_us_per_token",
    "tokens_per_s",
    "power_w",
    "sequences",
    "dies",
}


@pytest.fixture
def answer(halora_json):
    """What `halora energy ... --format json` says."""
    return lambda arguments: halora_json(f"energy {arguments}")


def test_layers_are_shown_by_their_groups(answer, halora):
    arguments = """llama-3.2-1b --set 'layers={down: {match: "*.down_proj", adc: {bits: 6}}}'"""
    said = answer(arguments)
    down, others = said["groups"]
    assert (down["layers"], down["number"], down["values"]) == ("down", 16, {"adc.bits": 6})
    assert (others["layers"], others["number"], others["values"]) == ("the others", 96, {})
    assert down["weights_share"] + others["weights_share"] == pytest.approx(1)
    parts = ("attention", "softmax", "lora_sram", "links", "leakage")
    around_mj = sum(said["components_mj"][part] for part in parts)
    assert down["energy_mj"] + others["energy_mj"] == pytest.approx(said["total_mj"] - around_mj)
    code, table, _ = halora(f"energy {arguments}")
    assert code == 0
    assert "adc.bits 6" in table


@pytest.mark.parametrize(("model", "published_mj"), [("llama-3.2-1b", 18.1), ("llama-3.2-3b", 51.3)])
def test_totals_of_the_paper(model, published_mj, answer):
    said = answer(f"{model} --chip halora-2026 --rank 4 --tokens 512")
    assert said.keys() >= STABLE_KEYS
    assert said["total_mj"] == pytest.approx(published_mj, rel=0.05)
    assert said["baseline"] == "a100_halora_paper"
    assert 0.030 < said["ratio"] < 0.035
    assert 0.004 < said["lora_share"] < 0.006
    assert said["total_mj"] == pytest.approx(sum(said["components_mj"].values()))
    assert said["ratio"] == pytest.approx(said["total_mj"] / said["baseline_mj"])


def test_the_answer_is_the_librarys(answer):
    arguments = "--chip isaac --rank 8 --tokens 100 --phase decode --sequences 3 --set adc.bits=6 --set tile.rows=64"
    said = answer(f"qwen2.5-0.5b {arguments}")
    chip = load_chip({"preset": "isaac", "adc": {"bits": 6}, "tile": {"rows": 64}})
    energy = energy_per_token(
        named_shapes()["qwen2.5-0.5b"],
        chip,
        rank=8,
        targets=LoraSettings().targets,
        context_tokens=100,
        phase=Phase.DECODE,
        sequences=3,
    )
    assert said["components_mj"] == pytest.approx({name: uj * 0.1 for name, uj in energy.components_uj.items()})
    assert (said["phase"], said["tokens"], said["rank"]) == ("decode", 100, 8)
    assert (said["chip_hash"], said["boundary"]) == (chip.content_hash, energy.boundary)
    assert said["lora_share"] == pytest.approx(energy.lora_share)
    told = energy.metrics | {"energy_uj_per_token": said["total_mj"] * 10}
    assert {name: said.get(name, told[name]) for name in energy.metrics} == pytest.approx(energy.metrics)
    assert said["path_components_us"] == pytest.approx(energy.latency.components_us)
    assert (said["path_us"], said["interval_us"]) == pytest.approx((energy.latency.path_us, energy.latency.interval_us))
    assert (said["bottleneck"], said["dies"]) == (energy.latency.bottleneck, energy.latency.dies)
    assert said["baseline"] == "a100_decode_bw"


def test_every_preset_has_an_energy(answer):
    for preset in preset_names():
        assert answer(f"llama-3.2-1b --chip {preset}")["total_mj"] > 0


def test_a_model_is_a_name_a_hub_id_a_file_or_a_folder(answer, tmp_path):
    config = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= {"head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    totals = {
        answer(model)["total_mj"]
        for model in ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", str(tmp_path / "config.json"), str(tmp_path))
    }
    assert len(totals) == 1


def test_a_chip_is_read_from_a_file(answer, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(load_chip("halora-2026").model_copy(update={"name": "mine"}).model_dump_json())
    said = answer(f"llama-3.2-1b --chip {path}")
    assert said["chip"] == "mine"
    assert said["chip_hash"] == load_chip("halora-2026").content_hash


def test_table_and_csv_hold_the_components(halora):
    code, table, err = halora("energy llama-3.2-1b")
    assert (code, err) == (0, "")
    for shown in ("adc", "softmax", "18.86", "a100_halora_paper", "0.03426", "outside: lm_head", "prefill", "13.6"):
        assert shown in table
    code, text, _ = halora("energy llama-3.2-1b --format csv")
    rows = list(csv.DictReader(text.splitlines()))
    assert code == 0
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)


def test_a_baseline_of_another_phase_is_remarked_on_stderr(halora):
    code, out, err = halora("energy llama-3.2-1b --phase decode --baseline a100_int8_peak --format json")
    assert code == 0
    assert json.loads(out)["baseline"] == "a100_int8_peak"
    assert "stands for prefill, not for decode" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "lama-3.2-1b --chip halora-2025 --baseline a100_int8 --phase prefil --rank -1 --tokens 0 --sequences 0",
            [
                "no model 'lama-3.2-1b'",
                "did you mean 'llama-3.2-1b'",
                "no chip 'halora-2025'",
                "did you mean 'halora-2026'",
                "no baseline 'a100_int8'",
                "did you mean 'a100_int8_peak'",
                "no phase 'prefil'",
                "--rank: must be 0 or more, got -1",
                "--tokens: must be 1 or more, got 0",
                "--sequences: must be 1 or more, got 0",
            ],
        ),
        (
            "qwen3-8b --baseline a100_halora_paper --set adc.bits=1.5 --set tile.row=3 --set noise.sigma=-0.1",
            [
                "chip.adc.bits: ",
                "got 1.5",
                "chip.tile.row: unknown key; did you mean 'rows'",
                "chip.noise.sigma: ",
                "got -0.1",
                "'a100_halora_paper' has no figure for this model",
            ],
        ),
        (
            "llama-3.2-1b --set adc.bits=12 --set mapping.sram=[model.layers.99.*]",
            ["'isaac' cover 4 to 10 bits, got 12", "'model.layers.99.*' matches no layer"],
        ),
        ("llama-3.2-1b --set tile.rows=0", ["chip.tile.rows: ", "got 0"]),
        ("llama-3.2-1b --set costs.shift_ad_pj=1", ["no constant 'shift_ad_pj'; did you mean 'shift_add_pj'"]),
        ("llama-3.2-1b --set adc", ["--set adc: write PATH=VALUE, for example adc.bits=6"]),
        ("llama-3.2-1b --set adc.bits.x=1", ["'bits' is a int, which has no keys"]),
        ("no/such/config.json", ["no model 'no/such/config.json'"]),
    ],
)
def test_mistakes_are_told_at_once(arguments, told, halora):
    code, out, err = halora(f"energy {arguments}")
    assert (code, out) == (2, "")
    assert [part for part in told if part not in err] == []
    assert "Traceback" not in err


@pytest.mark.parametrize(("text", "says"), [("a: [1", "is not YAML"), ("- 1", "a mapping of keys to values")])
def test_a_chip_file_that_is_none_is_refused(text, says, halora, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = halora(f"energy llama-3.2-1b --chip {tmp_path / 'bad.yaml'}")
    assert code == 2
    assert says in err


def test_the_table_in_the_documentation_is_true(answer):
    section = DOCS.read_text().partition("## Every knob has two sides")[2]
    row = r"^\| `(--[^`]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|"
    rows = re.findall(row, section, flags=re.MULTILINE)
    assert len(rows) > 20
    reference = answer("llama-3.2-1b --chip halora-2026")["total_mj"]
    for arguments, *told in rows:
        said = answer(f"llama-3.2-1b {arguments}")
        energy = (f"{said['total_mj']:.1f}", f"{said['total_mj'] / reference:.2f}")
        assert [*energy, f"{said['path_us']:.1f}", f"{said['area_mm2']:.0f}"] == told, arguments
    totals = [float(mj) for _, mj, *_ in rows]
    assert max(totals) / min(totals) > 20
