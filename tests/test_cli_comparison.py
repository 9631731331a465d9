"""Closing comparisons of launched sweeps. Oracles: `halora evaluate` of the same adapters; a run that nobody killed."""

import json
import re
from pathlib import Path

import psutil
import pytest
import yaml
from commands import background, client_of, content_of, halora, runs

from halora.hardware.chip import load_chip


def test_the_closing_comparison_scores_every_contestant_on_every_chip(store, tiny_models, tiny_task, tmp_path):
    """Oracle: `halora evaluate` of the same adapters on the same fresh rows and chips."""
    content = content_of("matrix", tiny_models, tiny_task, steps=4, report_every=2, schedule={"redraw_steps": 1})
    chips = {
        "noisy": {"preset": "halora-2026", "noise": {"sigma": 0.05}},
        "stuck": {"preset": "ideal", "faults": {"stuck_high_rate": 0.05}},
    }
    content |= {
        "trials": 2,
        "concurrent": 2,
        "chips": chips,
        "space": {"chip": {"choices": list(chips)}},
        "first": [{"chip": name} for name in chips],
        "comparison": {"rows": 8, "chip_instances": 3, "by": "chip", "against": "noisy", "chips": [*chips, "ideal"]},
    }
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump(content))
    launched = halora(store, "sweep", "launch", path)
    assert launched.returncode == 0, launched.stderr
    assert "comparison on 3 fresh instances of each chip and 8 fresh rows" in launched.stderr
    assert "the 95 % interval of the gain over 'noisy'" in launched.stderr
    for name in ("untrained", *chips):
        assert re.search(rf"^{name} +[-\d]+ +[01]\.\d{{3}}", launched.stdout, re.MULTILINE)
    (parent,) = runs(store, "matrix", kind="sweep")
    text = client_of(store).download_artifacts(parent.info.run_id, "comparison.json", str(tmp_path))
    comparison = json.loads(Path(text).read_text())
    cells = {(cell["contestant"], cell["chip"]): cell for cell in comparison["cells"]}
    assert set(cells) == {(name, chip) for name in ("untrained", *chips) for chip in (*chips, "ideal")}
    for (name, chip), cell in cells.items():
        assert (cell["margin_gain"] is None) == (name == "noisy")
        if name != "noisy":
            gain = cell["summary"]["margin"] - cells["noisy", chip]["summary"]["margin"]
            assert cell["margin_gain"]["mean"] == pytest.approx(gain)
            assert cell["margin_gain"]["low"] <= gain <= cell["margin_gain"]["high"]
    chip_file = tmp_path / "stuck.yaml"
    chip_file.write_text(yaml.safe_dump(load_chip(chips["stuck"]).model_dump(mode="json")))
    folder = store / "sweeps" / "matrix" / "trials" / f"{cells['noisy', 'stuck']['number']:05d}"
    asked = [
        "--chip",
        chip_file,
        "--instances",
        3,
        "--rows",
        8,
        "--first-row",
        8,
        "--first-chip",
        2,
        "--format",
        "json",
    ]
    evaluated = halora(store, "evaluate", folder, *asked)
    assert evaluated.returncode == 0, evaluated.stderr
    (again,) = json.loads(evaluated.stdout)
    summary = cells["noisy", "stuck"]["summary"]
    assert {name: again[name] for name in summary} == pytest.approx(summary, abs=1e-4)


@pytest.mark.slow
def test_a_comparison_over_seeds_goes_on_after_a_kill(store, tiny_models, tiny_task, tmp_path):
    """Killed while it trains the comparison's adapters; oracle: the same trainings by `halora train`, undisturbed."""
    content = content_of("seeds", tiny_models, tiny_task, steps=16, report_every=2, schedule={"redraw_steps": 4})
    by_method = {"by": "training.method", "against": "lora", "seeds": 2, "equivalence_margin": {"margin": 50.0}}
    content |= {
        "trials": 2,
        "space": {"training.method": {"choices": ["lora", "halora"]}},
        "first": [{"training.method": "lora"}, {"training.method": "halora"}],
        "comparison": {"rows": 8, "chip_instances": 2, **by_method},
        "resources": {"cpus": 1},  # one thread as by hand: sums in another order move what converters round
    }
    path = tmp_path / "seeds.yaml"
    path.write_text(yaml.safe_dump(content))
    with background(store, "sweep", "launch", path) as driver:
        driver.wait_for("comparison, lora with seed 8: trained")
        driver.wait_for("comparison, halora with seed 8: step 4/16")
        workers = driver.workers()
        driver.process.kill()
        driver.end()
    psutil.wait_procs(workers, timeout=120)
    resumed = halora(store, "sweep", "resume", "seeds")
    assert resumed.returncode == 0, resumed.stderr
    assert "training 3 of 4 adapters for the comparison" in resumed.stderr
    told = re.findall(r"comparison, (\w+) with seed (\d): step (\d+)/16", resumed.stderr)
    assert ("lora", "8") not in {(name, seed) for name, seed, _ in told}
    assert min(int(step) for name, seed, step in told if (name, seed) == ("halora", "8")) > 4  # from its checkpoint
    (parent,) = runs(store, "seeds", kind="sweep")
    assert parent.info.status == "FINISHED"
    text = client_of(store).download_artifacts(parent.info.run_id, "comparison.json", str(tmp_path))
    comparison = json.loads(Path(text).read_text())
    origins = [(each["contestant"], each["seed"]) for each in comparison["adapters"]]
    assert origins == [("lora", 8), ("halora", 8), ("lora", 9), ("halora", 9)]
    assert comparison["program"]["version"]
    cells = {cell["contestant"]: cell for cell in comparison["cells"]}
    assert {name: cell["seeds"] for name, cell in cells.items()} == {"untrained": 0, "lora": 2, "halora": 2}
    assert "these 2 adapters of 'halora' are" in resumed.stderr
    by_hand = tmp_path / "by hand"
    fresh = ["--rows", 8, "--first-row", 8, "--first-chip", 2, "--instances", 2, "--format", "json"]
    margins = []
    for seed in (8, 9):
        own = ["--set", "training.method=halora", "--set", f"seed={seed}"]
        trained = halora(store, "train", path, "--output", by_hand / str(seed), "--no-scores", *own)
        assert trained.returncode == 0, trained.stderr
        (scored,) = json.loads(halora(store, "evaluate", by_hand / str(seed), *fresh).stdout)
        margins.append(scored["margin"])
    summary = cells["halora"]["summary"]
    assert summary["margin"] == pytest.approx(sum(margins) / 2, abs=1e-3)
    assert summary["margin_std_seeds"] == pytest.approx(abs(margins[0] - margins[1]) / 2**0.5, abs=1e-3)
    gain = cells["halora"]["margin_gain"]
    assert gain["mean"] == pytest.approx(summary["margin"] - cells["lora"]["summary"]["margin"])
    assert gain["p_equivalent"] < 1
    again = halora(store, "sweep", "resume", "seeds")  # nothing is left to train or to score
    assert "adapters for the comparison" not in again.stderr
    assert "evaluations" not in again.stderr
    assert "these 2 adapters of 'halora' are" in again.stderr
