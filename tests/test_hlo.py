"""Parsing the text of a compiled program in full: a stored one, and the same one compiled here.

`tpu_program.txt` is `looped`, compiled by libtpu for a v5e:2x2, without `backend_config`.
"""

import ast
import importlib.util
import logging
import pathlib

import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax.commands.plan import chips
from common_jax.commands.plan.chips import check_libtpu, describe_chips
from common_jax.commands.plan.collectives import Collective, find_collectives
from common_jax.commands.plan.hlo import CUDA, LIBTPU, Program, read_program
from common_jax.commands.plan.traffic import hbm_bytes
from common_jax.mesh import MeshConfig, make_mesh

ROOT = pathlib.Path(__file__).parents[1]
STORED = ROOT / "tests" / "tpu_program.txt"
# One line per instruction: kind, bytes of each array of the result @ memory <- operands; ROOT marks
# the computation's result.
PARSED = """\
fused_computation.3.clone.1:
param_0.11: parameter 524288@0
param_1.8: parameter 4@0
constant.18: constant 4@0
dynamic-slice.3: ROOT dynamic-slice 262144@1 <- param_0.11 param_1.8 constant.18 constant.18
bitcast_fusion.clone.1:
bitcast_input.2: parameter 262144@1
bitcast.9: ROOT bitcast 262144@0 <- bitcast_input.2
fused_computation.1.clone.clone.clone.1:
param_0.12: parameter 524288@1
bitcast.8: ROOT bitcast 524288@0 <- param_0.12
fused_computation.2.clone.1:
param_0.13: parameter 262144@1
fusion.10: fusion 262144@0 <- param_0.13 calls bitcast_fusion.clone.1
param_1.9: parameter 524288@1
fusion.9: fusion 524288@0 <- param_1.9 calls fused_computation.1.clone.clone.clone.1
convolution.5: convolution 262144@0 <- fusion.10 fusion.9
convert.1: convert 524288@0 <- convolution.5
tanh.6: tanh 524288@0 <- convert.1
convert.2: ROOT convert 262144@1 <- tanh.6
wide.region_0.1_spmd.sunk:
constant.3.clone.1..sunk: constant 4@0
wide.param.2: parameter 4@0 262144@1 524288@0 4@0
get-tuple-element.46: get-tuple-element 4@0 <- wide.param.2
get-tuple-element.52: get-tuple-element 524288@0 <- wide.param.2
constant_dynamic-slice_fusion.2: fusion 262144@1 <- get-tuple-element.52 get-tuple-element.46 \
calls fused_computation.3.clone.1
add.4: add 4@0 <- get-tuple-element.46 constant.3.clone.1..sunk
get-tuple-element.47: get-tuple-element 262144@1 <- wide.param.2
copy.11: copy 262144@1 <- get-tuple-element.47
all-gather.9: all-gather 524288@1 <- constant_dynamic-slice_fusion.2
fusion.11: fusion 262144@1 <- copy.11 all-gather.9 calls fused_computation.2.clone.1
get-tuple-element.53: get-tuple-element 4@0 <- wide.param.2
tuple.14: ROOT tuple 4@0 262144@1 524288@0 4@0 <- add.4 fusion.11 get-tuple-element.52 \
get-tuple-element.53
wide.region_1.2_spmd:
constant.6.clone.1: constant 4@0
wide.param.1: parameter 4@0 262144@1 524288@0 4@0
get-tuple-element.26: get-tuple-element 4@0 <- wide.param.1
lt.3: ROOT compare 1@0 <- get-tuple-element.26 constant.6.clone.1
region_2.3:
reduce_sum.8: parameter 2@0
reduce_sum.6: parameter 2@0
reduce_sum.9: ROOT add 2@0 <- reduce_sum.6 reduce_sum.8
region_2.3.clone:
reduce_sum.12: parameter 2@0
reduce_sum.11: parameter 2@0
reduce_sum.13: ROOT add 2@0 <- reduce_sum.11 reduce_sum.12
main.4_spmd:
constant.10.clone: constant 4@0
constant.3.clone.1: constant 4@0
constant.11.clone: constant 2@0
param.3: parameter 524288@0
param.2: parameter 262144@0
copy-start: copy-start 262144@1 262144@0 4@2 <- param.2
copy.9: copy 4@0 <- constant.10.clone
copy-done: copy-done 262144@1 <- copy-start
tuple.15: tuple 4@0 262144@1 524288@0 4@0 <- copy.9 copy-done param.3 constant.3.clone.1
while.9: while 4@0 262144@1 524288@0 4@0 <- tuple.15 condition wide.region_1.2_spmd \
body wide.region_0.1_spmd.sunk
get-tuple-element.16: get-tuple-element 262144@1 <- while.9
reduce.1: reduce 2@0 <- get-tuple-element.16 constant.11.clone to_apply region_2.3
all-reduce: ROOT all-reduce 2@0 <- reduce.1 to_apply region_2.3.clone
"""


