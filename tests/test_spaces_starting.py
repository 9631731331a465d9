"""Oracles: the check of sweep files, and the worst trial of the space priced on its own."""

import itertools

import pytest
import yaml

from halora.hardware.chip_files import preset_names
from halora.pricing import trial_energy
from halora.spaces.starting import starting_file
from halora.spaces.sweep import load_sweep


def test_a_new_file_is_valid_for_every_model_task_and_chip(tiny_models, tiny_task, halora, tmp_path):
    cases = list(itertools.product([*tiny_models.values()], ["arc-easy", tiny_task], ["halora-2026"]))
    cases += [(tiny_models["llama"], tiny_task, chip) for chip in preset_names()]
    for number, (model, task, chip) in enumerate(cases):
        path = tmp_path / f"{number}.yaml"
        path.write_text(starting_file(model, task, chip))
        sweep = load_sweep(str(path))
        assert (sweep.trial["model"], sweep.trial["task"], sweep.trial["chip"]) == (model, task, chip)
        worst = {"lora.rank": 16, "chip.adc.bits": sweep.space["chip.adc.bits"].high}
        assert trial_energy(sweep.resolve(worst)).total_uj_per_token < sweep.reference_point["energy_uj_per_token"]
    code, _, err = halora(f"init {tmp_path / 'new.yaml'} --model {tiny_models['qwen3']} --task {tiny_task} --name mine")
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["name"] == "mine"
    assert (tmp_path / "new.yaml").read_text().count("#") > 10
    assert halora(f"sweep validate {tmp_path / 'new.yaml'}")[0] == 0


@pytest.mark.parametrize("command", ["init {}/new.yaml --model nowhere --task arc-esy --chip halora-2025", "init {}"])
def test_mistakes_are_told_at_once(command, halora, tmp_path):
    code, _, err = halora(command.format(tmp_path))
    assert code == 2
    told = ["no model 'nowhere'", "did you mean 'arc-easy'", "did you mean 'halora-2026'"]
    assert [part for part in told if part not in err] == [] or "is no new .yaml file" in err
    assert not (tmp_path / "new.yaml").exists()
