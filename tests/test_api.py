"""Oracles: what the commands print of the same store, pandas reading its files again, and a frozen list of names.

`surface.txt` is the Python surface: each name with its signature. A change of it belongs in the changelog.
"""

import csv
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from bundles import make_bundle
from recorded_sweeps import begin, finish, made_up_sweep
from transformers import AutoModelForCausalLM

import halora as surface
from halora.analysis.table import IDENTITY, LABELS, METRICS
from halora.api.progress import SweepProgress
from halora.events import Estimated, Reported
from halora.records import names
from halora.records.index import read_sweep_state
from halora.records.recorder import SweepRecorder
from halora.records.store import Store as Place
from halora.spaces.sweep import load_sweep

SURFACE = Path(__file__).parent / "surface.txt"
HEAVY = {"torch", "ray", "mlflow", "transformers", "peft", "deepspeed", "datasets", "matplotlib", "pandas", "scipy"}
RESULTS = (
    "halora.api.energy.ModelEnergy",
    "halora.api.noise.Noise",
    "halora.api.evaluation.Evaluation",
    "halora.analysis.recommendation.Recommendation",
)


# The surface as a whole.


def _members(name, kind):
    lines = [f"{name}{_signature(kind)}"]
    for member, value in sorted(vars(kind).items()):
        if member.startswith("_") and member not in ("__iter__", "__len__"):
            continue
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            lines.append(f"{name}.{member}")
        elif callable(value):
            lines.append(f"{name}.{member}{_signature(value)}")
    return lines


def _signature(call):
    parameters = [
        p for p in inspect.signature(call).parameters.values() if not p.name.startswith("_") and p.name != "self"
    ]
    names = [
        ("*" if p.kind is p.VAR_POSITIONAL else "") + p.name + ("" if p.default is p.empty else f"={p.default!r}")
        for p in parameters
    ]
    first = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if first is not None and not starred:
        names.insert(first, "*")
    return f"({', '.join(names)})"


def _surface():
    """Every public name of the surface with its signature, a line each."""
    lines = []
    for name in surface.__all__:
        value = getattr(surface, name)
        if isinstance(value, type) and name != "UserError":
            lines += _members(name, value)
        else:
            lines.append(f"{name}{_signature(value) if callable(value) else ''}")
    for path in RESULTS:
        module, _, name = path.rpartition(".")
        kind = getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name)
        fields = ", ".join(each.name for each in dataclasses.fields(kind) if not each.name.startswith("_"))
        lines += [f"{name}: {fields}", *_members(name, kind)[1:]]
    return lines


def test_the_surface_is_the_one_that_is_written_down():
    assert _surface() == SURFACE.read_text().splitlines(), (
        "if this is meant: tests/surface.txt, and a line in CHANGELOG.md"
    )
    assert dir(surface) == surface.__all__
    with pytest.raises(AttributeError, match="no attribute 'Chop'"):
        surface.Chop  # noqa: B018