def written(program: Program) -> str:
    """The program in the format of PARSED."""
    lines = []
    for name, computation in program.computations.items():
        lines.append(f"{name}:")
        for one in computation.values():
            words = [f"{one.name}:", *(["ROOT"] if one.root else []), one.kind]
            words += [f"{array.bytes}@{array.space}" for array in one.result]
            words += ["<-", *one.operands] if one.operands else []
            for attribute, names in one.called.items():
                words += [attribute, *names]
            lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def looped(kernels, x):
    """A loop over two layers, and a sum."""
    y, _ = lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)
    return jnp.sum(y)


def analysis(program: Program) -> tuple:
    """All that is counted in a program."""
    collectives = find_collectives(program, devices=4)
    return collectives, hbm_bytes(program), program.open_loops, sorted(program.runs.values())


def test_stored_program_is_parsed_completely():
    program = read_program(STORED.read_text())
    assert written(program) == PARSED
    assert program.entry == "main.4_spmd"
    # The body gathers a kernel, half of 512 x 512 two-byte numbers, for each of two layers.
    gathered, summed = 2 * 512 * 512 * 2 / 2, 2 * 2 * 3 / 4
    # It reads x once, and its half of a kernel per layer; the rest are scalars.
    read = 3 * 256 * 512 * 2 + 66
    assert analysis(program) == (
        [
            Collective("all-gather", 2, False, 2, gathered),
            Collective("all-reduce", 4, False, 1, summed),
        ],
        read,
        {},
        [1, 1, 1, 2, 2, 2, 2, 2, 2],
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: pods)"
)
def test_libtpu_output_matches_the_stored_program():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), describe_chips("v5e:2x2", slices=1))
    split, batch = (NamedSharding(mesh, P(*axes)) for axes in ((None, "fsdp"), (mesh.axis_names,)))
    kernels = jax.ShapeDtypeStruct((2, 512, 512), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=batch)
    program = read_program(jax.jit(looped).lower(kernels, x).compile().as_text())
    assert analysis(program) == analysis(read_program(STORED.read_text()))
    assert written(program) == PARSED


def test_other_libtpu_version_causes_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: True)
    for installed in (LIBTPU, "9.9.9"):
        monkeypatch.setattr(chips.importlib.metadata, "version", lambda name, x=installed: x)
        with caplog.at_level(logging.WARNING):
            check_libtpu()
        said = f"libtpu {installed} is installed, and the analysis of compiled programs was writ"
        assert (said in caplog.text) == (installed != LIBTPU)


def test_extras_pin_the_compilers_whose_output_is_parsed():
    text = (ROOT / "setup.py").read_text()
    wanted = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and str(node.value).startswith(("libtpu", "jax[cuda"))
    ]
    assert wanted == [f"libtpu=={LIBTPU}", f"jax[cuda12]=={CUDA}"]
