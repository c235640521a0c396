"""ViTs with the tensors of timm's compute what timm's compute."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import numpy as jnp
from vit_variants import EPS, VARIANTS, apply, shapes_of, sizes_of

from m2mkd_jax.models import encoder, vit

WITH_TIMM = [name for name, (_, arguments) in VARIANTS.items() if arguments is not None]


# timm's tensors: our path without the stage, and how the array is turned.
def linear(array, heads):
    return array.T


def out_of_heads(array, heads):
    return array.T.reshape(heads, -1, array.shape[0])


def parts(count):
    """[count * D, ...] to (..., count, H, K)."""
    return lambda array, heads: np.moveaxis(
        array.reshape(count, heads, -1, *array.shape[1:]), (0, 1, 2), (-3, -2, -1)
    )


def into_heads(array, heads):
    return parts(1)(array, heads)[..., 0, :, :]


def patches(array, heads):
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])


def as_is(array, heads):
    return array


TIMM = (
    (r"cls_token|pos_embed", r"\g<0>", as_is),
    (r"reg_token", "register_tokens", as_is),
    (r"patch_embed\.proj\.weight", "patches/kernel", patches),
    (r"patch_embed\.proj\.bias", "patches/bias", as_is),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"block_\1/scale\2", as_is),
    (r"blocks\.(\d+)\.(norm[12])\.weight", r"block_\1/\2/scale", as_is),
    (r"blocks\.(\d+)\.(norm[12])\.bias", r"block_\1/\2/bias", as_is),
    (r"blocks\.(\d+)\.attn\.qkv\.weight", r"block_\1/attention/qkv/kernel", parts(3)),
    (r"blocks\.(\d+)\.attn\.qkv\.bias", r"block_\1/attention/qkv/bias", parts(3)),
    (r"blocks\.(\d+)\.attn\.proj\.weight", r"block_\1/attention/out/kernel", out_of_heads),
    (r"blocks\.(\d+)\.attn\.proj\.bias", r"block_\1/attention/out/bias", as_is),
    (r"blocks\.(\d+)\.mlp\.fc1\.weight", r"block_\1/mlp/up/kernel", linear),
    (r"blocks\.(\d+)\.mlp\.fc1\.bias", r"block_\1/mlp/up/bias", as_is),
    (r"blocks\.(\d+)\.mlp\.fc2\.weight", r"block_\1/mlp/down/kernel", linear),
    (r"blocks\.(\d+)\.mlp\.fc2\.bias", r"block_\1/mlp/down/bias", as_is),
    (r"(?:fc_)?norm\.weight", "norm/scale", as_is),
    (r"(?:fc_)?norm\.bias", "norm/bias", as_is),
    (r"norm_pre\.weight", "norm_pre/scale", as_is),
    (r"norm_pre\.bias", "norm_pre/bias", as_is),
    (r"attn_pool\.latent", "pool/probe", as_is),
    (r"attn_pool\.q\.(weight)", "pool/attention/query/kernel", into_heads),
    (r"attn_pool\.q\.bias", "pool/attention/query/bias", into_heads),
    (r"attn_pool\.kv\.weight", "pool/attention/key_value/kernel", parts(2)),
    (r"attn_pool\.kv\.bias", "pool/attention/key_value/bias", parts(2)),
    (r"attn_pool\.proj\.weight", "pool/attention/out/kernel", out_of_heads),
    (r"attn_pool\.proj\.bias", "pool/attention/out/bias", as_is),
    (r"attn_pool\.norm\.weight", "pool/norm/scale", as_is),
    (r"attn_pool\.norm\.bias", "pool/norm/bias", as_is),
    (r"attn_pool\.mlp\.fc1\.weight", "pool/mlp/up/kernel", linear),
    (r"attn_pool\.mlp\.fc1\.bias", "pool/mlp/up/bias", as_is),
    (r"attn_pool\.mlp\.fc2\.weight", "pool/mlp/down/kernel", linear),
    (r"attn_pool\.mlp\.fc2\.bias", "pool/mlp/down/bias", as_is),
    (r"head\.weight", "head/kernel", linear),
    (r"head\.bias", "head/bias", as_is),
)


def from_timm(state, heads):
    """Parameters of a network of one stage."""
    params = {}
    for name, array in state.items():
        regex, path, turn = next(row for row in TIMM if re.fullmatch(row[0], name))
        params[re.sub(regex, path, name)] = turn(array, heads)
    return {"stage_0": traverse_util.unflatten_dict(params, sep="/")}


@pytest.mark.parametrize("patch", [4, 14])
@pytest.mark.parametrize("name", WITH_TIMM)
def test_timm_computes_the_same(name, patch):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.models.vision_transformer")
    side, sizes = 3 * patch, {"embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.3, "depth": 3}
    model = timm.VisionTransformer(
        img_size=side,
        patch_size=patch,
        num_classes=5,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=EPS),
        **sizes,
        **VARIANTS[name][1],
    ).eval()
    rng = np.random.default_rng(0)
    state = {
        key: rng.normal(0, 0.3, tuple(tensor.shape)).astype(np.float32)
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    x = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    config = sizes_of(name, patch=patch, mlp_ratio=2.3, depths=(3,))
    network = vit.build(config, encoder.Interface(side, 3, 5))
    params = from_timm(state, heads=2)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes_of(network))
    found = apply(network, params, x)[0]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", vit.PRETRAINED)
def test_timm_s_pretrained_vits_have_these_shapes(name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    config, side = vit.variant(name)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    state = {  # which take no memory
        key: np.broadcast_to(np.float32(0), tuple(tensor.shape))
        for key, tensor in model.state_dict().items()
    }
    shapes = shapes_of(vit.build(config, encoder.Interface(side, 3, 1000)))
    found = from_timm(state, config.heads)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, shapes)
