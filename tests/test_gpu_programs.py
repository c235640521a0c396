"""Plans for GPUs, without a GPU compiler: cards, topologies, and the text of a compiled program.

`gpu_program.txt` is `stepped` from test_gpu_plan.py, compiled by XLA for one H100, without metadata
and with only those parts of `backend_config` that are read.
"""

import dataclasses
import logging
import pathlib
import re

import jax
import pytest
from jax import numpy as jnp
from jax.experimental import pallas as pl

from common_jax.commands.plan import compile as plan
from common_jax.commands.plan import gpus
from common_jax.commands.plan.flops import ATTENTION, Flops, count_flops
from common_jax.commands.plan.gpus import CARDS, check_cuda, describe_cards, description
from common_jax.commands.plan.hlo import CUDA, read_program
from common_jax.commands.plan.launches import Launches, count_launches
from common_jax.commands.plan.products import Products, find_products
from common_jax.commands.plan.sizing import Memory, Sizing
from common_jax.commands.plan.topology import Topology, read_topology
from common_jax.commands.plan.traffic import hbm_bytes

STORED = pathlib.Path(__file__).parent / "gpu_program.txt"
TURNS = 8  # the loop handles 32 of 256 rows per iteration
LOOP = """
%body.1 (p: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %p = (s32[], f32[64,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %all = f32[64,16]{1,0} get-tuple-element(%p), index=1
  BODY
  ROOT %t = (s32[], f32[64,16]{1,0}) tuple(%i, %all)
}
%condition.1 (c: (s32[], f32[64,16])) -> pred[] {
  %c = (s32[], f32[64,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%n, %n), direction=LT
}
ENTRY %main (a: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %a = (s32[], f32[64,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[64,16]{1,0}) while(%a), condition=%condition.1, body=%body.1
}"""


def stored():
    return read_program(STORED.read_text(), on_chip=False)


# Cards and topologies.


@pytest.mark.parametrize("card", CARDS)
def test_card_figures_match_their_description(card):
    text = description(card)
    memory, bandwidth = (
        int(re.search(rf"{name}: (\d+)", text)[1])
        for name in ("device_memory_size", "memory_bandwidth")
    )
    chip = CARDS[card]
    assert (chip.hbm, chip.hbm_bandwidth) == (memory, bandwidth)
    assert card.upper() in text and chip.flops > chip.flops32 > chip.hbm_bandwidth > chip.links


@pytest.mark.parametrize(
    ("text", "slices", "topology", "devices"),
    [
        ("h100:2x8", 1, Topology("h100", (2, 8), 2), 16),
        ("h200", 1, Topology("h200", (1, 1), 1), 1),
        ("v5e:4x4", 2, Topology("v5e", (4, 4), 2), 32),
    ],
)
def test_topology_is_parsed_into_chips_and_groups(text, slices, topology, devices):
    read = read_topology(text, slices=slices)
    assert read == topology and read.devices == devices


@pytest.mark.parametrize(
    "topology", ["", "v5e", "v9:4x4", "v5e:4", "v5e:4x", "16x16", "h100:8", "h100:0x8", "h300:1x8"]
)
def test_topology_must_name_a_known_chip_or_card(topology):
    message = rf"--topology={topology} must be .* v5e:16x16 or v5p:8x8x8; or one of .* h100:1x8"
    with pytest.raises(ValueError, match=message):
        read_topology(topology)


def test_missing_gpu_compiler_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jax\[cuda12\]==0\.10\.2' \(5\.5 GB\), .*'gpu-plan'"):
        describe_cards("h100", hosts=1, cards=8)


def test_other_compiler_version_causes_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    for installed in (CUDA, "9.9.9"):
        monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name, x=installed: x)
        with caplog.at_level(logging.WARNING):
            check_cuda()
        said = f"jax-cuda12-plugin {installed} is installed, and the analysis of compiled programs"
        assert (said in caplog.text) == (installed != CUDA)


# A compiled program.


def test_products_are_counted_by_implementation():
    product, scores = 2 * 32 * 64 * 64, 2 * 2 * 8 * 64 * 64 * 64
    assert find_products(stored()) == Products(
        calls={"cuBLAS": TURNS, "cuDNN attention": 2, "kernel": 1},
        flops={"bf16": TURNS * product + (2 + 5) * scores},
    )


def test_open_loop_runs_as_often_as_it_can_take_slices():
    program = stored()
    assert program.open_loops == {TURNS: 1}
    for body, turns in (
        ("%s = f32[4,16]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={4,16}", 16),
        ("%s = f32[64,16]{1,0} add(%all, %all)", None),
    ):
        assert read_program(LOOP.replace("BODY", body)).open_loops == {turns: 1}


