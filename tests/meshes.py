"""The meshes that tests train on, and a check of partition rules."""

import re
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from common_jax.mesh import MeshConfig, Rules, make_mesh


def one_device() -> Mesh:
    """The first of the eight devices alone."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def split_mesh() -> Mesh:
    """All eight devices, two along each axis."""
    return make_mesh(MeshConfig(data=2, fsdp=2, expert=2))


def idle_rules(rules: Rules, *trees: Any) -> list[str]:
    """The regexes of `rules` that are the first to match no parameter of any of the `trees`."""
    paths = [path for tree in trees for path in traverse_util.flatten_dict(tree, sep="/")]
    first = {
        next((regex for regex, _ in rules if re.search(regex, "/" + path)), None) for path in paths
    }
    return [regex for regex, _ in rules if regex not in first]