def test_importing_costs_nothing_before_a_name_is_used():
    code = (
        "import sys, halora\n"
        "loaded = {m for m in sys.modules if m.startswith('halora')}\n"
        "for name in halora.__all__: getattr(halora, name)\n"
        "halora.Chip(overrides={'adc.bits': 6}).energy('llama-3.2-1b')\n"
        f"print(sorted(loaded), sorted({HEAVY!r} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['halora'] []"


# Chips.


def test_a_chip_says_what_the_commands_say(halora_json, tiny_models, tmp_path):
    chip = surface.Chip("isaac", {"adc.bits": 6, "tile.rows": 64})
    options = "--chip isaac --set adc.bits=6 --set tile.rows=64"
    found = chip.energy("qwen2.5-0.5b", rank=8, tokens=100, phase="decode")
    assert found.to_json() == halora_json(f"energy qwen2.5-0.5b {options} --rank 8 --tokens 100 --phase decode")
    assert found.total_mj == pytest.approx(sum(found.components_mj.values()))
    noise = chip.noise(tiny_models["llama"])
    assert noise.to_json() == halora_json(f"noise show {options} --model {tiny_models['llama']}")
    assert noise.to_pandas()["layer"].tolist() == [row["layer"] for row in noise.rows]
    assert chip.noise().to_json() == halora_json(f"noise show {options}")
    chip.noise().figure().savefig(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 1000


def test_a_loaded_model_is_taken_as_its_folder_is(tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"], dtype=torch.float32)
    chip = surface.Chip({"preset": "halora-2026", "noise": {"sigma": 0.03}})
    before = {name: id(module) for name, module in model.named_modules()}
    for row, other in zip(chip.noise(model).rows, chip.noise(tiny_models["qwen2"]).rows, strict=True):
        assert row == {"layer": other["layer"], "noise_db": pytest.approx(other["noise_db"], abs=1e-4)}
    assert {name: id(module) for name, module in model.named_modules()} == before
    energy, of_folder = chip.energy(model), chip.energy(tiny_models["qwen2"])
    assert energy.components_mj["adc"] == of_folder.components_mj["adc"]
    assert energy.model == tiny_models["qwen2"]


def test_a_chip_is_refused_with_every_mistake():
    with pytest.raises(surface.UserError) as told:
        surface.Chip("halora-2026", {"adc.bits": 1.5, "tile.row": 3})
    assert len(told.value.problems) == 2
    with pytest.raises(surface.UserError) as told:
        surface.Chip().energy("lama-3.2-1b", rank=-1, tokens=0, phase="prefil")
    assert [problem.partition(":")[0] for problem in told.value.problems] == [
        "tokens",
        "rank",
        "no model 'lama-3.2-1b'",
        "phase",
    ]
    with pytest.raises(surface.UserError, match="a chip is a name, a path or a mapping, got int"):
        surface.Chip(3)


def test_noisy_puts_the_chip_instance_of_a_sweep_under_the_model(tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    tokens = torch.arange(300, 324)[None]
    with torch.no_grad():
        clean, outputs = model(tokens).logits, []
        for chip, number in (("halora-2026", 0), (surface.Chip(), 1), ("halora-2026", 0)):
            with surface.noisy(model, chip, number, calibration=tokens) as same:
                assert same is model
                outputs.append(model(tokens).logits)
        assert torch.equal(model(tokens).logits, clean)
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    with (
        pytest.raises(surface.UserError, match="instance: must be 0 or more, got -1"),
        surface.noisy(model, instance=-1),
    ):
        pass


# Sweeps.


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, tiny_models, tiny_task):
    """A sweep that takes its results from a table, launched from Python: the sweep and how it ended."""
    folder = tmp_path_factory.mktemp("surface")
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", "step", "accuracy", "clean_accuracy", "train_loss", "seconds", "lora.rank", "chip.adc.bits"]
        )
        for trial, (rank, bits) in enumerate((rank, bits) for rank in (2, 4, 8) for bits in (5, 6, 7)):
            writer.writerows(
                [trial, step, 0.1 * bits - 0.02 * step + rank / 100, 0.9, 1, step, rank, bits] for step in (1, 2)
            )
    content = {
        "name": "simulated",
        "family": "surface",
        "trials": 6,
        "trial": {"model": tiny_models["llama"], "task": tiny_task, "chip": "halora-2026", "training": {"steps": 2}},
        "space": {"lora.rank": {"choices": [2, 4, 8]}, "chip.adc.bits": {"low": 5, "high": 7, "kind": "int"}},
        "search": {"sampler": "random"},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 1.0},
    }
    sweep = surface.Sweep(content, {"trial.evaluation.rows": 8}, seed=5, store=folder / "store")
    return sweep, sweep.validate().launch(folder / "curves.csv", progress=False)


def test_a_sweep_from_a_mapping_runs_to_its_end(simulated, halora_json, monkeypatch):
    sweep, outcome = simulated
    monkeypatch.setenv("HALORA_STORE", str(sweep.store.place.root))
    assert (outcome.complete, outcome.failed) == (True, 0)
    assert sweep.config.trial["evaluation"] == {"rows": 8}
    (told,) = halora_json("sweep status simulated")
    assert sweep.status() == told
    assert told | {"state": "ended", "finished": 6} == told
    assert sweep.resume(progress=False).complete
    assert not sweep.stop()
    again = sweep.store.sweep("simulated")
    assert (again.config.seed, again.status()) == (5, told)
    with pytest.raises(surface.UserError, match="was launched before"):
        sweep.launch(progress=False)


def test_a_front_is_the_one_that_the_command_shows(simulated, halora_json, monkeypatch, tmp_path):
    sweep, _ = simulated
    monkeypatch.setenv("HALORA_STORE", str(sweep.store.place.root))
    front, shown = sweep.front(), halora_json("front show simulated")
    assert [point.number for point in front] == [row["trial"] for row in shown]
    assert len(front) == len(shown)
    table = front.to_pandas()
    assert table["trial"].tolist() == [row["trial"] for row in shown]
    assert table["accuracy"].tolist() == pytest.approx([row["accuracy"] for row in shown], abs=1e-4)
    assert table["params.lora.rank"].tolist() == [row["params"]["lora.rank"] for row in shown]
    assert table["knee"].sum() == (front.knee() is not None)
    some = front.filter("rank>=4").filter("bits=6")
    assert {(p.params["lora.rank"] >= 4, p.params["chip.adc.bits"]) for p in some} <= {(True, 6)}
    assert [p.number for p in some] == [
        row["trial"] for row in halora_json("front show simulated --filter 'rank>=4' --filter bits=6")
    ]
    assert len(front.to_pandas(everything=True)) == 6
    front.figure().savefig(tmp_path / "front.png")
    other = sweep.front(objectives=["accuracy", "clean_accuracy"])
    assert [each.metric for each in other.view.objectives] == ["accuracy", "clean_accuracy"]
    assert len(other.figure().axes) == len(other.view.objectives) * (len(other.view.objectives) - 1) / 2
    with pytest.raises(surface.UserError, match="no trial has a field 'rnk'"):
        front.filter("rnk=4")


def test_mistakes_in_a_mapping_are_told_at_once():
    with pytest.raises(surface.UserError) as told:
        surface.Sweep({"name": "x y", "trials": 0, "trial": {"model": "nowhere"}, "spcae": {}}).validate()
    assert all(problem.startswith("the sweep: ") for problem in told.value.problems)
    text = str(told.value)
    assert [part for part in ("name", "trials", "nowhere", "did you mean 'space'") if part not in text] == []
    quick = surface.Sweep("quickstart", {"trials": 3}, name="mine", seed=9)
    assert (quick.name, quick.config.trials, quick.config.seed) == ("mine", 3, 9)
    assert quick.config == load_sweep("quickstart", {"trials": 3, "name": "mine", "seed": 9})
    with pytest.raises(surface.UserError, match="`halora sweep launch FILE --address"):
        quick.launch(address="http://127.0.0.1:8265")


def test_a_table_has_the_same_columns_whatever_is_in_it(tmp_path, tiny_models, tiny_task):
    place = Place.at(tmp_path / "store")
    empty = surface.Store(place).to_pandas()
    fixed = [*IDENTITY, *LABELS, *METRICS]
    assert (list(empty.columns), len(empty)) == (fixed, 0)
    assert set(METRICS) == {*names.COSTS, *names.SCORE_METRICS}
    assert LABELS == names.LABELS
    assert not place.root.exists()
    for name, number in (("one", 2), ("two", 1)):
        sweep = made_up_sweep(place, name, tiny_models["llama"], tiny_task)
        recorder = SweepRecorder(place.sweep(name), sweep)
        for each in range(number):
            begin(recorder, sweep, each, training__method="halora" if each else "lora")
        finish(recorder, place.sweep(name).root, 0, 0.5, **{"accuracy.tiny": 0.25})
    table = surface.Store(place).to_pandas()
    assert list(table.columns) == [
        *fixed,
        "params.lora.rank",
        "params.training.method",
        "accuracy.tiny",
        *sorted(column for column in table.columns if column.startswith("energy_uj_per_token.")),
    ]
    assert table["state"].tolist() == ["finished", "running", "finished"]
    assert table["on_front"].tolist() == [True, False, True]
    points = read_sweep_state(place, "one").points()
    assert table["accuracy"][0] == points[0].accuracy
    assert table["began"][0].timestamp() == points[0].began_ms / 1000
    assert surface.Store(place).to_pandas("two")["sweep"].tolist() == ["two"]
    assert [str(kind) for kind in table.dtypes[:4]] == [str(kind) for kind in empty.dtypes[:4]]
    halora = surface.Store(place)
    assert (halora.export(tmp_path / "trials.parquet"), halora.export(tmp_path / "two.csv", "two")) == (3, 1)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "trials.parquet"), table)
    (row,) = csv.DictReader((tmp_path / "two.csv").open(encoding="utf-8"))
    assert list(row) == list(halora.to_pandas("two").columns)
    assert (row["sweep"], row["trial"], row["on_front"], row["cause"]) == ("two", "0", "True", "")
    with pytest.raises(surface.UserError, match="exists"):
        halora.export(tmp_path / "two.csv")
    with pytest.raises(surface.UserError, match="must end in"):
        halora.export(tmp_path / "two.xlsx")


