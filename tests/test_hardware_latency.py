"""Oracles: closed forms, a schedule of reads and conversions played event by event, a flow shop, the published pipeline
of ISAAC (Shafiee et al., ISCA 2016), the published throughput of IBM's HERMES (Le Gallo et al., Nature Electronics
2023), and what AccelForge 1.0.467 printed for its own ISAAC."""

from itertools import pairwise

import pytest

from halora.errors import UserError
from halora.hardware.chip import Chip, load_chip
from halora.hardware.chip_files import merge
from halora.hardware.costs import energy_constants
from halora.hardware.energy import COSTS, energy_per_token
from halora.hardware.latency import Latency, Phase
from halora.hardware.shapes import LinearShape, ModelShape, named_shapes
from halora.settings.training import LoraSettings

C = energy_constants()
LLAMA_1B = named_shapes()["llama-3.2-1b"]
BARE = {"attention": False, "buffers": False, "programming": False, "leakage": False}
ADC_NS = 8 * C["adc_isaac_ns_per_bit"]
ONE_DIE = {"area_mm2": 1e6}
SRAM_NS = 8 * C["sram_ns_per_bit"]
CLOCK_NS = C["clock_ns"]


def _chip(preset="halora-2026", **overrides) -> Chip:
    return load_chip({"preset": preset, **overrides})


def _priced(
    shape=LLAMA_1B, *, preset="halora-2026", rank=0, targets=(), tokens=512, phase=Phase.DECODE, at_once=1, **chip
):
    described = _chip(preset, **chip)
    return energy_per_token(
        shape, described, rank=rank, targets=targets, context_tokens=tokens, phase=phase, sequences=at_once
    )


def _latency(*args, **chip) -> Latency:
    return _priced(*args, **chip).latency


def _single(d_in, d_out):
    """One linear layer; attention outside the boundary leaves nothing else."""
    return ModelShape(1, d_in, 1, 1, 1, (LinearShape("q_proj", d_in, d_out),))


def _one_layer(d_in, d_out, **chip):
    return _latency(_single(d_in, d_out), **{"boundary": BARE, **chip})


# One tile, one layer.


def test_one_tile_by_hand():
    """A read of 10 ns, 64 conversions in turn, the shift-and-add: nothing is summed over tiles."""
    found = _one_layer(64, 64)
    assert found.path_us * 1e3 == pytest.approx(10 + 64 * ADC_NS + CLOCK_NS)
    assert found.interval_us * 1e3 == pytest.approx(64 * ADC_NS)
    assert found.components_us["tiles"] == found.path_us


def _played(reads, read_ns, columns, adc_ns):
    """End of a product whose columns share a converter: one sum per column is held while the next pulse is on."""
    read_end = converted = 0.0
    for _ in range(reads):
        read_end = max(read_end + read_ns, converted)  # its sums are held once those of the pulse before are converted
        converted = read_end
        for _ in range(columns):
            converted += adc_ns
    return converted


