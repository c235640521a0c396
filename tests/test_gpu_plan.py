"""Programs compiled for GPUs without having one, using JAX's CUDA wheels: make test-gpu-plan."""

import importlib.util
import json
import pathlib

import compile_for_pod
import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from common_jax.commands.plan.collectives import find_collectives
from common_jax.commands.plan.gpus import CARDS, OPTIONS, describe_cards
from common_jax.commands.plan.hlo import read_program
from common_jax.commands.plan.launches import count_launches
from common_jax.commands.plan.products import find_products
from common_jax.commands.plan.topology import describe_devices, read_topology
from common_jax.commands.plan.traffic import hbm_bytes
from common_jax.mesh import MeshConfig, make_mesh

pytestmark = [
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="JAX's wheels for CUDA are not installed (extra: gpu-plan)",
    ),
]
ROOT = pathlib.Path(__file__).parents[1]
STORED = ROOT / "tests" / "gpu_program.txt"


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile(OPTIONS).as_text()


def analysis(text: str) -> tuple:
    """All that is counted in a program for one GPU."""
    program = read_program(text, on_chip=False)
    counts = find_products(program), count_launches(program), program.open_loops
    return *counts, hbm_bytes(program), sorted(program.runs.values())


def double(x, out):
    triton.store(out, 2 * triton.load(x))


def stepped(q, x, table, kernel, ids):
    """Fused attention and its gradient, a kernel, a loop of unknown length, and a scatter."""

    def attend(q):
        return jnp.sum(jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    twice = pl.pallas_call(double, out_shape=shape, compiler_params=triton.CompilerParams())(x)

    def body(i, table):
        rows = lax.dynamic_slice_in_dim(twice, i * 32, 32) @ kernel
        return lax.dynamic_update_slice_in_dim(table, rows, i * 32, 0)

    table = lax.fori_loop(0, ids[0], body, table)
    zeros = jnp.zeros((1000, 64), jnp.float32)
    total = zeros.at[ids].add(x.astype(jnp.float32), mode="promise_in_bounds")
    return jax.grad(attend)(q), table, total


def test_xla_output_matches_the_stored_program():
    sharding = SingleDeviceSharding(describe_cards("h100", hosts=1, cards=1)[0])
    shapes = [(2, 64, 8, 64), (256, 64), (256, 64), (64, 64)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    ids = jax.ShapeDtypeStruct((256,), jnp.int32, sharding=sharding)
    text = compiled(stepped, *arrays, ids, donate_argnums=2)
    assert analysis(text) == analysis(STORED.read_text())


def test_collectives_are_counted_within_and_between_hosts():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4), describe_devices(read_topology("h100:2x8")))
    wide = NamedSharding(mesh, P("fsdp"))
    w = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16, sharding=wide)
    batch = NamedSharding(mesh, P(("data", "fsdp", "expert")))
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16, sharding=batch)
    text = compiled(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), w, x, out_shardings=wide)
    program = read_program(text, on_chip=False)
    found = {one.kind: one for one in find_collectives(program, devices=16, slices=2)}
    # The halves of w are gathered, and its gradient is summed and split, within a host; the sums
    # are then added across hosts.
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    for kind in ("all-gather", "reduce-scatter"):
        assert (found[kind].group, found[kind].crosses) == (2, False)
        assert found[kind].bytes == 2048 * 512 * 2 / 2
    assert (found["all-reduce"].group, found["all-reduce"].crosses) == (8, True)
    products = find_products(program)
    assert products.calls == {"cuBLAS": 2}
    assert products.flops == {"bf16": 2 * 2 * (4096 // 16) * 2048 * 512}


@pytest.mark.parametrize("card", CARDS)
def test_xla_compiles_for_every_card(card):
    sharding = SingleDeviceSharding(describe_cards(card, hosts=1, cards=1)[0])
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=sharding)
    text = compiled(lambda x: jax.nn.softmax(x @ x), x)
    assert find_products(read_program(text)).calls == {"cuBLAS": 1}


def test_step_is_planned_for_eight_cards(capsys, tmp_path):
    found = tmp_path / "found.json"
    with pytest.raises(SystemExit) as end:
        compile_for_pod.main(
            [
                "compile_for_pod.py",
                f"--config={ROOT}/configs/m2mkd/digits.py:phase=end_to_end",
                "--topology=h100:1x8",
                f"--json={found}",
            ]
        )
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "on 8 cards, 1 x h100:1x8" in printed, printed
    found = json.loads(found.read_text())
    assert found["fits"] and found["products"]["calls"]["cuBLAS"] > 0
    assert found["launches"]["kernels"] > 100 and found["roofline_seconds"]["nvlink"] > 0
    assert found["open_loops"]  # over the experts' blocks
