"""What a plan says about a program without running it: chips, collectives, traffic, memory."""

import dataclasses
import functools
import importlib.util

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import one_device
from tiny import MOE, tiny_config

from common_jax.commands.plan import chips
from common_jax.commands.plan.chips import CHIPS, describe_chips
from common_jax.commands.plan.collectives import Collective, find_collectives
from common_jax.commands.plan.flops import Flops
from common_jax.commands.plan.hlo import Array, arrays, read_program
from common_jax.commands.plan.sizing import Memory, Sizing, largest_arguments, largest_kept
from common_jax.commands.plan.steps import kept_shapes
from common_jax.commands.plan.traffic import hbm_bytes
from common_jax.mesh import MeshConfig, count_slices, make_mesh
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.phases.pipeline import describe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: pods)"
)
FLOAT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


# Chips.


@pytest.mark.parametrize(
    ("kind", "flops", "gigabytes", "bandwidth", "ici"),
    [
        ("v4", 275, 34.36, 1200, 268),
        ("v5e", 197, 16, 819, 200),
        ("v5p", 459, 95, 2765, 600),
        ("v6e", 918, 32, 1638, 400),
    ],
)
def test_chips_have_their_published_figures(kind, flops, gigabytes, bandwidth, ici):
    chip = CHIPS[kind]
    assert chip.flops == flops * 1e12 and chip.hbm == pytest.approx(gigabytes * 1e9, rel=1e-4)
    assert (chip.hbm_bandwidth, chip.links) == (bandwidth * 1e9, ici * 1e9)


def test_missing_libtpu_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install libtpu==0\.0\.52, or .* extra 'pods'"):
        describe_chips("v5e:4x4", slices=1)


# Compiled programs.


def test_array_types_give_bytes_and_memory_space():
    text = "(f32[8,128]{1,0:T(8,128)S(1)}, bf16[3]{0}, pred[], /*index=5*/token[])"
    found = arrays(text)
    assert found[:2] == (Array("f32", (8, 128), 1), Array("bf16", (3,), 0))
    assert [array.bytes for array in found] == [4096, 6, 1, 0]


def compiled(function, *arguments, **options):
    return read_program(jax.jit(function, **options).lower(*arguments).compile().as_text())


def test_collectives_in_a_scan_count_once_per_iteration():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))

    def body(x, _):
        return jax.shard_map(
            lambda x: lax.psum(x, "data"), in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
        )(x), None

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    with jax.set_mesh(mesh):
        program = compiled(lambda x: lax.scan(body, x, length=3)[0], x)
        (found,) = find_collectives(program, devices=8)
        # A chip has 2 x 16 numbers; a ring of two sends 2 x 1/2 of them.
        assert (found.kind, found.group, found.count) == ("all-reduce", 2, 3)
        assert found.bytes == 3 * (2 * 16 * 4) and program.open_loops == {}
        gathered = compiled(lambda x: 2 * x, x, out_shardings=whole)
    (found,) = find_collectives(gathered, devices=8)
    assert (found.kind, found.group, found.bytes) == ("all-gather", 4, 8 * 16 * 4 * 3 / 4)


@pytest.mark.parametrize(
    ("attributes", "crosses"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", False),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", True),
        ("replica_groups=[2,4]<=[8]", False),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", True),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", False),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", True),
        ("replica_groups=mesh['b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'b'}", False),
        ("replica_groups={}", True),
    ],
)
def test_replica_groups_are_read_in_every_format(attributes, crosses):
    text = f"""ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {attributes}, to_apply=%add
}}"""
    (found,) = find_collectives(read_program(text), devices=8, slices=2)
    size = {"{{0,1": 4, "{{0,4": 2, "[2,4]": 4, "[4,2]": 2}.get(attributes[15:20])
    size = size or {"{'b'}": 4, "{'a'}": 2}.get(attributes[-5:], 8)
    assert (found.group, found.crosses) == (size, crosses)


def test_host_transfers_count_as_their_collective():
    lines = [
        f"  %s{i} = (f32[8,4]{{1,0}}, u32[], token[]) send(%p, %t), channel_id={i}, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="'
        f'{handler}",_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}'
        for i, (handler, kind) in enumerate(
            [("xla_megascale_runtime", kind) for kind in ("ALL_REDUCE", "ALL_REDUCE", "ONE_TO_ONE")]
            + [("of_another", "ALL_REDUCE")]
        )
    ]
    text = "\n".join(["ENTRY %main (p: f32[8,4]) -> f32[8,4] {", *lines, "}"])
    reduced, permuted = find_collectives(read_program(text), devices=8, slices=2)
    assert reduced == Collective("all-reduce", 2, True, 2, 2 * 8 * 4 * 4)
    assert permuted == Collective("collective-permute", 2, True, 1, 8 * 4 * 4)


