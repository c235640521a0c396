"""Networks that recompute activations, or run their layers as one loop: the same parameters, losses
and gradients, up to float64 rounding."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
import tiny_cliptrans
from flax import traverse_util
from jax import numpy as jnp
from tiny import MOE, NAC, SIZES, fill

from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from common_jax.commands.plan.flops import count_flops
from m2mkd_jax.models import encoder, vit, vmoe
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.nac import model as nac

INTERFACE = Interface(image_size=8, channels=3, labels=5)
MBART = dataclasses.replace(tiny_cliptrans.MBART, encoder_layers=2, decoder_layers=2)


def _vit(rate, **switches):
    config = vit.ViTConfig(depths=(1, 2), **SIZES, **switches)
    return vit.build(config, INTERFACE, dtype=jnp.float64, drop_path=rate)


def _vmoe(rate, depths=(2,), **switches):
    config = vmoe.VMoEConfig(depths=depths, moe=MOE, **SIZES, **switches)
    return vmoe.build(config, INTERFACE, stitch_width=None, dtype=jnp.float64, drop_path=rate)


def _nac(rate, **switches):
    config = dataclasses.replace(NAC, **switches)
    return nac.build(config, INTERFACE, dtype=jnp.float64, drop_path=rate)


def _logits_of_images(network, params, rngs):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)))
    return network.apply(params, images, train=True, rngs=rngs)[0]


def _mbart(rate, **switches):
    config = dataclasses.replace(MBART, dropout=rate, **switches)
    config = ModelConfig(config, MapperConfig("mlp", prefix=4, features=8))
    return Translator(config, jnp.float64)


def _logits_of_tokens(model, params, rngs):
    features = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)))
    source, labels = jnp.asarray([[30, 5, 6, 7, 2]] * 4), jnp.asarray([[31, 11, 12, 13, 14, 2]] * 4)
    return model.train_logits(params, features, source, labels, dropout=rngs["dropout"])


MODELS = {
    "vit": (_vit, _logits_of_images),
    "vmoe": (_vmoe, _logits_of_images),
    "nac": (_nac, _logits_of_images),
    "mbart": (_mbart, _logits_of_tokens),
}
STREAMS = ("dropout", "drop_path", "code", "kernel", "state", "pooling", "gate")
LOOPED = ("vit", "vmoe", "mbart")


def compare(name, rate, *variants):
    """Requires the same loss and gradients with and without each variant's switches; returns what
    is counted in the plain model and in each variant."""
    build, logits = MODELS[name]
    with jax.enable_x64(True):
        rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
        models = [build(rate), *(build(rate, **switches) for switches in variants)]
        shapes, *others = map(_shapes, models)
        assert all(other == shapes for other in others)
        params = fill(models[0].init)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        results, counts = [], []
        for model in models:
            loss = lambda params, model=model: jnp.mean(logits(model, params, rngs) ** 2)  # noqa: E731
            gradient = jax.value_and_grad(loss)
            results.append(jax.jit(gradient)(params))
            counts.append(count_flops(gradient, params))
    plain, *others = (traverse_util.flatten_dict({"": x[0], **x[1]}) for x in results)
    assert plain[("",)].dtype == np.float64
    for path, one in plain.items():
        scale = float(np.abs(one).max())
        for other in others:
            np.testing.assert_allclose(
                other[path], one, rtol=1e-12, atol=1e-12 * scale, err_msg=path
            )
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_remat_changes_neither_loss_nor_gradient(name):
    kept, again = compare(name, 0.1, {"remat": True})
    assert kept.again == 0 < again.again
    assert kept.model == again.model


@pytest.mark.parametrize("name", LOOPED)
def test_scan_layers_changes_neither_loss_nor_gradient(name):
    loop = {"scan_layers": True}
    one_by_one, kept, again = compare(name, 0.0, loop, loop | {"remat": True})
    assert one_by_one.again == kept.again == 0 < again.again
    assert one_by_one.model == kept.model == again.model


def test_scanned_blocks_have_their_own_drop_path_rates(monkeypatch):
    # A branch is dropped if its rate is above one half, regardless of the draw.
    monkeypatch.setattr(
        encoder, "drop_path", lambda x, u, rate, drop=encoder.drop_path: drop(x, 0 * u + 0.5, rate)
    )
    compare("vit", 0.9, {"scan_layers": True})


def test_scanned_layers_draw_independently():
    config = vit.ViTConfig(depths=(4,), scan_layers=True, **SIZES)
    stage = vit.build(config, INTERFACE).stages[0]
    blocks = tuple(dataclasses.replace(block, drop_path=0.5) for block in stage.blocks)
    stage = stage.clone(blocks=blocks)
    images = jax.random.normal(jax.random.key(2), (32, 8, 8, 3))
    params = fill(partial(stage.init, train=False), images)
    rngs = {"drop_path": jax.random.key(1)}
    run = jax.jit(partial(stage.apply, train=True, rngs=rngs, mutable=["intermediates"]))
    _, kept = run(params, images)
    states = np.stack([*kept["intermediates"]["embedded"], *kept["intermediates"]["block"]])
    passed = np.abs(np.diff(states, axis=0)).max((2, 3)) == 0  # both branches dropped: a quarter
    assert passed.shape == (4, 32)
    assert 0 < passed.sum() < passed.size
    assert len({row.tobytes() for row in passed}) == 4


def test_gate_noise_is_drawn_per_layer():
    moe = MoeConfig(experts=3, router="softmax_topk", noise_std=1.5)
    config = vmoe.VMoEConfig(depths=(1, 2), moe=moe, scan_layers=True, **SIZES)
    network = vmoe.build(config, INTERFACE, stitch_width=None)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), _shapes(network))
    images, draws = jnp.zeros((8, 8, 8, 3)), []
    run = jax.jit(partial(network.apply, train=True, record=("routing",)))
    for seed in (0, 1):
        _, records = run(params, images, rngs={"gate": jax.random.key(seed)})
        draws += [x for x in jax.tree.leaves(records) if x.shape[-1] == 3]  # the logits
    assert len(draws) == 6
    noise = np.stack(draws)  # parameters are 0, and so are the noiseless logits
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_allclose(noise.std(), 0.5, rtol=0.1)


def test_scanned_layers_sow_the_same_records():
    found = []
    for loop in (False, True):
        network = _vmoe(0.0, depths=(1, 2), scan_layers=loop)
        with jax.enable_x64(True):
            images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)))
            params = fill(network.init)
            run = partial(network.apply, record=("moe", "routing", "intermediates"))
            _, records = jax.jit(run)(params, images)
        found.append(traverse_util.flatten_dict(records))
    plain, looped = found
    assert plain.keys() == looped.keys() and len(plain) > 20
    for path, one in plain.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6), one, looped[path])


def test_scanned_program_size_does_not_depend_on_depth():
    def size(depth):
        network = vit.build(vit.ViTConfig(depths=(depth,), scan_layers=True, **SIZES), INTERFACE)
        params = jax.eval_shape(network.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
        text = jax.jit(lambda *x: network.apply(*x)[0]).lower(params, images).as_text()
        return text.count("dot_general")

    assert size(8) == size(2)


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))