def test_launches_include_loops_and_exclude_aliases():
    # Per iteration: a slice, a product, its write to the table, the counter, and the condition.
    # Outside: the counter's start and end, the doubled rows, ones and zeros, attention forward and
    # backward, the sum of its gradients, and the scatter.
    assert count_launches(stored()) == Launches(kernels=5 * TURNS + 9, waits=TURNS)
    once = LOOP.replace("BODY", "%s = f32[64,16]{1,0} add(%all, %all)")
    assert count_launches(read_program(once)) == Launches(kernels=2, waits=1)
    # With a known trip count, the host counts the iterations itself, without the condition.
    known = once.removesuffix("\n}") + ', backend_config={"known_trip_count":{"n":"3"}}\n}'
    assert count_launches(read_program(known)) == Launches(kernels=3, waits=0)


def test_in_place_slices_and_scatters_count_the_bytes_they_move():
    q, rows, kernel = 2 * 64 * 8 * 64 * 2, 256 * 64, 64 * 64 * 2
    statistics = 2 * 8 * 64 * 4
    # Attention reads three arrays and writes one. Its backward pass reads five and writes three,
    # whose sum is one. It starts from ones.
    attention = (4 + 8 + 4 + 1) * q + 2 * statistics
    # An iteration reads and writes 32 rows three times: in the slice, the product and the table.
    turn = 3 * 2 * (32 * 64 * 2) + kernel
    numbers = TURNS * (2 * 4 + 8 + 9) + 16  # positions, counter, condition
    zeros = 1000 * 64 * 4
    # 256 rows are added to as many of 1,000, which are read and written.
    scatter = rows * 2 + 256 * 4 + 2 * rows * 4
    doubled = 2 * rows * 2
    expected = attention + TURNS * turn + numbers + zeros + scatter + doubled
    assert hbm_bytes(stored()) == expected


def test_gpu_memory_spaces_are_all_in_hbm():
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0:S(1)} parameter(0)\n}"
    for on_chip in (True, False):
        program = read_program(text, on_chip=on_chip)
        assert program.computations["main"]["p"].result[0].space == on_chip


def test_kernel_flops_come_from_its_estimate_or_its_body_times_the_grid():
    def multiply(x, y, out):
        out[...] = x[...] @ y[...]

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    y = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    for said, flops in ((pl.CostEstimate(flops=7, bytes_accessed=1, transcendentals=0), 7),
                        (None, 2 * 64 * 32 * 32)):  # fmt: skip
        kernel = pl.pallas_call(
            multiply,
            grid=(4,),
            in_specs=[pl.BlockSpec((16, 32), lambda i: (i, 0)), pl.BlockSpec((32, 32))],
            out_specs=pl.BlockSpec((16, 32), lambda i: (i, 0)),
            out_shape=x,
            cost_estimate=said,
        )
        assert count_flops(kernel, x, y) == Flops(flops)
    assert ATTENTION["dot_product_attention_bwd_wrapper"].executed == 5


def sizing(**changes):
    """A step on 4 H100s."""
    base = Sizing(
        chip=CARDS["h100"],
        devices=4,
        flops=Flops(model=int(4 * 989e12)),
        memory=Memory(arguments=5, temporaries=3, output=4, aliased=4, code=1),
        traffic=int(3352.32e9 / 2),
        collectives=(),
        open_loops={205: 24, None: 2},
        launches=Launches(kernels=75_000, waits=4_920),
        products=Products({"cuBLAS": 3}, {"f32": int(494e12), "bf16": 1}),
    )
    return dataclasses.replace(base, **changes)


def test_float32_products_take_longer_and_launches_take_time():
    seconds = sizing().seconds
    # Of 989e12 FLOP/s per card, the half that is in float32 takes twice as long.
    expected = {"compute": 495 / 989 + 1, "hbm": 0.5, "nvlink": 0, "launches": 0.15 + 0.0866}
    assert seconds == pytest.approx(expected, rel=1e-3)
    assert sizing(products=None).seconds["compute"] == pytest.approx(1)


def test_report_shows_launches_products_and_loop_counts():
    lines = "\n".join(plan.as_lines(sizing()))
    for said in (
        "HBM per card: 0.0 MB of 84.94 GB",
        "products per card: cuBLAS 3; FLOPs 1 on bf16, 4.94e+14 on f32",
        "launches: 75,000 per step; the host waits 4,920 times",
        "loops whose length depends on data: 24, counted with 205 iterations",
        "loops of unknown length, counted as run once: 2",
    ):
        assert said in lines, lines
    found = plan.as_json(sizing())
    assert found["unknown_loops"] == 2 and found["open_loops"] == [{"turns": 205, "loops": 24}]
    assert found["launches"] == {"kernels": 75_000, "waits": 4_920}
