"""Soft MoE against numbers worked out by hand and a plain loop; alone, in networks, and in runs."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import split_mesh
from same import assert_close
from scipy.special import erf, softmax
from tiny import OPTIM, SIZES, fill, tiny_config

import m2mkd_jax
from common_jax import checkpoint
from common_jax.config import freeze
from common_jax.mesh import AXES
from common_jax.metrics import read_metrics
from m2mkd_jax.hybrid import Pair, pair_logits
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.moe.config import BalanceConfig, MoeConfig, check_moe
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.moe.soft import unit
from m2mkd_jax.phases import end_to_end

B, T, D, F, E = 8, 5, 6, 7, 4
INTERFACE = Interface(8, 1, 10)
SOFT = MoeConfig(router="soft", experts=E, expert_init="fan_in")


def make(config=SOFT, dtype=jnp.float32):
    """The layer, parameters large enough to matter, and an input."""
    layer = MoeMlp(config, F, dtype)
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.standard_normal((B, T, D)), dtype)
    shapes = jax.eval_shape(layer.init, jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: np.float32(draw.standard_normal(leaf.shape)), shapes)
    params["router"]["scale"] = np.float32(3)
    return layer, params, x


@partial(jax.jit, static_argnums=0)
def run(layer, params, x):
    """y, what was recorded, and gradients of sum(sin(y)) with respect to params and x."""

    def total(params, x):
        y, wrote = layer.apply({"params": params}, x, train=True, mutable=["moe", "routing"])
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, wrote)

    gradients, (y, wrote) = jax.grad(total, (0, 1), has_aux=True)(params, x)
    return y, wrote, gradients


def plain(params, image):
    """One image, token by token, slot by slot, expert by expert, in float64."""
    phi = np.asarray(params["router"]["phi"], np.float64)
    x = np.asarray(image, np.float64)
    logits = np.zeros((len(x), *phi.shape[1:]))
    for t, e, c in np.ndindex(logits.shape):
        slot = phi[:, e, c]
        cosine = x[t] @ slot / np.linalg.norm(x[t]) / np.linalg.norm(slot)
        logits[t, e, c] = params["router"]["scale"] * cosine
    y = np.zeros_like(x)
    for e, c in np.ndindex(phi.shape[1:]):
        given = softmax(logits[:, e, c]) @ x
        hidden = given @ params["up"][e] + params["up_bias"][e]
        active = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        answer = active @ params["down"][e] + params["down_bias"][e]
        for t in range(len(x)):
            y[t] += softmax(logits[t].ravel()).reshape(logits[t].shape)[e, c] * answer
    return y


def test_two_tokens_by_hand():
    """Logits are log 2 times 3 and 4 for token 0, and log 2 times 0 and 5 for token 1. So dispatch
    weights are 8/9 and 1/9 for expert 0, 1/3 and 2/3 for expert 1; combine weights are 1/3 and 2/3
    for token 0, 1/33 and 32/33 for token 1."""
    layer = MoeMlp(dataclasses.replace(SOFT, experts=2, slots_per_expert=1), hidden=2)
    # If its input is at least 0.06, an expert's GELU is the identity: expert e returns e + 1 times
    # its input.
    eye = np.eye(2, dtype=np.float32)
    params = {
        "router": {
            "phi": np.float32([[[2], [0]], [[0], [5]]]),
            "scale": np.float32(5 * np.log(2)),
        },
        "up": np.stack([100 * eye, 100 * eye]),
        "down": np.stack([eye / 100, eye / 50]),
        "up_bias": np.zeros((2, 2), np.float32),
        "down_bias": np.zeros((2, 2), np.float32),
    }
    x = jnp.asarray([[[3.0, 4.0], [0.0, 2.0]]])
    params = jax.tree.map(jnp.asarray, params)
    y, wrote = layer.apply({"params": params}, x, mutable=["moe", "routing"])
    dispatch = [[8 / 9, 1 / 3], [1 / 9, 2 / 3]]
    combine = [[1 / 3, 2 / 3], [1 / 33, 32 / 33]]
    np.testing.assert_allclose(wrote["routing"]["dispatch"][0, ..., 0], dispatch, rtol=1e-5)
    np.testing.assert_allclose(wrote["routing"]["combine"][0, ..., 0], combine, rtol=1e-5)
    first, second = np.array([24 / 9, 34 / 9]), 2 * np.array([1, 8 / 3])
    expected = [first / 3 + second * 2 / 3, first / 33 + second * 32 / 33]
    np.testing.assert_allclose(y[0], expected, rtol=1e-5)
    load = [(1 / 3 + 1 / 33) / 2, (2 / 3 + 32 / 33) / 2]
    np.testing.assert_allclose(wrote["moe"]["load"], load, rtol=1e-5)
    entropy = -np.mean(np.sum(np.multiply(combine, np.log(combine)), axis=1))
    np.testing.assert_allclose(wrote["moe"]["entropy"], entropy, rtol=1e-5)
    entropy = -np.mean(np.sum(np.multiply(dispatch, np.log(dispatch)), axis=0))
    np.testing.assert_allclose(wrote["moe"]["dispatch_entropy"], entropy, rtol=1e-5)
    assert wrote["moe"]["balance_loss"] == 0
    assert set(wrote["moe"]) == {"load", "entropy", "dispatch_entropy", "balance_loss"}


@pytest.mark.parametrize("slots", [None, 3])
def test_layer_matches_loop_over_tokens_slots_and_experts(slots):
    layer, params, x = make(dataclasses.replace(SOFT, slots_per_expert=slots))
    # Five tokens and four experts: two slots each is the minimum with room for all.
    assert params["router"]["phi"].shape == (D, E, slots or 2)
    y, _, _ = run(layer, params, x)
    expected = np.stack([plain(params, image) for image in x])
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_images_of_a_batch_do_not_mix():
    layer, params, x = make()
    others = x.at[1:].set(np.random.default_rng(5).standard_normal((B - 1, T, D)))
    y, beside = run(layer, params, x)[0], run(layer, params, others)[0]
    np.testing.assert_array_equal(y[0], beside[0])
    assert not np.any(np.all(np.isclose(y[1:], beside[1:]), axis=(1, 2)))


def test_unit_of_zero_vector_is_zero_with_zero_gradient():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(x, -1), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(unit(x, -1)[:, 0]))(x)
    # (1 - 0.6^2) / 5 and -0.6 0.8 / 5
    np.testing.assert_allclose(slope, [[0.128, -0.096], [0, 0]], rtol=1e-5)


def test_gradients_are_finite_and_reach_all_parameters():
    layer, params, x = make()
    x = x.at[0, 0].set(0)  # has no direction
    _, _, gradients = run(layer, params, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
    for name in ("up", "up_bias", "down", "down_bias"):
        assert np.all(np.any(gradients[0][name], axis=-1)), name  # every expert gets a gradient
    router = gradients[0]["router"]
    assert np.all(np.any(router["phi"], axis=0)) and router["scale"] != 0


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4), (8, 1, 1)], ids=str)
def test_layer_on_mesh_matches_one_device(shape):
    layer, params, x = make()
    expected = run(layer, params, x)
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        jax.eval_shape(layer.init, jax.random.key(0), x[:1])
        got = run(layer, params, x)
    assert_close(got, expected, 2e-5)


def test_experts_on_other_devices_are_reached_by_all_to_all():
    layer, params, x = make()
    mesh = jax.make_mesh((2, 1, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spec = jax.sharding.PartitionSpec
    place = partial(jax.sharding.NamedSharding, mesh)
    with jax.set_mesh(mesh):
        names = ("up", "up_bias", "down", "down_bias")
        split = {name: jax.device_put(params[name], place(spec("expert"))) for name in names}
        given = {**params, **split}, jax.device_put(x, place(spec(AXES)))
        text = jax.jit(lambda p, x: layer.apply({"params": p}, x)).lower(*given).compile().as_text()
    assert "all-to-all(" in text
    assert "all-gather(" not in text


def test_bfloat16_layer_computes_routing_weights_in_float32():
    layer, params, x = make()
    exact = run(layer, params, x)
    y, wrote, gradients = run(MoeMlp(SOFT, F, jnp.bfloat16), params, x)
    assert y.dtype == jnp.bfloat16
    assert wrote["routing"]["dispatch"].dtype == wrote["routing"]["combine"].dtype == jnp.float32
    assert_close(wrote["routing"], exact[1]["routing"], 1e-6)
    for got, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact[2]), strict=True):
        assert np.linalg.norm(got - true) < 0.03 * np.linalg.norm(true)


def test_gate_is_exact_for_bfloat16_tokens():
    layer, params, x = make(dtype=jnp.bfloat16)
    (y, wrote, _), (_, wide, _) = run(layer, params, x), run(layer, params, x.astype(jnp.float32))
    assert wrote["moe"]["balance_loss"].dtype == jnp.float32
    assert_close(wrote["routing"], wide["routing"], 1e-6)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots_per_expert": 0}, r"\.slots_per_expert=0 must be at least 1, or None$"),
        (
            {"router": "topk_softmax", "slots_per_expert": 2},
            r"\.slots_per_expert=2 must be None with router='topk_softmax', .* such as 'soft'$",
        ),
        ({"dispatch": "capacity"}, r"\.dispatch='capacity' must be 'dropless' with router='soft'"),
        ({"chosen": 1}, r"\.chosen=1 must be 2 with router='soft', which does not read it"),
        ({"groups": 8}, r"\.groups=8 must be 1 with router='soft'"),
        (
            {"balance": BalanceConfig(z=0.5)},
            r"\.balance\.z=0\.5 must be 0 with router='soft', which has only none",
        ),
    ],
)
def test_fields_of_other_routers_are_refused(fields, message):
    with pytest.raises(ValueError, match=r"^config\.model\.moe" + message):
        freeze(MoeConfig, {"router": "soft", **fields}, "config.model.moe")


def test_sizes_that_do_not_fit_the_mesh_are_refused():
    with pytest.raises(ValueError, match=r"experts=4 must be a multiple of .* axis, 8"):
        check_moe(SOFT, {"expert": 8}, 8)
    with pytest.raises(ValueError, match=r"a batch of 12 examples must be a multiple of .* 8"):
        check_moe(SOFT, {"data": 2, "expert": 4}, 12)
    assert check_moe(dataclasses.replace(SOFT, experts=1), {}, 5) is None


def build(**switches):
    config = vmoe.VMoEConfig(depths=(1, 2), moe=SOFT, **SIZES, **switches)
    return vmoe.build(config, INTERFACE, stitch_width=None)


@pytest.mark.parametrize("switch", ["remat", "scan_layers"])
def test_remat_and_scan_change_nothing(switch):
    params = fill(build().init)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), jnp.float32)
    found = []
    for network in (build(), build(**{switch: True})):

        def total(params, network=network):
            logits, recorded = network.apply(params, images, train=True)
            return jnp.sum(jnp.sin(logits)), recorded

        found.append(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
    assert_close(found[1], found[0], 1e-4)


def test_students_learn_inside_the_meta_model():
    sizes = {"depths": (1, 1, 1), **SIZES}
    dense = vit.build(vit.ViTConfig(**sizes), INTERFACE)
    students = vmoe.build_students(
        vmoe.VMoEConfig(moe=SOFT, **sizes), INTERFACE, meta_width=SIZES["width"]
    )
    pair = Pair(dense, dense, students)
    params = {"meta": fill(dense.init), "teacher": fill(dense.init), "student": fill(students.init)}
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 1)), jnp.float32)

    def total(student):
        _, logits, _ = pair_logits(
            pair, {**params, "student": student}, images, stages=(0, 1, 2), train=True
        )
        return sum(jnp.sum(jnp.sin(one)) for one in logits.values())

    slopes = jax.jit(jax.grad(total))(params["student"])
    for stage in ("stage_0", "stage_1", "stage_2"):
        router = slopes[stage]["block_0"]["moe"]["router"]
        assert np.all(np.isfinite(router["phi"])) and np.any(router["phi"])
        assert router["scale"] != 0


def test_run_on_eight_devices_logs_its_layers_and_loads(tmp_path):
    optim = dataclasses.replace(OPTIM, steps=4)
    config = tiny_config("end_to_end", moe=SOFT, optim=optim, stages=2)
    end_to_end.run(config, tmp_path, split_mesh())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    (line,) = (line for line in lines if line["step"] == 4 and "train/loss" in line)
    recorded = {key for key in line if key.startswith("train/moe/stage_1/block_0/")}
    assert {key.split("/")[-1] for key in recorded} == {"load", "entropy", "dispatch_entropy"}

    apply, params = m2mkd_jax.load_model(tmp_path)
    saved = checkpoint.load(tmp_path)["student"]
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    router = params["stage_1"]["block_0"]["moe"]["router"]
    assert router["phi"].shape == (16, E, 2) and router["scale"].shape == ()
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    logits = jax.jit(apply)(params, images)
    assert logits.shape == (2, 10) and np.std(logits) > 0
