"""Oracles: closed forms of single layers, chips without groups, and the definition of a band of depth."""

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halora.errors import UserError
from halora.hardware.addressing import NoiseKey, Role
from halora.hardware.chip import Chip, load_chip
from halora.hardware.costs import adc_cost, energy_constants
from halora.hardware.energy import energy_per_token
from halora.hardware.instance import ChipInstance
from halora.hardware.layers import changed_everywhere
from halora.hardware.mapping import Placement
from halora.hardware.shapes import known_shape
from halora.training.calibration import setting_converters
from halora.training.models import load_base
from halora.training.rram import install

DOWN = {"match": "*.down_proj", "adc": {"bits": 5}}
FIRST_HALF = {"depth": [0, 0.5], "tile": {"rows": 128}, "coding": {"replicas": 2}}
MIXED = {"preset": "halora-2026", "layers": {"down": DOWN, "first": FIRST_HALF}}


def _sizes(blocks):
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    return {f"model.layers.{i}.{kind}": 10 for i in range(blocks) for kind in kinds} | {"lm_head": 10}


@given(st.integers(1, 60), st.integers(1, 8))
def test_bands_that_share_the_depth_share_the_blocks(blocks, bands):
    edges = [i / bands for i in range(bands + 1)]
    groups = {f"b{i}": {"depth": [edges[i], edges[i + 1]], "adc": {"bits": 4 + i % 4}} for i in range(bands)}
    chip = load_chip({"preset": "halora-2026"})
    sizes = _sizes(blocks)
    held = [
        {
            name
            for name, layer in Chip.model_validate(chip.model_dump() | {"layers": {"b": group}})
            .on_layers(sizes)
            .items()
            if layer.groups
        }
        for group in groups.values()
        if any(group["depth"][0] <= (i + 0.5) / blocks < group["depth"][1] for i in range(blocks))
    ]
    assert sum(map(len, held)) == 3 * blocks
    assert set().union(*held) == set(sizes) - {"lm_head"}


def test_a_layer_meets_the_values_of_all_its_groups_and_else_the_chip_s():
    chip = load_chip(MIXED)
    met = chip.on_layers(_sizes(4))
    seen = {name: (layer.chip.adc.bits, layer.chip.tile.rows, layer.groups) for name, layer in met.items()}
    assert seen["model.layers.1.mlp.down_proj"] == (5, 128, ("down", "first"))
    assert seen["model.layers.1.mlp.up_proj"] == (8, 128, ("first",))
    assert seen["model.layers.2.mlp.down_proj"] == (5, 64, ("down",))
    assert seen["model.layers.2.mlp.up_proj"] == (8, 64, ())
    assert met["lm_head"].place is Placement.HOST
    assert not any(layer.chip.layers for layer in met.values())


def test_a_chip_with_groups_is_read_back_as_it_was_written():
    chip = load_chip(MIXED)
    assert Chip.model_validate(chip.model_dump(mode="json")) == chip
    turned = load_chip(MIXED | {"layers": {"first": FIRST_HALF, "down": DOWN}})
    assert turned.content_hash == chip.content_hash  # no group comes before another
    assert (
        turned.on_layers(_sizes(4))["model.layers.0.mlp.down_proj"].chip
        == chip.on_layers(_sizes(4))["model.layers.0.mlp.down_proj"].chip
    )


def test_groups_that_say_of_no_layer_or_contradict_are_refused_at_once():
    wrong = {
        "typo": {"match": ["*.down_porj", "*.up_proj"], "read": {"averaged": 2}},
        "head": {"match": "lm_head"},
        "sliver": {"depth": [0, 0.01], "dac": {"bits": 4}},
        "down": DOWN,
        "mlp": {"match": "*.mlp.*", "adc": {"bits": 6}, "tile": {"rows": 128}},
    }
    chip = load_chip({"preset": "halora-2026", "layers": wrong, "mapping": {"sram": ["nothing"]}})
    with pytest.raises(UserError) as caught:
        chip.on_layers(_sizes(4))
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "chip.mapping.sram: 'nothing' matches no layer",
        "chip.layers.typo.match: '*.down_porj' matches no layer",
        "chip.layers.head.match: 'lm_head' matches no layer of the chip: chip.mapping.lm_head puts the output "
        "projection there",
        "chip.layers.sliver.depth: none of its layers is between 0 and 0.01 of the 4 blocks",
        "chip.layers: 'down' and 'mlp' both give adc.bits of 'model.layers.0.mlp.down_proj' and 3 more",
    ]


@pytest.fixture(scope="module")
def shape():
    found = known_shape("smollm2-135m-instruct")
    assert found is not None
    return found