def test_unknown_replica_group_format_is_refused():
    text = (
        "ENTRY %main () -> f32[] {\n  ROOT %r = f32[] all-reduce(%p), replica_groups=new{1}, x=1\n}"
    )
    with pytest.raises(ValueError, match="unknown format: replica_groups=new"):
        find_collectives(read_program(text), devices=8)


def test_async_collectives_and_fused_scatters_count_once():
    text = """%start.1 (a: f32[4,8]) -> (f32[4,8], f32[16,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %g.1 = f32[16,8]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], chain_id="0"
  ROOT %s = (f32[4,8], f32[16,8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}
%step.1 (b: f32[4,8], c: f32[16,8], d: f32[8]) -> (f32[8], f32[4,8], f32[16,8]) {
  %b = f32[4,8]{1,0} parameter(0)
  %c = f32[16,8]{1,0} parameter(1)
  %d = f32[8]{0} parameter(2)
  %g.2 = f32[16,8]{1,0} all-gather(%b), replica_groups=[2,4]<=[8], chain_id="0"
  %twice = f32[8]{0} add(%d, %d)
  ROOT %t = (f32[8]{0}, f32[4,8]{1,0}, f32[16,8]{1,0}) tuple(%twice, %b, %g.2)
}
%all-reduce-scatter.1 (e: f32[8]) -> f32[2] {
  %e = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%e), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2}
}
ENTRY %main (p: f32[4,8], q: f32[8]) -> f32[2] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %one = (f32[4,8]{1,0}, f32[16,8]{1,0}) fusion(%p), kind=kCustom, calls=%start.1
  %x = f32[4,8]{1,0} get-tuple-element(%one), index=0
  %y = f32[16,8]{1,0} get-tuple-element(%one), index=1
  %two = (f32[8]{0}, f32[4,8]{1,0}, f32[16,8]{1,0}) fusion(%x, %y, %q), kind=kLoop, calls=%step.1
  %z = f32[8]{0} get-tuple-element(%two), index=0
  ROOT %last = f32[2]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}"""
    program = read_program(text)
    found = {one.kind: (one.count, one.bytes) for one in find_collectives(program, devices=8)}
    gathered, scattered = 16 * 8 * 4, 2 * 4
    assert found == {"all-gather": (1, gathered * 3 / 4), "reduce-scatter": (1, scattered * 3)}
    # The gather reads a part and writes the whole; besides, 8 numbers are read and written.
    assert hbm_bytes(program) == 4 * 8 * 4 + gathered + 2 * 32 + 32 + scattered


def test_traffic_counts_only_slices_and_nothing_on_the_chip():
    text = """%body.1 (q: (s32[], f32[64,16])) -> (s32[], f32[64,16]) {
  %q = (s32[], f32[64,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %all = f32[64,16]{1,0} get-tuple-element(%q), index=1
  %one = f32[1,16]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={1,16}
  ROOT %t = (s32[], f32[64,16]{1,0}) tuple(%i, %all)
}
%condition.1 (c: (s32[], f32[64,16])) -> pred[] {
  %c = (s32[], f32[64,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%n, %end), direction=LT
}
ENTRY %main (p: f32[64,16]) -> f32[64,16] {
  %p = f32[64,16]{1,0} parameter(0)
  %fast = (f32[64,16]{1,0:S(1)}, f32[64,16]{1,0}, u32[]) copy-start(%p)
  %here = f32[64,16]{1,0:S(1)} copy-done(%fast)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,16]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[64,16]{1,0}) while(%start), condition=%condition.1, body=%body.1
  ROOT %sum = f32[64,16]{1,0} add(%here, %p)
}"""
    program, size = read_program(text), 64 * 16 * 4
    assert program.runs["body.1"] == 10
    comparisons = 10 * (4 + 4 + 1)  # the loop's counter, its bound and the result
    assert hbm_bytes(program) - comparisons == size + 2 * size + 10 * (2 * 64 + 8)


def test_converted_lookups_read_only_their_rows():
    text = """%looked_up (p.0: f32[1000,16], p.1: s32[8,1]) -> bf16[8,16] {
  %p.0 = f32[1000,16]{1,0} parameter(0)
  %low = bf16[1000,16]{1,0} convert(%p.0)
  %p.1 = s32[8,1]{1,0} parameter(1)
  ROOT %rows = bf16[8,16]{1,0} gather(%low, %p.1), offset_dims={1}
}
ENTRY %main (table: f32[1000,16], ids: s32[8,1]) -> bf16[8,16] {
  %table = f32[1000,16]{1,0} parameter(0)
  %ids = s32[8,1]{1,0} parameter(1)
  ROOT %rows = bf16[8,16]{1,0} fusion(%table, %ids), kind=kLoop, calls=%looked_up
}"""
    assert hbm_bytes(read_program(text)) == 8 * 16 * 4 + 8 * 4 + 8 * 16 * 2


