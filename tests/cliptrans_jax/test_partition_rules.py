"""The partition rules of CLIPTrans' networks."""

import functools
import math
import re

import jax
from flax import traverse_util
from jax import numpy as jnp
from meshes import idle_rules
from tiny_cliptrans import UNEVEN, tiny_config

from cliptrans_jax.models import mapper
from cliptrans_jax.models.cliptrans import ModelConfig, Translator, partition_rules
from cliptrans_jax.models.mapper import MAPPERS, MapperConfig
from cliptrans_jax.runs import contrastive
from cliptrans_jax.towers.mclip import MClip, MClipConfig
from cliptrans_jax.towers.table import TOWERS
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.mesh import MeshConfig, make_mesh, match_rules

WIDTHS = (16, 4 * 16, 8)  # width of a token, a prefix, a feature
RULES = partition_rules(ModelConfig())


def translator(kind):
    return Translator(ModelConfig(UNEVEN, MapperConfig(kind, prefix=4, features=8)))


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def tower_shapes(config):
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(MClip(config, jnp.float32).init, jax.random.key(0), ids, ids)["params"]


def test_rules_shard_every_matrix_along_a_width_and_none_is_idle():
    mesh = make_mesh(MeshConfig(fsdp=8))
    trees = [shapes_of(translator(kind)) for kind in MAPPERS]
    for tree in trees:
        shardings = traverse_util.flatten_dict(match_rules(RULES, tree, mesh), sep="/")
        for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
            spec = tuple(shardings[path].spec)
            if len(leaf.shape) < 2 or path.endswith("/bias"):
                assert not any(spec), path
            else:
                assert leaf.shape[spec.index("fsdp")] in WIDTHS, path
    assert idle_rules(RULES, *trees) == []


def test_rules_of_stage_clip_match_its_towers():
    config = tiny_config("clip", None)
    tree = jax.eval_shape(functools.partial(contrastive.init, config), jax.random.key(0))
    rules = contrastive.partition_rules(config)
    match_rules(rules, tree, make_mesh(MeshConfig(fsdp=8)))
    assert idle_rules(rules, tree) == [regex for regex, _ in rules if "words" in regex][1:]


def test_published_model_fits_sixteen_devices_of_16_gigabytes():
    tree = shapes_of(Translator(ModelConfig())) | {"clip": tower_shapes(MClipConfig())}
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree["mbart"]))
    assert count == 610_879_488 + 250_054  # the network, and the bias of its logits
    for kind in MAPPERS:
        network = mapper.build(MapperConfig(kind), MBartConfig().width, jnp.float32)
        features = jax.ShapeDtypeStruct((1, 512), jnp.float32)
        init = functools.partial(network.init, train=False)
        tree["mapper"] = jax.eval_shape(init, jax.random.key(0), features)["params"]
        whole, split = count_parameters(tree, fsdp=16)
        assert 1.17e9 < whole < 1.20e9
        assert 3 * 4 * split < 16e9  # bytes, with Adam's two moments, all in float32


def count_parameters(tree, *, fsdp):
    """The number of parameters in total and per device, from the rules alone."""
    rules = (*RULES, *TOWERS[MClipConfig].rules)
    whole = split = 0
    for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
        spec = next(spec for regex, spec in rules if re.search(regex, "/" + path))
        for size, axis in zip(leaf.shape, spec, strict=False):
            assert axis is None or size % fsdp == 0, path
        parts = fsdp if "fsdp" in tuple(spec) else 1
        assert parts > 1 or leaf.size < 300_000, path  # nothing large is held whole
        whole += leaf.size
        split += leaf.size // parts
    return whole, split