def test_what_a_group_saves_is_what_its_layers_cost(shape):
    """Converters of `down_proj` at 5 instead of 8 bits: of every layer so many conversions, so much less each."""
    constants, price = energy_constants(), dict[int, float]()
    for bits in (5, 8):
        price[bits] = adc_cost("isaac", bits, constants).conversion_pj
    uniform, mixed = (
        energy_per_token(shape, load_chip({"preset": "halora-2026", "layers": groups}), rank=0)
        for groups in ({}, {"down": DOWN})
    )
    down = next(linear for linear in shape.linears if linear.name == "down_proj")
    conversions = shape.layers * down.out_features * ceil(down.in_features / 64)
    saved = uniform.components_uj["adc"] - mixed.components_uj["adc"]
    assert saved == pytest.approx(conversions * (price[8] - price[5]) * 1e-6, rel=1e-12)
    others = [name for name in shape.linear_layers if not name.endswith("down_proj")]
    assert {name: mixed.layers_uj[name] for name in others} == {name: uniform.layers_uj[name] for name in others}
    assert mixed.area_mm2 < uniform.area_mm2
    assert mixed.latency.path_us < uniform.latency.path_us


def test_energy_and_area_of_a_mixed_chip_are_between_those_of_its_parts(shape):
    for values in ({"adc": {"bits": 5}}, {"coding": {"slices": 2}}, {"tile": {"rows": 256}}, {"dac": {"bits": 2}}):
        whole = load_chip({"preset": "halora-2026", **values})
        part = load_chip({"preset": "halora-2026", "layers": {"some": {"match": "*.mlp.*", **values}}})
        ends, between = [], energy_per_token(shape, part, rank=4, targets=("q_proj",))
        for chip in (load_chip("halora-2026"), whole):
            ends.append(energy_per_token(shape, chip, rank=4, targets=("q_proj",)).total_uj_per_token)
        assert min(ends) < between.total_uj_per_token < max(ends), values
        assert sum(between.layers_uj.values()) < between.total_uj_per_token


def test_converters_that_no_table_covers_are_told_by_their_groups(shape):
    chip = load_chip({"preset": "halora-2026", "layers": {"down": {"match": "*.down_proj", "adc": {"bits": 12}}}})
    with pytest.raises(UserError, match=r"chip\.layers\.down\.adc\.bits: the costs 'isaac' cover 4 to 10 bits, got 12"):
        energy_per_token(shape, chip, rank=0)


def test_dies_pass_the_finest_inputs_of_any_layer(shape):
    small = {"preset": "halora-2026", "die": {"area_mm2": 50.0}}
    coarse = {"match": "*.mlp.*", "dac": {"input_bits": 4}}
    links = [
        energy_per_token(shape, load_chip(small | {"layers": groups}), rank=0).components_uj["links"]
        for groups in ({}, {"some": coarse}, {"all": coarse | {"match": "*"}})
    ]
    assert links[0] == links[1] == pytest.approx(2 * links[2], rel=1e-12)


def test_every_layer_is_programmed_and_read_as_on_a_chip_of_its_own_values(tiny_models):
    array = install(load_base(tiny_models["llama"], "fp32").causal_lm)
    uniform = {"preset": "halora-2026", "noise": {"sigma": 0.02}, "tile": {"rows": 16}}
    rows = {"first": FIRST_HALF | {"tile": {"rows": 8}}, "down": DOWN}
    mixed = load_chip(uniform | {"layers": rows})
    met = array.on_layers(mixed)
    inputs = {layer.name: _normal(layer.name, 12, layer.in_features) for layer in array.layers}
    found = _products(array, mixed, inputs)
    for own in {layer.groups: layer.chip for layer in met.values() if layer.place is Placement.RRAM}.values():
        alone = _products(array, own, inputs)
        alike = [name for name in alone if met[name].chip == own]
        assert alike
        for name in alike:
            assert torch.equal(found[name], alone[name]), name
    plain = _products(array, load_chip(uniform), inputs)
    differs = {name for name, product in found.items() if not torch.equal(product, plain[name])}
    assert differs == {name for name, layer in met.items() if layer.groups}


def _normal(name, *shape):
    return torch.from_numpy(NoiseKey(role=Role.SEARCH, chip_seed=1, module=name).standard_normal(shape))


@torch.no_grad()
def _products(array, chip, inputs):
    """Outputs of every layer in RRAM, each alone, its converters set on the same inputs."""
    reads = {}
    with setting_converters(array, chip, "exact", reads, 8):
        for layer in array.mapped(chip):
            layer(inputs[layer.name][None])
    array.program(ChipInstance(chip, NoiseKey(role=Role.SEARCH, chip_seed=0), chip.noise.level), reads)
    found = {}
    for layer in array.layers:
        if layer.noisy:
            with array.reading([("row", 12)]):
                found[layer.name] = layer(inputs[layer.name][None]).clone()
    array.clear()
    return found


def test_a_value_for_all_layers_goes_over_what_groups_say():
    share = {"mapping": {"outliers": {"share": 0.01}}}
    chip = load_chip({"preset": "halora-2026", "layers": {"down": DOWN | share, "up": {"match": "*.up_proj", **share}}})
    bare = changed_everywhere(chip, "mapping.outliers.share", 0.0)
    assert {layer.chip.mapping.outliers.share for layer in bare.on_layers(_sizes(2)).values()} == {0.0}
    assert bare.on_layers(_sizes(2))["model.layers.0.mlp.down_proj"].chip.adc.bits == 5