def test_roofline_is_the_longest_of_three_times():
    sizing = Sizing(
        chip=CHIPS["v5e"], devices=4, flops=Flops(model=int(4 * 197e12), again=int(197e12)),
        memory=Memory(arguments=5, temporaries=3, output=4, aliased=4, code=1),
        traffic=int(819e9 / 2), collectives=(), open_loops={},
    )  # fmt: skip
    assert sizing.seconds == pytest.approx({"compute": 1.25, "hbm": 0.5, "ici": 0})
    assert sizing.step_seconds == pytest.approx(1.25) and sizing.mfu == pytest.approx(0.8)
    assert sizing.memory.total == 9


def test_largest_arrays_are_listed_by_share():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = NamedSharding(mesh, P("fsdp"))
    leaf = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    tree = {"params": {"block_0": leaf, "block_1": leaf}, "step": leaf.update(shape=(4,))}
    first, second = largest_arguments(tree)
    assert (first.name, first.shape, first.bytes) == ("params/block_*", "float32[2,16]", 256)
    assert second.name == "step"
    task = describe(tiny_config("pretrain_meta"), one_device()).task(steps_per_epoch=1)
    params = jax.eval_shape(task.init, jax.random.key(0))
    kept = largest_kept(kept_shapes(task), params, devices=8)
    assert any("64,5,32" in one.shape for one in kept) and kept[0].bytes >= kept[-1].bytes


def test_one_device_sends_nothing_and_experts_use_all_to_all():
    layer = MoeMlp(dataclasses.replace(MOE, dispatch="capacity", groups=8), hidden=32)
    x = jnp.zeros((16, 5, 16))
    variables = layer.init(jax.random.key(0), x)
    found = {}
    for mesh in (one_device(), make_mesh(MeshConfig(data=2, expert=4))):
        with jax.set_mesh(mesh):
            program = compiled(layer.apply, variables, x)
        found[mesh.size] = find_collectives(program, devices=mesh.size)
    assert found[1] == []
    exchange = [one for one in found[8] if one.kind == "all-to-all"]
    assert [(one.group, one.count) for one in exchange] == [(4, 2)]  # there and back
    # Two groups of 5 tokens per device; 4 experts, 2.5 slots (rounded up), 16 numbers of 4 bytes.
    slots = MOE.slots(10) * 4 * 1
    assert exchange[0].bytes == 2 * slots * 16 * 4 * 3 / 4


# TPU descriptions; one program is compiled for them.


@needs_libtpu
def test_slices_lie_along_the_data_axis():
    devices = describe_chips("v5e:2x2", slices=2)
    assert count_slices(devices) == 2 and count_slices(jax.devices()) == 1
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert all(len(np.unique(part)) == 1 for part in slices)
    with pytest.raises(ValueError, match=r"config\.mesh\.data=1 must be a multiple of the 2 sl"):
        make_mesh(MeshConfig(fsdp=8), devices)
    with pytest.raises(ValueError, match=r"--topology=v5e:5x7 .* is unknown to libtpu"):
        describe_chips("v5e:5x7", slices=1)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices"), [("v5e:16x16", 1), ("v5e:16x16", 2), ("v6e:16x16", 1), ("v4:4x4x4", 1)]
)
def test_mesh_axis_may_be_part_of_a_torus_axis(topology, slices):
    devices = describe_chips(topology, slices=slices)
    mesh = make_mesh(MeshConfig(expert=8), devices)
    assert dict(mesh.shape) == {"data": len(devices) // 8, "fsdp": 1, "expert": 8}
    for experts in mesh.devices.reshape(-1, 8):
        assert len({getattr(device, "slice_index", 0) for device in experts}) == 1


@needs_libtpu
def test_fsdp_gathers_and_scatters_on_tpus():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), describe_chips("v5e:2x2", slices=1))
    wide = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    batch = NamedSharding(mesh, P(("data", "fsdp", "expert")))
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16, sharding=batch)

    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    program = compiled(jax.grad(loss), wide, x, out_shardings=wide.sharding)
    kinds = {one.kind for one in find_collectives(program, devices=4)}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert hbm_bytes(program) > 2 * 4096 * 512
