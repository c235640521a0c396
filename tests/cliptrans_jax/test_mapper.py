"""Mapping networks: parameters, initialisation and outputs."""

import functools
import math

import jax
import naive_cliptrans as naive
import numpy as np
import pytest
from dropouts import dropouts
from flax import traverse_util
from jax import numpy as jnp
from tiny import fill

from cliptrans_jax.models import cliptrans_names, mapper
from cliptrans_jax.models.mapper import MAPPERS, MapperConfig
from common_jax.weights import table as tables

WIDTH, PREFIX = 16, 4
CLIP = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), "float32")


def build(kind, width=WIDTH):
    return mapper.build(MapperConfig(kind, prefix=PREFIX, features=8), width, jnp.float32)


@functools.cache
def params_of(kind):
    return fill(functools.partial(build(kind).init, train=False), CLIP)["params"]


def published(kind, params):
    """The same parameters under published names."""
    table = cliptrans_names.mapper_table(MapperConfig(kind))
    return naive.Weights(tables.write(table, params))


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("mlp", {"out/kernel": (8, 64), "out/bias": (64,), "prelu/slope": (1,)}),
        (
            "hidden_mlp",
            {
                "hidden/kernel": (8, 16),
                "hidden/bias": (16,),
                "out/kernel": (16, 64),
                "out/bias": (64,),
                "prelu/slope": (1,),
            },
        ),
        (
            "transformer",
            {
                "project/kernel": (8, 64),
                "project/bias": (64,),
                "attention/qkv/kernel": (16, 3, 2, 8),
                "attention/qkv/bias": (3, 2, 8),
                "attention/out/kernel": (2, 8, 16),
                "attention/out/bias": (16,),
                "attention_norm/scale": (16,),
                "attention_norm/bias": (16,),
                "up/kernel": (16, 5),
                "up/bias": (5,),
                "down/kernel": (5, 16),
                "down/bias": (16,),
                "mlp_norm/scale": (16,),
                "mlp_norm/bias": (16,),
            },
        ),
    ],
)
def test_mappers_have_the_expected_parameters(kind, shapes):
    vectors, variables = jax.eval_shape(
        lambda key: build(kind).init_with_output(key, CLIP, False), jax.random.key(0)
    )
    assert vectors.shape == (2, PREFIX, WIDTH)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    assert {path: leaf.shape for path, leaf in params.items()} == shapes


BOUNDS = {  # of uniform initial values; other leaves are not random
    "mlp": {"out/kernel": 8**-0.5, "out/bias": 8**-0.5},
    "hidden_mlp": {
        "hidden/kernel": 8**-0.5,
        "hidden/bias": 8**-0.5,
        "out/kernel": 96**-0.5,
        "out/bias": 96**-0.5,
    },
    "transformer": {
        "project/kernel": 8**-0.5,
        "project/bias": 8**-0.5,
        "attention/qkv/kernel": math.sqrt(6 / (96 + 3 * 96)),
        "attention/out/kernel": 96**-0.5,
        "up/kernel": 96**-0.5,
        "up/bias": 96**-0.5,
        "down/kernel": 32**-0.5,
        "down/bias": 32**-0.5,
    },
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_mapper_initialisation_is_within_the_published_bounds(kind):
    init = jax.jit(build(kind, 96).init, static_argnums=2)
    params = init(jax.random.key(0, impl="rbg"), CLIP, False)["params"]  # quick to compile
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if path in BOUNDS[kind]:
            low, high = np.min(leaf) / BOUNDS[kind][path], np.max(leaf) / BOUNDS[kind][path]
            assert -1 <= low < -0.8 and 0.8 < high <= 1, path
        else:
            at_first = {"prelu/slope": 0.25}.get(path, float(path.endswith("scale")))
            assert np.all(np.asarray(leaf) == at_first), path


def test_published_mappers_have_the_published_parameter_counts():
    features = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    counts = {"mlp": 5_253_121, "hidden_mlp": 11_021_313, "transformer": 10_155_349}
    for kind, count in counts.items():
        network = mapper.build(MapperConfig(kind), 1024, jnp.float32)
        init = functools.partial(network.init, train=False)
        shapes = jax.eval_shape(init, jax.random.key(0), features)["params"]
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("kind", list(MAPPERS))
def test_mappers_match_naive_implementations(kind):
    find = jax.jit(lambda params: build(kind).apply({"params": params}, CLIP, False))
    for size in (1.0, 0.02):  # small enough that the epsilon of every norm shows
        params = jax.tree.map(lambda x, size=size: size * x, params_of(kind))
        tensors = published(kind, params)
        wanted = [naive.prefix(tensors, kind, feature, PREFIX) for feature in CLIP]
        scale = np.std(np.subtract(*wanted))
        np.testing.assert_allclose(find(params), wanted, rtol=1e-5, atol=1e-3 * scale)


def test_transformer_mapper_applies_dropout_to_branches_and_hidden():
    config = MapperConfig("transformer", prefix=PREFIX, features=8, dropout=0.3)
    network = mapper.build(config, WIDTH, jnp.float32)
    params = params_of("transformer")
    with dropouts() as calls:
        found = jax.jit(network.apply, static_argnums=2)({"params": params}, CLIP, True)
        jax.eval_shape(lambda params: network.apply({"params": params}, CLIP, False), params)
    shapes = [(2, PREFIX, WIDTH), (2, PREFIX, WIDTH // 3), (2, PREFIX, WIDTH)]
    assert [(rate, shape) for _, rate, shape in calls] == [(0.3, shape) for shape in shapes]
    tensors = published("transformer", params)
    layer = tensors.below("transformer.layers.0.")
    x = tensors.linear("projector", CLIP).reshape(2, PREFIX, WIDTH)
    wanted = layer.norm("norm2", layer.norm("norm1", x))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
