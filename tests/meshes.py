"""The meshes that tests train on, and a check of partition rules."""

import re
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from common_jax.mesh import MeshConfig, Rules, make_mesh


def one_device() -> Mesh:
    """A mesh of only the first of the eight devices."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def split_mesh() -> Mesh:
    """A mesh of all eight devices, two along each axis."""
    return make_mesh(MeshConfig(data=2, fsdp=2, expert=2))


def idle_rules(rules: Rules, *trees: Any) -> list[str]:
    """The regexes in `rules` that are never the first to match a parameter of the `trees`."""
    paths = [path for tree in trees for path in traverse_util.flatten_dict(tree, sep="/")]
    first = {
        next((regex for regex, _ in rules if re.search(regex, "/" + path)), None) for path in paths
    }
    return [regex for regex, _ in rules if regex not in first]
