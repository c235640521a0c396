"""The meshes that tests train on."""

import jax
from jax.sharding import Mesh

from common_jax.mesh import MeshConfig, make_mesh


def one_device() -> Mesh:
    """The first of the eight devices alone."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def split_mesh() -> Mesh:
    """All eight devices, two along each axis."""
    return make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
