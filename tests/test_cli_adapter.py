"""Oracles: MLflow's registry read on its own, `sha256sum`, PEFT without this package, one change of a bundle at a time.

One tiny sweep is launched, and its first selection made by two processes at once; the tests look at what that left.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from halora.dashboard.app import create_app
from halora.errors import UserError
from halora.files import sha256_of
from halora.records import registry
from halora.records.names import CERTIFICATION_FILE
from halora.records.store import Store
from halora.selection.bundle import CHECKSUMS_FILE, FILES, write_checksums
from halora.selection.verify import verify as verify_bundle
from halora.training.tasks import load_rows
from halora.trial_folder import ADAPTER_WEIGHTS

HALORA = Path(sys.executable).parent / "halora"
GATES = {
    "min_accuracy": 0.01, "min_yield": 0.5, "confidence": 0.9, "candidates": 3, "test_rows": 12, "robustness_chips": 1,
}  # fmt: skip


def _launched(store, *arguments):
    environment = os.environ | {"HALORA_STORE": str(store), "RAY_AUTH_MODE": "disabled", "COLUMNS": "200"}
    command = [HALORA, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_models, tiny_task):
    """A store with a sweep of two trials on a chip that ages and keeps the largest weights in SRAM."""
    folder = tmp_path_factory.mktemp("selection")
    evaluation = {"chip_instances": 2, "rows": 8, "calibration_tokens": 16}
    training = {
        "method": "noise_lora",
        "steps": 4,
        "batch_size": 4,
        "report_every": 4,
        "schedule": {"strength_start": 0.5},
    }
    sweep = {
        "name": "tiny",
        "family": "selection",
        "trials": 2,
        "concurrent": 2,
        "trial": {
            "model": tiny_models["llama"],
            "task": tiny_task,
            "chip": {
                "preset": "neurram-2022",
                "read": {"white_us": 0.0},
                "mapping": {"outliers": {"share": 0.01, "weight_bits": 6}},
            },
            "training": training,
            "evaluation": evaluation,
        },
        "space": {"lora.rank": {"choices": [2, 4]}},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 5.0},
        "gates": GATES,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sweep))
    launch = _launched(folder / "store", "sweep", "launch", folder / "tiny.yaml")
    said = launch.communicate(timeout=1200)
    assert launch.returncode == 0, said
    return folder / "store"


@pytest.fixture(scope="module")
def selections(store):
    """(Exit code, stdout, stderr) of two selections that were begun at once."""
    both = [_launched(store, "adapter", "select", "tiny", "--prefer", "energy") for _ in range(2)]
    return [(out_err := each.communicate(timeout=1200)) and (each.returncode, *out_err) for each in both]


@pytest.fixture(scope="module")
def registered(store, selections):
    """The one registered model and its one version."""
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (model,) = client.search_registered_models()
    (version,) = client.search_model_versions(f"name = '{model.name}'")
    return model, version


@pytest.fixture(scope="module")
def exported(store, registered, tmp_path_factory):
    """The bundle of the candidate."""
    folder = tmp_path_factory.mktemp("bundles") / "deep" / "bundle"
    export = _launched(store, "adapter", "export", f"{registered[0].name}@candidate", folder)
    said = export.communicate(timeout=600)
    assert export.returncode == 0, said
    return folder


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def ask(halora, store):
    """The command line over the store."""
    return lambda arguments: halora(f"{arguments} --store {store}")


@pytest.fixture
def verify(halora, tiny_models, tiny_task):
    """Verify a bundle against its base and task, or others."""

    def run(folder, base=tiny_models["llama"], task=tiny_task):
        return halora(f"adapter verify {folder} --base {base} --task {task}")

    return run


def test_two_selections_at_once_register_one_candidate(selections, registered):
    assert [code for code, _, _ in selections] == [0, 0], selections
    model, version = registered
    assert re.fullmatch(r"halora\.llama\.tiny\.neurram-2022-[0-9a-f]{8}", model.name)
    assert dict(model.aliases) == {"candidate": version.version}
    gates = {key.removeprefix("halora.gate."): value for key, value in version.tags.items() if ".gate." in key}
    assert gates.keys() == {"no_nan", "min_accuracy", "min_chips", "min_yield", "reload_reproduces"}
    assert re.fullmatch(r"min_yield 0\.\d+ >= 0\.5", gates["min_yield"])
    said = "".join(err for _, _, err in selections)
    assert "another selection of this sweep is running" in said
    assert said.count("registered: ") == 1
    assert said.count("registered already, nothing changed: ") == 1
    for _, out, _ in selections:
        assert re.search(r"10 years +n/a: .*172800", out)
        assert version.description in out


def test_certified_chips_and_rows_are_those_that_nothing_saw(store, tiny_task, selections):
    attempt = store / "sweeps/tiny/selection/attempt-01"
    first, second = (json.loads(path.read_text()) for path in sorted(attempt.glob("chips-*.json")))
    recorded = json.loads((attempt / "recorded.json").read_text())
    assert first["row_ids"] == second["row_ids"] == [row.row_id for row in load_rows(tiny_task, "test", 12)]
    assert recorded["row_ids"] == [row.row_id for row in load_rows(tiny_task, "validation", 8)]
    assert first["chip_seeds"] + second["chip_seeds"] == [0, 1, 2, 3, 4]
    assert first["noise_db"][:2] != recorded["noise_db"]  # chip 0 of another pool is another chip


def test_selecting_again_changes_nothing(store, ask, registered):
    before = {path: path.read_bytes() for path in (store / "sweeps/tiny/selection").rglob("*") if path.is_file()}
    code, _, err = ask("adapter select tiny --prefer energy")
    assert code == 0
    assert "nothing changed" in err
    assert "chip evaluations" not in err
    assert {path: path.read_bytes() for path in before} == before
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    model = client.get_registered_model(registered[0].name)
    assert model.last_updated_timestamp == registered[0].last_updated_timestamp
    assert len(client.search_model_versions()) == 1


def test_a_selection_that_ends_before_mlflow_has_its_certification_is_completed_by_the_next(
    store, ask, registered, monkeypatch
):
    """The file was written first, and the next selection took what is in it for logged."""
    file = store / "sweeps/tiny/selection/attempt-01/certification.json"
    before, logged = file.read_bytes(), []

    class Killed(BaseException):
        pass

    def kill(*arguments):
        raise Killed

    log = registry.log_certification
    file.unlink()
    monkeypatch.setattr(registry, "log_certification", kill)
    with pytest.raises(Killed):
        ask("adapter select tiny --prefer energy")
    monkeypatch.setattr(registry, "log_certification", lambda *files: (logged.append(files), log(*files)))
    assert ask("adapter select tiny --prefer energy")[0] == 0
    assert len(logged) == 1
    assert file.read_bytes() == before


def test_who_qualifies_and_how_many_chips_it_takes_without_touching_anything(ask, store, selections):
    before = sorted((store / "sweeps/tiny/selection").rglob("*"))
    code, out, err = ask("adapter select tiny --dry-run --max-energy 1e-9 --yield 0.95 --format json")
    assert code == 0
    assert all(row["why_not"][0].startswith("max_energy_uj_per_token") for row in json.loads(out))
    assert "1 certification begun in this store on test rows of tiny took 0.05 of an error level of 0.1" in err
    assert "80 with 0, 119 with 1, 153 with 2" in err  # the next takes a third of the 0.05 left
    assert sorted((store / "sweeps/tiny/selection").rglob("*")) == before
    code, _, err = ask("adapter select tiny --max-energy 1e-9")
    assert (code, "no trial qualifies" in err) == (1, True)


def test_the_error_level_is_remembered(ask, selections):
    code, _, err = ask("adapter select tiny --confidence 0.95")
    assert code == 2
    assert "leaves nothing for another certification on these test rows: the 1 begun" in err
    code, _, err = ask("adapter select tiny --min-accuracy 0")
    assert (code, "which every chip reaches" in err) == (2, True)
    code, _, err = ask("adapter select tiny --yield 1.5 --set min_chip=3")
    assert code == 2
    assert "gates.min_yield" in err
    assert "did you mean 'min_chips'" in err


def test_list_show_compare_promote(ask, registered):
    name = registered[0].name
    code, out, _ = ask("adapter list --format json")
    (row,) = json.loads(out)
    assert (code, row["name"], row["aliases"]) == (0, name, "candidate")
    code, out, _ = ask(f"adapter show {name}/1")
    assert code == 0
    assert "At least" in out
    code, out, _ = ask(f"adapter compare {name}/1 {name}@candidate --format json")
    assert (code, json.loads(out)) == (0, [])
    code, _, err = ask(f"adapter promote {name}@candidate")
    assert (code, "no champion before it" in err) == (0, True)
    code, _, err = ask(f"adapter promote {name}@champion")
    assert (code, "the champion already" in err) == (0, True)
    code, _, err = ask("adapter show halora.lama@candidate")
    assert code == 2
    assert f"{name}/1" in err
    code, _, err = ask("adapter register tiny/7")
    assert (code, "is not certified" in err) == (2, True)
    trial = row["trial"]
    code, _, err = ask(f"adapter register {trial}")
    assert (code, "nothing changed" in err) == (0, True)


def test_the_champion_that_is_replaced_is_remembered(store, registered):
    from halora.records.registry import find_adapter, promote, register

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    first = find_adapter(client, f"{registered[0].name}/1")
    run = client.get_run(first.run_id)
    tags = {key: value for key, value in first.tags.items() if ".gate." in key or key == "halora.yield_bound"}
    tags |= {"halora.attempt": "2", "halora.adapter_sha256": first.tags["halora.adapter_sha256"]}
    second, changed = register(client, "halora.other", run, tags, "again")
    assert (second.version, second.aliases, changed) == (1, ("candidate",), True)
    third, changed = register(client, "halora.other", run, tags | {"halora.attempt": "3"}, "again")
    assert (third.version, third.aliases, changed) == (2, ("candidate",), True)
    assert promote(client, second) is None
    assert promote(client, third) == 1
    replaced = find_adapter(client, "halora.other@champion")
    assert (replaced.version, replaced.tags["halora.replaced"]) == (2, "1")
    assert find_adapter(client, "halora.other/1").aliases == ()
    client.delete_registered_model("halora.other")


def test_a_bundle_holds_what_it_should_and_no_path_of_this_machine(exported, tiny_models, tmp_path_factory):
    assert {path.name for path in exported.iterdir()} == {*FILES, CHECKSUMS_FILE}
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", CHECKSUMS_FILE], cwd=exported, check=True)
    assert json.loads((exported / "chip.json").read_text())["mapping"]["outliers"]["share"] == 0.01
    text = "".join(path.read_text() for path in exported.iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama"
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nbase_model: llama\nlibrary_name: peft\n")
    assert "## Robustness" in card
    assert json.loads((exported / "certification.json").read_text())["certificate"]["statement"] in card


def test_plain_peft_loads_the_bundle_where_this_package_is_not(exported, tiny_models):
    code = (
        "import importlib.util as u; assert u.find_spec('halora') is None\n"
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({tiny_models['llama']!r})\n"
        "ids = torch.arange(5, 25)[None]; clean = base(ids).logits\n"
        f"model = PeftModel.from_pretrained(base, {str(exported)!r})\n"
        "print(float((model(ids).logits - clean).abs().max()))"
    )
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": packages, "HOME": os.environ["HOME"]}
    python = Path(sys.base_prefix) / "bin" / "python3"
    run = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) > 1e-4


def test_a_bundle_verifies(exported, verify):
    code, out, err = verify(exported)
    assert code == 0, out + err
    assert not re.search(r"FAIL", out)
    assert {line.split("  ")[0].strip() for line in out.splitlines() if " pass " in line} == {
        *("files", "claims", "base", "energy", "rows", "plain PEFT", "scores", "certificate", "robustness"),
    }
    assert {line.split("  ")[0].strip() for line in out.splitlines() if " unverified " in line} == {
        *("signature", "origin", "error level", "gates asked", "reload_reproduces"),
    }
    assert re.search(r"clean (0|\S+e-\d\d) \(allowed 0\.0001\)", out)


def test_a_bundle_on_a_url_is_the_bundle_in_the_folder(s3, ask, registered, exported, verify, tmp_path):
    """Oracle: the bundle exported to a folder; the objects as fsspec has them."""
    url, export = "s3://bucket/bundles/one", f"adapter export {registered[0].name}@candidate s3://bucket/bundles/one"
    code, _, err = ask(export)
    assert (code, f"halora adapter verify {url}" in err) == (0, True), err
    fs = fsspec.filesystem("s3")
    objects = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(url)}
    assert objects == {path.name: path.read_bytes() for path in exported.iterdir()}
    code, out, err = verify(url)
    assert (code, "FAIL" in out) == (0, False), out + err
    code, _, err = ask(export)
    assert (code, f"'{url}' exists" in err) == (2, True)
    fs.pipe_file(f"{url}/{ADAPTER_WEIGHTS}", objects[ADAPTER_WEIGHTS][:-1])
    fs.pipe_file(f"{url}/deep/adapter.pkl", b"not to be loaded")
    code, _, err = verify(url)
    assert (code, f"{url}: {ADAPTER_WEIGHTS} was changed" in err) == (2, True)
    assert "deep/adapter.pkl is a pickle, which can run code" in err
    fs.rm_file(f"{url}/deep/adapter.pkl")
    fs.rm_file(f"{url}/{CHECKSUMS_FILE}")  # an export that was interrupted
    code, _, err = verify(url)
    assert (code, f"{url}: no bundle: it has no {CHECKSUMS_FILE}" in err) == (2, True)
    assert ask(export)[0] == 0
    assert fs.cat_file(f"{url}/{ADAPTER_WEIGHTS}") == objects[ADAPTER_WEIGHTS]


@pytest.fixture
def refused(tiny_models, tiny_task):
    """Why a bundle is refused, in this process."""

    def run(folder, base=tiny_models["llama"], task=tiny_task):
        with pytest.raises(UserError) as told:
            verify_bundle(folder, base=base, task=task)
        return str(told.value)

    return run


def _resum(folder):
    """Make a forged bundle consistent, as a careful forger would."""
    content = json.loads((folder / CERTIFICATION_FILE).read_text())
    content["adapter_sha256"] = sha256_of(folder / ADAPTER_WEIGHTS)
    (folder / CERTIFICATION_FILE).write_text(json.dumps(content))
    write_checksums(folder)


def test_an_adapter_perturbed_by_five_percent_disagrees(bundle, verify):
    import torch

    tensors = load_file(bundle / ADAPTER_WEIGHTS)
    torch.manual_seed(0)
    noisy = {name: tensor + 0.05 * tensor.std() * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(noisy, bundle / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _resum(bundle)
    code, out, err = verify(bundle)
    assert code == 1, out + err
    assert re.search(r"scores +FAIL", out)


def test_a_changed_byte_a_missing_file_and_a_pickle_are_told_at_once(bundle, refused):
    weights = bytearray((bundle / ADAPTER_WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (bundle / ADAPTER_WEIGHTS).write_bytes(weights)
    (bundle / "chip.json").unlink()
    (bundle / "adapter_model.bin").write_bytes(b"\x80\x04.")
    told = refused(bundle)
    assert "adapter_model.safetensors was changed" in told
    assert "chip.json is missing" in told
    assert "adapter_model.bin is a pickle, which can run code" in told


def test_foreign_and_missing_tensors_are_told_by_name(bundle, refused):
    tensors = load_file(bundle / ADAPTER_WEIGHTS)
    gone = next(iter(tensors))
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(gone)
    save_file(tensors, bundle / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    _resum(bundle)
    told = refused(bundle)
    assert "tensor 'base_model.model.lm_head.lora_A.weight' does not belong" in told
    assert f"tensor '{gone}' is missing" in told


def test_another_base_or_task_is_refused(exported, refused, tiny_models):
    assert "another base model" in refused(exported, base=tiny_models["qwen2"])
    assert "does not give the test rows" in refused(exported, task="arc-easy")


def test_what_is_no_bundle_and_a_folder_that_exists_are_refused(ask, halora, registered, tmp_path):
    code, _, err = halora(f"adapter verify {tmp_path}")
    assert (code, "it has no SHA256SUMS" in err) == (2, True)
    code, _, err = ask(f"adapter export {registered[0].name}@candidate {tmp_path}")
    assert (code, "exists" in err) == (2, True)


def test_a_task_without_a_test_split_is_told(tiny_trial, tmp_path, tiny_task):
    from halora.errors import UserError
    from halora.selection.certification import test_rows
    from halora.spaces.gates import Gates

    folder = Path(shutil.copytree(tiny_task, tmp_path / "task"))
    config = tiny_trial().model_copy(update={"task": str(folder)})
    with pytest.raises(UserError, match="has 24 rows in its test split"):
        test_rows(config, Gates(test_rows=25))
    (folder / "test.jsonl").unlink()
    other = config.model_copy(update={"task": str(folder) + "/"})  # read anew
    with pytest.raises(UserError, match=r"lacks test\.jsonl"):
        test_rows(other, Gates())


def test_another_launch_has_an_identity_and_certified_chips_of_its_own(store, registered):
    """The last test here, as it adds to the store: a second sweep, launched from the first's own file."""
    file = store / "sweeps/tiny/sweep.yaml"
    launch = _launched(store, "sweep", "launch", file, "--name", "again", "--set", "trials=1")
    said = launch.communicate(timeout=1200)
    assert launch.returncode == 0, said
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    launches = {}
    for name in ("tiny", "again"):
        (experiment,) = client.search_experiments(filter_string="name = 'selection'")
        (parent,) = client.search_runs(
            [experiment.experiment_id], f"tags.`halora.sweep` = '{name}' and tags.`halora.kind` = 'sweep'"
        )
        launches[name] = yaml.safe_load((store / f"sweeps/{name}/sweep.yaml").read_text())["launch"]
        assert parent.data.tags["halora.launch"] == launches[name]
    assert all(re.fullmatch("[0-9a-f]{32}", launch) for launch in launches.values())
    assert len(set(launches.values())) == 2
    select = _launched(store, "adapter", "select", "again", "--yield", "0.3", "--format", "json")
    out, err = select.communicate(timeout=1200)
    assert select.returncode in (0, 1), err  # whether it passes is not the question
    certificates = [json.loads(out)[0]["certificate"]]
    certificates.append(
        json.loads((store / "sweeps/tiny/selection/attempt-01/certification.json").read_text())["certificate"]
    )
    assert [(each["launch"], each["earlier"]) for each in certificates] == [
        (launches["again"], 1),
        (launches["tiny"], 0),
    ]
    noise = [
        json.loads((store / f"sweeps/{name}/selection/attempt-01/chips-00000.json").read_text())["noise_db"]
        for name in ("tiny", "again")
    ]
    assert not set(noise[0]) & set(noise[1])  # the same base on the same description: only the chips differ


@pytest.mark.slow
def test_the_page_certifies_and_registers_a_trial(store, registered):
    """Comes last: it registers another version."""
    app = create_app(Store.at(store), allow_certify=True)
    client, origin = TestClient(app, base_url="http://127.0.0.1"), {"origin": "http://127.0.0.1"}
    (number,) = {0, 1} - {int(registered[1].tags["halora.trial"])}
    card = f"/sweeps/tiny/trials/{number}"
    (token,) = re.findall(r'name="token" value="([^"]+)"', client.get(card).text)
    client.post(f"{card}/certify", data={"token": token, "confirm": "yes"}, headers=origin)
    job = app.state.certifier.last
    assert job.process.wait(timeout=1200) == 0, job.log.read_text()
    said = client.get(card).text
    assert "Certification started here: passed and registered" in said
    assert "registered: " in said  # what the command said
    versions = MlflowClient(f"sqlite:///{store / 'mlflow.db'}").search_model_versions(f"name = '{registered[0].name}'")
    assert {int(version.tags["halora.trial"]) for version in versions} == {0, 1}
    assert f'href="{card}"' in client.get("/adapters").text
