"""Bundles that were forged or made to harm. Oracle: the bundle as it was made, with one thing changed at a time.

Checksums are written anew after each change, as a careful forger would.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import forge, make_bundle
from safetensors.numpy import load_file, save_file

from halora.errors import UserError
from halora.selection.bundle import CHECKSUMS_FILE, FILES, SIGNATURE_FILE, write_checksums
from halora.selection.bundle_reading import read_bundle
from halora.selection.signature import fits, private_key, public_key, sign
from halora.selection.verify import verify
from halora.trial_folder import ADAPTER_WEIGHTS


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_models, tiny_task):
    """The bundle as it was made."""
    return make_bundle(tmp_path_factory.mktemp("made"), tiny_models["llama"], tiny_task)


@pytest.fixture
def bundle(made, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def _refused(folder):
    with pytest.raises(UserError) as refused:
        read_bundle(folder)
    told = str(refused.value)
    assert len(told) < 20_000
    return told


def test_all_that_is_claimed_is_verified_or_said_not_to_be(made, tiny_models, tiny_task):
    checks = verify(made, base=tiny_models["llama"], task=tiny_task)
    assert [check.name for check in checks if check.passed] == [
        "files",
        "claims",
        "base",
        "energy",
        "rows",
        "plain PEFT",
        "scores",
        "certificate",
        "robustness",
    ]
    assert len(read_bundle(made).robustness) > 4
    unverified = ["signature", "origin", "error level", "gates asked", "reload_reproduces"]
    assert [check.name for check in checks if check.passed is None] == unverified
    assert len(checks) == 9 + 5


def _set(content, path, value):
    *parents, last = path.split("/")
    for parent in parents:
        content = content[int(parent) if isinstance(content, list) else parent]
    content[int(last) if isinstance(content, list) else last] = value


FORGED = {
    "accuracy": ("certification.json", "scores/accuracy", 0.99, "scores.accuracy is 0.99, by the rest 0."),
    "interval": ("certification.json", "scores/accuracy_low", 0.9, "scores.accuracy_low is 0.9"),
    "noise of the weights": ("certification.json", "scores/noise_db", -60.0, "scores.noise_db is -60.0"),
    "gate": ("certification.json", "gates/1/value", 0.9, "gates.min_accuracy.value is 0.9"),
    "verdict of a gate": ("certification.json", "gates/1/passed", False, "gates.min_accuracy.passed is false"),
    "threshold": ("certification.json", "gates/2/threshold", 0.5, "gates.max_drop.threshold is 0.5"),
    "no gates": ("certification.json", "gates", [], "lacks the gate reload_reproduces"),
    "yield asked": ("certification.json", "asked/min_yield", 0.9, "certificate.min_yield is 0.2, by the rest 0.9"),
    "bound": ("certification.json", "certificate/bound", 0.99, "certificate.bound is 0.99"),
    "confidence": ("certification.json", "certificate/confidence", 0.99, "certificate.confidence is 0.99"),
    "failures": ("certification.json", "certificate/failures", 2, "certificate.failures is 2"),
    "chips": ("certification.json", "certificate/chips", 300, "certificate.chips is 300"),
    "rows": ("certification.json", "certificate/rows", 3000, "certificate.rows is 3000"),
    "task": ("certification.json", "certificate/task", "arc-easy", 'certificate.task is "arc-easy"'),
    "noise": ("certification.json", "certificate/noise", "none at all", 'certificate.noise is "none at all"'),
    "chip": ("certification.json", "certificate/chip_hash", "0" * 12, "certificate.chip_hash is"),
    "statement": ("certification.json", "certificate/statement", "All chips.", "certificate.statement is"),
    "error level": ("certification.json", "certificate/spent", 0.2, "nothing is left of the error level"),
    "robustness": ("certification.json", "robustness/0/accuracy", 1.0, "accuracy is 1.0, by the rest"),
    "reason": ("certification.json", "robustness/0/reason", "Fine.", 'reason is "Fine."'),
    "dtype": ("certification.json", "dtype", "bf16", 'dtype is "bf16"'),
    "adapter": ("certification.json", "adapter_sha256", "0" * 64, "adapter_sha256 is"),
    "base": ("certification.json", "base", "llama-3.2-1b", 'base is "llama-3.2-1b", by the rest "llama"'),
    "passed": ("certification.json", "passed", False, "passed is false, by the rest true"),
    "an energy of its own": ("energy.json", "energy_uj_per_token", 0.1, "energy.json: energy_uj_per_token is 0.1"),
    "baseline": ("energy.json", "baselines_uj_per_token", {"GPU": 9e9}, "energy.json: baselines_uj_per_token.GPU"),
    "lightning": ("aihwkit-lightning.json", "python", "import os", 'aihwkit-lightning.json: python is "import os"'),
    "chip file": ("chip.json", "adc/bits", 4, "chip.json: adc.bits is 4, by the rest 8"),
    "rank": ("adapter_config.json", "r", 8, "adapter_config.json: r is 8, trial.json says 2"),
    "scale": ("adapter_config.json", "lora_alpha", 64, "lora_alpha is 64, trial.json says 4"),
    "branch": ("adapter_config.json", "rank_pattern", {"q_proj": 4}, "rank_pattern is"),
    "answers": (
        "scores.json",
        "noisy_correct/0/0",
        None,
        "noisy_correct.0.0: Input should be a valid boolean",
    ),
    "trial": ("trial.json", "lora/rank", 4, "adapter_config.json: r is 2, trial.json says 4"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_claim_is_refused_by_name(bundle, name):
    file, path, value, told = FORGED[name]
    content = json.loads((bundle / file).read_text())
    _set(content, path, value)
    (bundle / file).write_text(json.dumps(content))
    write_checksums(bundle)
    assert told in _refused(bundle)


def test_a_forged_card_is_refused_by_its_line(bundle):
    card = (bundle / "README.md").read_text()
    (bundle / "README.md").write_text(card.replace("## Gates", "## All gates pass"))
    write_checksums(bundle)
    assert 'says "## All gates pass", the certification "## Gates"' in _refused(bundle)


def test_scores_that_contradict_themselves_or_lack_values_are_refused(bundle):
    content = json.loads((bundle / "scores.json").read_text())
    ragged = content | {"noisy": [row[:-1] for row in content["noisy"]], "noise_db": content["noise_db"][:1]}
    for changed, told in (
        (ragged, ("noisy: not of 3 x 6 values", "noise_db: not of 3 values")),
        (content | {"noisy_correct": [[True] * 6] * 3, "noisy": [[-1.0] * 6] * 3}, ("contradicts itself",)),
        (content | {"chip_seeds": [0, 1, 7]}, ("its chips are not those from 0 on",)),
        (content | {"row_ids": ["a"] * 6}, ("two different rows or more",)),
        (content | {"clean": [float("nan")] * 6}, ("clean.0: Input should be a finite number",)),
        ({"clean": [1.0]}, ("row_ids: Field required",)),
        ([], ("Input should be an object",)),
    ):
        (bundle / "scores.json").write_text(json.dumps(changed))
        write_checksums(bundle)
        said = _refused(bundle)
        assert all(each in said for each in told), said


def _forged(made, folder, name):
    """A consistent forgery: whoever made it computed everything anew from what is false."""
    true = read_bundle(made)
    scores, line, great = true.scores, next(iter(true.robustness)), (9.0,) * 6
    right = {"noisy": (great,) * 3, "noisy_correct": ((True,) * 6,) * 3}
    better = replace(true.robustness[line], noisy=(great,), noisy_correct=((True,) * 6,))
    changes = {
        "scores": {"scores": replace(scores, **right)},
        "energy": {"energy": true.certification.energy | {"energy_uj_per_token": 0.01}},
        "rows": {"rows_digest": "0" * 32},
        "noise": {"scores": replace(scores, noise_db=tuple(each - 20 for each in scores.noise_db))},
        "robustness": {"robustness": true.robustness | {line: better}},
        "beside": {"scores": replace(scores, noisy_beside=(great,) * 3)},
    }
    return forge(made, folder, **changes[name])


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("scores", "scores"),
        ("energy", "energy"),
        ("rows", "rows"),
        ("noise", "scores"),
        ("robustness", "robustness"),
        ("beside", "scores"),
    ],
)
def test_a_forgery_that_is_consistent_fails_where_it_is_computed_from_the_model(
    made, tmp_path, tiny_models, tiny_task, name, failing
):
    chips = None if name == "robustness" else 1
    checks = verify(_forged(made, tmp_path / name, name), base=tiny_models["llama"], task=tiny_task, chips=chips)
    assert [check.name for check in checks if check.passed is False] == [failing]
    assert name != "robustness" or "gaussian 0.005: " in next(check.text for check in checks if check.passed is False)


def test_what_is_not_scored_again_is_said(made, tiny_models, tiny_task):
    checks = {check.name: check for check in verify(made, base=tiny_models["llama"], task=tiny_task, chips=1)}
    assert "certified chips 1 to 2" in checks["other chips"].text
    assert "lines; without --chips they are taken again" in checks["robustness"].text
    assert checks["other chips"].passed is checks["robustness"].passed is None


# Hostile files.


def _outside(bundle, name):
    target = bundle.parent / "outside"
    shutil.copy(bundle / name, target)
    (bundle / name).unlink()
    return target


def test_links_devices_and_pipes_are_refused_unread(bundle):
    (bundle / "README.md").symlink_to(_outside(bundle, "README.md"))
    (bundle / "chip.json").unlink()
    (bundle / "chip.json").symlink_to("/dev/zero")
    (bundle / "energy.json").unlink()
    os.mkfifo(bundle / "energy.json")
    (bundle / "scores.json").unlink()
    (bundle / "scores.json").mkdir()
    (bundle / "elsewhere").symlink_to("/etc")
    with (bundle / "trial.json").open("w") as file:
        file.truncate(1 << 40)
    said = _refused(bundle)
    for name in ("README.md", "chip.json", "energy.json", "scores.json"):
        assert f"{name} is not a regular file" in said
    assert "trial.json has 1,099,511,627,776 bytes, more than" in said
    assert "elsewhere is not part of a bundle" in said


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("chip/noise", {"kind": "measured", "path": "/dev/zero"}, "chip.noise.path: a bundle names no files"),
        ("chip/noise", {"kind": "measured", "path": "/etc/passwd"}, "chip.noise.path: a bundle names no files"),
        ("chip/retention/ageing", {"kind": "measured", "path": "x"}, "chip.retention.ageing.path"),
        ("chip", "/etc/hostname.yaml", "chip: the whole description is wanted"),
        ("chip", {"preset": "halora-2026"}, "chip.preset: the whole description is wanted"),
        ("model", "../../model", "model: a name is wanted, and no path or address"),
        ("model", "/etc", "model: a name is wanted, and no path or address"),
        ("model", "https://example.com/model", "model: a name is wanted, and no path or address"),
        ("task", "2*/etc+arc-easy", "task: a name is wanted, and no path or address"),
        ("task", {"arc-easy": 1}, "task: a name is wanted"),
        ("task", "x\x1b[2J", "task: a name is wanted"),
        ("evaluation/answer_pattern", "(", "answer_pattern is not a regular expression"),
        ("lora/rank", 10**9, "lora.rank: "),
        ("training/steps", float("inf"), "is not JSON: Infinity is not a number"),
    ],
)
def test_a_description_leads_nowhere(bundle, path, value, told):
    content = json.loads((bundle / "trial.json").read_text())
    _set(content, path, value)
    (bundle / "trial.json").write_text(json.dumps(content))
    write_checksums(bundle)
    said = _refused(bundle)
    assert told in said
    assert "root:" not in said


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_what_is_no_json_or_no_object_is_told_in_a_sentence(bundle, name):
    for content in ("", "[" * 100_000, "[]", "null", '"' + "x" * 1_000_000, "\x00", '{"a": NaN}', "{}", "[1e999]"):
        (bundle / name).write_text(content)
        write_checksums(bundle)
        assert name in _refused(bundle)
    (bundle / name).write_bytes(b"\xff\xfe{\x00}\x00")
    write_checksums(bundle)
    assert name in _refused(bundle)


def test_weights_that_are_none_are_told(bundle):
    for content in (
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04" + b"\0" * 99,
    ):
        (bundle / "adapter_model.safetensors").write_bytes(content)
        write_checksums(bundle)
        assert "adapter_model.safetensors is not in the safetensors format" in _refused(bundle)


def test_an_adapter_that_answers_with_nan_disagrees(made, tmp_path, tiny_models, tiny_task):
    shutil.copytree(made, tmp_path / "adapter")
    weights = tmp_path / "adapter" / ADAPTER_WEIGHTS
    save_file({name: np.full_like(each, np.nan) for name, each in load_file(weights).items()}, weights)
    folder = forge(made, tmp_path / "nan", tmp_path / "adapter")
    checks = verify(folder, base=tiny_models["llama"], task=tiny_task, chips=1)
    assert {check.name for check in checks if check.passed is False} >= {"plain PEFT", "scores"}


# Signatures.


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys, one by OpenSSH and one by OpenSSL."""
    folder = tmp_path_factory.mktemp("keys")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "ssh"], check=True)
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", folder / "pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", folder / "pem", "-pubout", "-out", folder / "pem.pub"], check=True)
    (folder / "pem").chmod(0o600)
    return folder


