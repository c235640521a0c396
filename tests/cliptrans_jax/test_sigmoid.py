"""The sigmoid loss, against numbers worked out by hand, on one device and on eight, and in a
run."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import split_mesh
from tiny_cliptrans import tiny_config

from cliptrans_jax.contrastive.sigmoid import SIGMOID, sigmoid_loss
from cliptrans_jax.runs import contrastive
from common_jax.mesh import BATCH, MeshConfig, make_mesh, match_rules

TEXTS, IMAGES = np.array([[2.0, 0.0], [0.0, 0.5]]), np.array([[1.0, 0.0], [3.0, 4.0]])
COSINES = np.array([[1.0, 0.6], [0.0, 0.8]])  # whatever the vectors' lengths
SCALE, BIAS = 3.0, -1.0
LOGITS = np.array([[2.0, 0.8], [-1.0, 1.4]])  # 3 cosines - 1
SIGNS = np.array([[1, -1], [-1, 1]])


def loss(texts, images, log_scale, bias):
    return sigmoid_loss(texts, images, log_scale=log_scale, bias=bias)


def arguments():
    return tuple(jnp.asarray(x, jnp.float32) for x in (TEXTS, IMAGES, math.log(SCALE), BIAS))


def test_sigmoid_loss_by_hand():
    """Two pairs and two mismatches: softplus of -2, 0.8, -1 and -1.4, divided by two texts."""
    wanted = sum(math.log(1 + math.exp(x)) for x in (-2.0, 0.8, -1.0, -1.4)) / 2
    assert float(loss(*arguments())) == pytest.approx(wanted, rel=1e-5)


def test_sigmoid_loss_gradient_by_hand():
    """For a logit, -z sigmoid(-z logit) / B; for the bias, the sum of that; for the logarithm of
    the scale, the sum of that times scale times cosine."""
    by_logit = -SIGNS / (1 + np.exp(SIGNS * LOGITS)) / 2
    by_scale, by_bias = jax.grad(loss, (2, 3))(*arguments())
    assert float(by_bias) == pytest.approx(by_logit.sum(), rel=1e-5)
    assert float(by_scale) == pytest.approx((by_logit * SCALE * COSINES).sum(), rel=1e-5)
    # A feature's length has no effect, so its gradient is at a right angle to it.
    by_texts = np.asarray(jax.grad(loss)(*arguments()))
    np.testing.assert_allclose((by_texts * TEXTS).sum(axis=1), 0, atol=1e-6)
    units = IMAGES / np.linalg.norm(IMAGES, axis=1, keepdims=True)
    wanted = SCALE * by_logit[0] @ units[:, 1] / 2  # perpendicular to text 0, which has length 2
    assert float(by_texts[0, 1]) == pytest.approx(wanted, rel=1e-5)


def test_eight_devices_contrast_the_whole_batch():
    texts, images = np.random.default_rng(0).normal(size=(2, 16, 6)).astype(np.float32)
    case = (texts, images, jnp.float32(2.0), jnp.float32(-3.0))
    program = jax.value_and_grad(loss, (0, 1, 2, 3))
    mesh = split_mesh()
    split = [jax.device_put(x, jax.NamedSharding(mesh, BATCH)) for x in case[:2]]
    with jax.set_mesh(mesh):
        found = jax.jit(program)(*split, *case[2:])
    wanted = program(*map(jnp.asarray, case))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_scale_and_bias_are_learned_from_the_published_values():
    config = tiny_config("clip", None)
    config = dataclasses.replace(config, clip=dataclasses.replace(config.clip, loss="sigmoid"))
    params = jax.eval_shape(functools.partial(contrastive.init, config), jax.random.key(0))["clip"]
    assert set(params) == {"text", "image", "log_scale", "bias"}
    starts = SIGMOID.init(config.clip.scale)
    assert (float(starts["log_scale"]), float(starts["bias"])) == (pytest.approx(math.log(10)), -10)
    rules = contrastive.partition_rules(config)
    shardings = match_rules(rules, {"clip": params}, make_mesh(MeshConfig(fsdp=8)))["clip"]
    assert not any(shardings["log_scale"].spec) and not any(shardings["bias"].spec)


def test_step_computes_and_logs_the_sigmoid_loss(monkeypatch):
    monkeypatch.setattr(contrastive, "_embed", lambda *_: arguments()[:2])
    config = tiny_config("clip", None)
    config = dataclasses.replace(config, clip=dataclasses.replace(config.clip, loss="sigmoid"))
    params = {"clip": dict(zip(("log_scale", "bias"), arguments()[2:], strict=True))}
    found, metrics = contrastive._loss(config, params, {}, {}, {"dropout": None}, 0)
    assert float(found) == pytest.approx(float(loss(*arguments())), rel=1e-6)
    assert float(metrics["scale"]) == pytest.approx(SCALE, rel=1e-6)
    assert float(metrics["bias"]) == BIAS


def test_scale_of_the_softmax_loss_is_refused():
    clip = tiny_config("clip", None).clip
    with pytest.raises(
        ValueError, match=r"^scale=3\.0 has no effect with loss='sigmoid'.*leave it out"
    ):
        dataclasses.replace(clip, loss="sigmoid", scale=3.0)