@pytest.mark.parametrize("read_ns", [1.0, 12.0, 12.5, 300.0])
@pytest.mark.parametrize("share", [1, 16, 64])
@pytest.mark.parametrize(("bits", "averaged"), [(8, 1), (3, 1), (1, 1), (1, 3)])
def test_cycles_of_a_product_as_played_event_by_event(read_ns, share, bits, averaged):
    chip = {"cells": {"read_time_ns": read_ns}, "tile": {"adc_share": share}, "dac": {"bits": bits}}
    found = _one_layer(64, 64, **chip, read={"averaged": averaged})
    reads = -(-7 // bits) * averaged
    assert found.path_us * 1e3 == pytest.approx(_played(reads, read_ns, share, ADC_NS) + CLOCK_NS)
    assert found.interval_us * 1e3 == pytest.approx(reads * max(read_ns, share * ADC_NS))


def test_tiles_slices_and_replicas_work_at_once_and_are_summed_in_a_tree():
    one = _one_layer(64, 64)
    for d_in, d_out, chip, arrays_deep in (
        (64, 64 * 50, {}, 0),
        (128, 64, {}, 1),
        (129, 64, {}, 2),
        (64, 64, {"coding": {"slices": 4}}, 2),
        (640, 64, {"coding": {"slices": 2, "replicas": 3}}, 6),  # 60 arrays
    ):
        found = _one_layer(d_in, d_out, **chip)
        assert (found.path_us - one.path_us) * 1e3 == pytest.approx(arrays_deep * CLOCK_NS, abs=1e-9)
        assert found.interval_us == one.interval_us


def test_a_narrow_layer_converts_its_own_columns_only():
    assert _one_layer(64, 3).interval_us * 1e3 == pytest.approx(10)
    assert _one_layer(64, 3).path_us * 1e3 == pytest.approx(10 + 3 * ADC_NS + CLOCK_NS)


def test_layers_in_sram_and_logic():
    sram = _one_layer(64, 640, mapping={"sram": ["*"]})
    assert sram.components_us["sram"] * 1e3 == pytest.approx(SRAM_NS)
    assert _one_layer(64, 64, mapping={"sram": ["*"]}, sram={"input_bits": 4}).path_us == pytest.approx(
        sram.path_us / 2
    )
    logic = _one_layer(64, 640, mapping={"digital": ["*"]})
    assert logic.components_us["digital"] * 1e3 == pytest.approx(64 * 640 * C["digital_mac_ps"] * 1e-3)


@pytest.mark.parametrize(
    ("outliers", "outliers_ns", "outliers_interval_ns"),
    [
        ({}, 0, 0),
        ({"share": 0.5}, 2048 * C["digital_mac_ps"] * 1e-3, 2048 * C["digital_mac_ps"] * 1e-3),
        ({"share": 0.5, "by": "column"}, SRAM_NS, SRAM_NS),
        ({"share": 0.5, "by": "singular"}, 2 * SRAM_NS, SRAM_NS),
    ],
)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_branch_is_beside_or_after_the_tiles(outliers, outliers_ns, outliers_interval_ns, rank):
    branch_ns = max(outliers_ns, 2 * SRAM_NS if rank else 0)
    for read_ns in (1.0, 5000.0):
        chip = {"boundary": BARE, "cells": {"read_time_ns": read_ns}, "tile": {"adc_share": 1}}
        chip |= {"mapping": {"outliers": outliers}}
        beside, after = (
            _latency(_single(64, 64), rank=rank, targets=("q_proj",), **chip, pipeline={"branch": where})
            for where in ("beside", "after")
        )
        tiles_ns = read_ns + ADC_NS + CLOCK_NS
        assert beside.path_us * 1e3 == pytest.approx(max(tiles_ns, branch_ns))
        assert after.path_us * 1e3 == pytest.approx(tiles_ns + branch_ns)
        slowest_ns = max(read_ns, ADC_NS, outliers_interval_ns, SRAM_NS if rank else 0)
        assert beside.interval_us * 1e3 == pytest.approx(slowest_ns)
        assert after.interval_us == beside.interval_us


# The whole model.


def test_a_block_waits_for_the_slowest_of_what_works_at_once():
    """q and k in SRAM do not help while v is in RRAM, nor gate without up."""
    plain = _latency(boundary=BARE, die=ONE_DIE)
    for patterns in (["*.q_proj", "*.k_proj"], ["*.gate_proj"]):
        assert _latency(boundary=BARE, die=ONE_DIE, mapping={"sram": patterns}).path_us == plain.path_us
    tiles_ns = 10 + 64 * ADC_NS + CLOCK_NS
    deep = [5, 5, 5, 7]  # 2048 inputs are 32 tiles, 8192 are 128
    assert plain.path_us * 1e3 == pytest.approx(16 * sum(tiles_ns + each * CLOCK_NS for each in deep))
    whole = _latency(boundary=BARE, die=ONE_DIE, mapping={"sram": ["*.q_proj", "*.k_proj", "*.v_proj"]})
    assert whole.components_us["tiles"] * 1e3 == pytest.approx(
        16 * sum(tiles_ns + each * CLOCK_NS for each in deep[1:])
    )
    assert whole.components_us["sram"] * 1e3 == pytest.approx(16 * SRAM_NS)


def test_attention_and_softmax_by_hand():
    found = _latency(tokens=100, boundary=BARE | {"attention": True}, attention={"bits": 4})
    assert found.components_us["attention"] * 1e6 == pytest.approx(16 * 2 * 32 * 64 * 100 * C["attention_mac_ps"] / 2)
    assert found.components_us["softmax"] * 1e6 == pytest.approx(16 * 32 * 100 * C["softmax_element_ps"])
    long = _latency(tokens=8000, boundary=BARE | {"attention": True})
    assert long.bottleneck == "attention"
    assert long.interval_us == pytest.approx(long.components_us["attention"] / 16)


def test_inputs_and_outputs_pass_the_ports_of_a_tile():
    found = _one_layer(64, 640, boundary=BARE | {"buffers": True})
    assert found.components_us["moving"] * 1e6 == pytest.approx(2 * 64 * 8 * C["port_ps_per_bit"])


def test_a_model_larger_than_a_die_passes_links():
    area = _priced(boundary=BARE, rank=0).area_mm2
    for most, dies in ((area, 1), (area * 0.999, 2), (area / 7, 7)):
        priced = _priced(boundary=BARE, die={"area_mm2": most})
        assert priced.latency.dies == dies
        crossing_ns = C["link_ns"] + 2048 * 8 * C["link_ps_per_bit"] * 1e-3
        assert priced.latency.components_us["links"] * 1e3 == pytest.approx((dies - 1) * crossing_ns)
        assert priced.components_uj["links"] == pytest.approx((dies - 1) * 2048 * 8 * C["link_pj_per_bit"] * 1e-6)


def _flow_shop(stage_ns, tokens):
    """End of each token: a stage takes one token at a time, in order."""
    free = [0.0] * len(stage_ns)
    ends = []
    for _ in range(tokens):
        now = 0.0
        for i, ns in enumerate(stage_ns):
            now = free[i] = max(now, free[i]) + ns
        ends.append(now)
    return ends


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_prompt_streams_as_through_a_flow_shop(at_once):
    """Digital layers and attention take one token at a time, so a flow shop is all there is to them."""
    shape = ModelShape(3, 16, 2, 8, 9, (LinearShape("q_proj", 16, 16), LinearShape("down_proj", 48, 16)))
    chip = {"mapping": {"digital": ["*"]}, "boundary": BARE | {"attention": True}}
    found = _latency(shape, tokens=40, phase=Phase.PREFILL, at_once=at_once, **chip)
    macs = 2 * 2 * 8 * 40
    block = [16 * 16e-3, macs * C["attention_mac_ps"] * 1e-3, 80 * C["softmax_element_ps"] * 1e-3, 48 * 16e-3]
    ends = _flow_shop(block * 3, 40 * at_once)
    assert found.us_per_token * 40e3 == pytest.approx(ends[-1])
    assert found.tokens_per_s == pytest.approx(40 * at_once / (ends[-1] * 1e-9))


def test_decoding_is_bound_by_the_path_and_then_by_the_slowest_stage():
    """One sequence waits for every layer; as many as there are stages in flight, and none waits any longer."""
    one = _latency()
    assert one.us_per_token == one.path_us
    few, many = _latency(at_once=2), _latency(at_once=10_000)
    assert few.us_per_token == one.us_per_token
    assert few.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    assert many.tokens_per_s == pytest.approx(1e6 / one.interval_us)
    prompt = _latency(tokens=512, phase=Phase.PREFILL)
    assert prompt.us_per_token == pytest.approx(one.interval_us + (one.path_us - one.interval_us) / 512)
    assert prompt.us_per_token < one.us_per_token / 10


def test_power_is_energy_over_time_and_leakage_is_paid_for_as_long_as_it_takes():
    for phase, at_once in ((Phase.PREFILL, 1), (Phase.DECODE, 1), (Phase.DECODE, 8)):
        found = _priced(phase=phase, at_once=at_once)
        metrics = found.metrics
        assert tuple(metrics) == COSTS
        second_uj = metrics["energy_uj_per_token"] * metrics["tokens_per_s"]
        assert metrics["power_w"] == pytest.approx(second_uj * 1e-6)
        leakage_w = found.components_uj["leakage"] * 1e-6 * metrics["tokens_per_s"]
        assert leakage_w == pytest.approx(found.area_mm2 * C["leakage_mw_per_mm2"] * 1e-3)
        assert metrics["latency_us_per_token"] * metrics["tokens_per_s"] == pytest.approx(at_once * 1e6)


def test_no_sequence_at_all_is_refused():
    with pytest.raises(UserError, match="sequences: must be 1 or more, got 0"):
        _priced(at_once=0)


def test_a_chip_that_takes_no_time_is_refused():
    nothing = {"sram_ns_per_bit": 0.0}
    with pytest.raises(UserError, match="a token takes no time"):
        _priced(_single(64, 64), boundary=BARE, mapping={"sram": ["*_proj"]}, costs=nothing)


# Every knob.

AFTER = {"pipeline": {"branch": "after"}}
BUFFERS = {"boundary": {"buffers": True}}
SLOWER = {
    "adc.bits": [{"adc": {"bits": bits}} for bits in range(4, 11)],
    "adc.bits, linear": [{"adc": {"bits": bits, "costs": "linear"}} for bits in (2, 8, 14)],
    "slower survey": [{"adc": {"costs": "survey"}, "costs": {"adc_survey_rate_msps": rate}} for rate in (1e3, 1e2, 10)],
    "tile.adc_share": [{"tile": {"adc_share": share}} for share in (1, 4, 16, 64)],
    "tile.columns": [{"tile": {"columns": columns}} for columns in (32, 64, 128, 256)],
    "tile.rows, ports": [merge(BUFFERS, {"tile": {"rows": rows}}) for rows in (64, 128, 256)],
    "fewer tile.rows": [{"tile": {"rows": rows}} for rows in (256, 128, 64, 32)],
    "cells.read_time_ns": [{"cells": {"read_time_ns": ns}} for ns in (5.0, 10.0, 200.0)],
    "fewer dac.bits": [{"dac": {"bits": bits}} for bits in (8, 4, 2, 1)],
    "dac.input_bits, serial": [{"dac": {"input_bits": bits, "bits": 1}} for bits in (2, 4, 8, 12)],
    "read.averaged": [{"read": {"averaged": reads}} for reads in (1, 2, 4)],
    "coding.slices": [{"coding": {"slices": slices}} for slices in (1, 2, 4)],
    "coding.replicas": [{"coding": {"replicas": replicas}} for replicas in (1, 2, 4)],
    "attention.bits": [{"attention": {"bits": bits}} for bits in (4, 8, 16)],
    "pipeline.branch": [{"pipeline": {"branch": where}} for where in ("beside", "after")],
    "lora.input_bits": [{**AFTER, "lora": {"input_bits": bits}} for bits in (4, 8, 16)],
    "outliers": [{**AFTER, "mapping": {"outliers": {"share": share}}} for share in (0, 0.001, 0.01)],
    "digital": [{"mapping": {"digital": layers}} for layers in ([], ["*.0.mlp.up_proj"], ["*.mlp.up_proj"])],
    "sram.input_bits": [{"mapping": {"sram_fraction": 1.0}, "sram": {"input_bits": bits}} for bits in (4, 8, 16)],
    "smaller die": [{"die": {"area_mm2": area}} for area in (858.0, 400.0, 100.0)],
    "boundary.buffers": [{"boundary": {"buffers": on}} for on in (False, True)],
    "boundary.attention": [{"boundary": {"attention": on}} for on in (False, True)],
    "mapping.lm_head": [{"mapping": {"lm_head": on}} for on in (False, True)],
}


@pytest.mark.parametrize("knob", SLOWER)
def test_a_knob_turned_this_way_costs_time(knob):
    targets = LoraSettings().targets
    for phase in Phase:
        chips = [{"die": ONE_DIE, **chip} for chip in SLOWER[knob]]  # what takes more area passes more links besides
        times = [_latency(rank=4, targets=targets, phase=phase, **chip).us_per_token for chip in chips]
        assert all(later > earlier for earlier, later in pairwise(times)), (phase, times)


def test_the_rank_takes_no_time():
    """The macros that hold A and B take all of their weights at once; a higher rank is paid by area and energy."""
    four, sixteen = (_latency(rank=rank, targets=("q_proj",), die=ONE_DIE) for rank in (4, 16))
    assert four.components_us == sixteen.components_us


# Published designs.


def test_isaacs_published_pipeline():
    """A layer takes 22 cycles of 100 ns with inputs of 16 bits: 2.2 us. Sign and magnitude has 15 pulses for its 16."""
    chip = {"dac": {"input_bits": 16}, "coding": {"slices": 8}, "boundary": BARE | {"buffers": True}}
    found = _latency(_single(128, 128), preset="isaac", **chip)
    assert found.path_us == pytest.approx(22 * 0.1, rel=0.25)
    assert found.interval_us == pytest.approx(16 * 0.1, rel=0.25)
    print(f"ISAAC: published 2.2 us, here {found.path_us:.3f}")


@pytest.mark.parametrize(("phases", "published_tops"), [(1, 63.1), (4, 16.1)])
def test_hermes_published_throughput(phases, published_tops):
    """64 cores of 256 x 256 at 8 bits in and out, in one or four phases; 256 converters to a core, which count while
    the pulse is on, so that they add no time after it. A pulse of up to 127 ns, that is 1 ns to a step at the core's
    1 GHz, is assumed."""
    chip = {
        "tile": {"rows": 256, "columns": 256, "adc_share": 1},
        "cells": {"read_time_ns": 127.0},
        "read": {"averaged": phases},
        "adc": {"costs": "linear"},
        "costs": {"adc_linear_ns_per_bit": 0.0},
        "boundary": BARE,
    }
    product_s = _latency(_single(256, 256), **chip).interval_us * 1e-6
    tops = 64 * 2 * 256**2 / product_s * 1e-12
    print(f"HERMES: published {published_tops} TOPS, here {tops:.1f}")
    assert tops == pytest.approx(published_tops, rel=0.25)


@pytest.mark.parametrize(
    ("d_in", "d_out", "their_nj", "their_us", "turns"),
    [
        (128, 32, 4.7412304555528816, 0.8, 1),
        (128, 128, 9.482461005654845, 0.8, 1),
        (1024, 128, 63.21640455553279, 3.2, 4),
    ],
)
def test_accelforges_isaac_converts_as_often_as_dear_and_as_fast(d_in, d_out, their_nj, their_us, turns):
    """Its converters' energy is that of conversions and of the leakage of all eight of a tile, for as long as it takes.

    Its inputs have an offset, so eight bits are driven; nine bits of sign and magnitude are as many here.
    """
    leakage_nj = (4 * 4.7412304555528816 - 9.482461005654845) / 3 * turns  # of eight converters over 0.8 us a turn
    conversions = d_in // 128 * d_out * 4 * 8  # row tiles, outputs, slices, cycles
    per_conversion_pj = (their_nj - leakage_nj) / conversions * 1e3
    busy_pj = per_conversion_pj + leakage_nj / turns / 8 / (1.28 * 800) * 1e3  # each converts 1,024 times in 0.8 us
    chip = {
        "dac": {"input_bits": 9},
        "adc": {"costs": "survey"},
        "costs": {"adc_survey_rate_msps": 1280},
        "boundary": BARE,
    }
    found = _priced(_single(d_in, d_out), preset="isaac", **chip)
    assert found.components_uj["adc"] * 1e6 / conversions == pytest.approx(busy_pj, rel=1e-3)
    assert found.latency.interval_us == pytest.approx(their_us / turns, rel=1e-3)