@pytest.mark.parametrize("kind", ["ssh", "pem"])
def test_a_signature_fits_its_bundle_and_its_key_alone(bundle, keys, kind, tiny_models, tiny_task):
    checksums = bundle / CHECKSUMS_FILE
    signature_file = bundle / SIGNATURE_FILE
    asked = {"base": tiny_models["llama"], "task": tiny_task, "chips": 1, "key": keys / f"{kind}.pub"}
    with pytest.raises(UserError, match="it is not signed"):
        verify(bundle, **asked)
    signature_file.write_text(sign(private_key(keys / kind), checksums.read_bytes()))
    checks = verify(bundle, **asked)
    assert next(check for check in checks if check.name == "signature").passed
    other = keys / ("pem.pub" if kind == "ssh" else "ssh.pub")
    with pytest.raises(UserError, match="is no signature of this bundle by the key"):
        verify(bundle, **asked | {"key": other})
    (bundle / "README.md").write_text("changed")
    write_checksums(bundle)
    for content in (signature_file.read_bytes(), b"", b"\xff" * 90, b"A" * 88):
        signature_file.write_bytes(content)
        with pytest.raises(UserError):
            verify(bundle, **asked)
    key = public_key(keys / f"{kind}.pub")
    assert fits(key, sign(private_key(keys / kind), b"x").encode(), b"x")
    assert not fits(key, sign(private_key(keys / kind), b"x").encode(), b"y")


def test_files_that_are_no_keys_are_told(keys, tmp_path):
    with pytest.raises(UserError, match="is no private Ed25519 key"):
        private_key(_file(tmp_path / "none", "no key"))
    with pytest.raises(UserError, match="is no public Ed25519 key"):
        public_key(keys / "ssh")
    (tmp_path / "open").write_bytes((keys / "ssh").read_bytes())
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(UserError, match=r"may be read by others \(mode 644\)"):
        private_key(tmp_path / "open")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "hush!", "-f", tmp_path / "locked"], check=True)
    with pytest.raises(UserError, match="is under a password"):
        private_key(tmp_path / "locked")


def _file(path, text):
    path.write_text(text)
    path.chmod(0o600)
    return path