def test_a_table_says_who_is_on_the_front_by_the_sweep_s_own_objectives(tmp_path, tiny_models, tiny_task):
    """Accuracy and energy are not among them; trial 1 has less of both, and the least area. Each sweep by its own."""
    place = Place.at(tmp_path / "store")
    own = {"objectives": ["clean_accuracy", "area_mm2"], "reference_point": {"clean_accuracy": 0.0, "area_mm2": 99.0}}
    for name, more in (("own", own), ("usual", {})):
        sweep = made_up_sweep(place, name, tiny_models["llama"], tiny_task, **more)
        recorder = SweepRecorder(place.sweep(name), sweep)
        for number, (accuracy, area) in enumerate(((0.6, 5.0), (0.3, 2.0))):
            begin(recorder, sweep, number)
            recorder.record(Reported(trial=number, step=1, metrics={"train_loss": 1.0}))
            finish(recorder, place.sweep(name).root, number, accuracy, clean_accuracy=0.5)
            recorder._write(Estimated(trial=number, step=4, metrics={"area_mm2": area}))
        recorder.close()
    table = surface.Store(place).to_pandas()
    assert table.groupby("sweep")["on_front"].apply(list).to_dict() == {"own": [False, True], "usual": [True, False]}
    surface.Store(place).export(tmp_path / "own.csv", "own")
    assert pd.read_csv(tmp_path / "own.csv")["on_front"].tolist() == [False, True]


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("halora.api.progress.talk._force_terminal", False)
    with SweepProgress(2) as progress:
        progress.trial(0, "running")
        progress.trial(0, "finished", "accuracy 0.5")
    assert [line.split()[:3] for line in capsys.readouterr().err.splitlines()] == [
        ["trial", "0", "running"],
        ["trial", "0", "finished"],
    ]


# Adapters.


def test_an_adapter_in_a_folder_is_scored_as_the_command_scores_it(tiny_models, tiny_task, tmp_path, halora_json):
    made = make_bundle(tmp_path, tiny_models["llama"], tiny_task)
    content = json.loads((made / "trial.json").read_text()) | {"model": tiny_models["llama"], "task": tiny_task}
    (tmp_path / "trial.json").write_text(json.dumps(content))
    found = surface.Adapter(tmp_path / "adapter").evaluate(instances=2, rows=4, overrides={"chip.adc.bits": 7})
    told = halora_json(f"evaluate {tmp_path / 'adapter'} --instances 2 --rows 4 --set chip.adc.bits=7")
    assert [found.to_json()] == told
    assert found.metrics["energy_uj_per_token"] == found.costs["energy_uj_per_token"]
    with pytest.raises(surface.UserError, match="is not registered, and a bundle holds a certificate"):
        surface.Adapter(tmp_path / "adapter").export(tmp_path / "other")
    with pytest.raises(surface.UserError, match="is not a trial of a store"):
        surface.Adapter(tmp_path / "adapter").certify()
    with pytest.raises(surface.UserError, match="no adapter 'nowhere'"):
        surface.Adapter("nowhere", store=tmp_path / "nothing")
