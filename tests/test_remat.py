"""Networks that compute again instead of keeping: the same parameters, losses and gradients, to
float64's rounding, and more operations."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from tiny import MOE, SIZES, fill, unoptimised

from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.mbart import MBartConfig
from common_jax.pods.flops import count_flops
from m2mkd_jax.models import vit, vmoe
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.nac import model as nac
from m2mkd_jax.models.nac.tokenizer import TokenizerConfig

INTERFACE = Interface(image_size=8, channels=3, labels=5)
NAC = nac.NacConfig(
    tokenizer=TokenizerConfig(preset="atto", width=16, stem=2, stages=1, grid_width=8),
    inputs=4,
    mediators=6,
    outputs=3,
    iterations=1,
    width=24,
    code_width=20,
    signature_width=12,
    heads=2,
    head_width=8,
)
MBART = MBartConfig(
    vocab=40,
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_hidden=24,
    decoder_hidden=24,
    positions=32,
)


def _vit(remat):
    return vit.build(
        vit.ViTConfig(depths=(1, 2), remat=remat, **SIZES),
        INTERFACE,
        dtype=jnp.float64,
        drop_path=0.1,
    )


def _vmoe(remat):
    config = vmoe.VMoEConfig(depths=(1, 2), moe=MOE, remat=remat, **SIZES)
    return vmoe.build(config, INTERFACE, stitch_width=None, dtype=jnp.float64, drop_path=0.1)


def _nac(remat):
    config = dataclasses.replace(NAC, remat=remat)
    return nac.build(config, INTERFACE, dtype=jnp.float64, drop_path=0.1)


def _logits_of_images(network, params, rngs):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)))
    return network.apply(params, images, train=True, rngs=rngs)[0]


def _mbart(remat):
    config = ModelConfig(
        dataclasses.replace(MBART, remat=remat), MapperConfig("mlp", prefix=4, features=8)
    )
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
STREAMS = ("dropout", "drop_path", "code", "kernel", "state", "pooling")


@pytest.mark.parametrize("name", MODELS)
def test_remat_changes_no_loss_and_no_gradient(name):
    build, logits = MODELS[name]
    with jax.enable_x64(True), unoptimised():
        rngs = {stream: jax.random.key(i) for i, stream in enumerate(STREAMS)}
        params = fill(build(False).init)
        assert _shapes(build(False)) == _shapes(build(True))
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        results, counts = [], []
        for remat in (False, True):
            model = build(remat)
            loss = lambda params, model=model: jnp.mean(logits(model, params, rngs) ** 2)  # noqa: E731
            gradient = jax.value_and_grad(loss)
            results.append(jax.jit(gradient)(params))
            counts.append(count_flops(gradient, params))
    kept, again = map(traverse_util.flatten_dict, ({"": x[0], **x[1]} for x in results))
    assert kept[("",)].dtype == np.float64
    for path, one in kept.items():
        scale = float(np.abs(one).max())
        np.testing.assert_allclose(again[path], one, rtol=1e-12, atol=1e-12 * scale, err_msg=path)
    assert counts[0].again == 0 < counts[1].again
    assert counts[0].model == counts[1].model


def _shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))
