"""Device meshes, and the two tables that shard arrays over them.

Parameters: ordered `(regex, PartitionSpec)` rules, at the end of each model's file, applied by
  `match_rules`; a parameter without a rule is an error. Activations: logical names, mapped to mesh
  axes in `ACTIVATIONS` and nowhere else.
"""

import dataclasses
import importlib.util
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from common_jax.config import FieldError, Section
from common_jax.ranges import LARGEST_INT, Interval

AXES = ("data", "fsdp", "expert")
BATCH = PartitionSpec(AXES)  # examples are split over all axes, including those for parameters

ACTIVATIONS = {
    "batch": AXES,
    "tokens": None,
    "width": None,
    "labels": None,
    # The next two: vectors looked up in a table whose columns are split over `fsdp`.
    "looked_up": ("data", "expert"),
    "columns": "fsdp",
}

# Number of devices along an axis.
Axis = Annotated[int, Interval("at least 1, or -1 for all that are left", 1, LARGEST_INT, other=-1)]
Rules = tuple[tuple[str, PartitionSpec], ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Number of devices along each axis; -1, on at most one axis, takes all that are left."""

    data: Axis = -1
    fsdp: Axis = 1
    expert: Axis = 1

    def __post_init__(self):
        super().__post_init__()
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(free) > 1:
            raise FieldError(
                f"{free[-1]}=-1 and {free[0]}=-1: only one axis can take all that are left"
            )


def start_backend() -> str:
    """Starts JAX's backend if needed and returns its platform. Raises ValueError if JAX_PLATFORMS
    asks for a platform that cannot be started here."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a plugin is missing
        # JAX's own advice is cut off, since the message below gives a better one.
        reason = str(error).partition(" (set JAX_PLATFORMS")[0][:500]
        raise ValueError(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''} cannot be started"
            f"{f' ({reason})' if reason else ''}; JAX is installed here for "
            f"{', '.join(_installed_platforms())}. Set JAX_PLATFORMS to one of these, unset it to "
            "take the best, or install JAX for the device: docs.jax.dev/en/latest/installation.html"
        ) from error


def _installed_platforms() -> list[str]:
    """Platforms that this JAX installation supports, whether or not such a device is present."""
    spec = importlib.util.find_spec("jax_plugins")
    plugins = pkgutil.iter_modules(spec.submodule_search_locations) if spec else ()
    tpu = ["tpu"] if importlib.util.find_spec("libtpu") else []
    return ["cpu", *tpu, *(plugin.name for plugin in plugins)]


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (by default all), with Auto axes `data`, `fsdp`,
    `expert`.

    With several TPU slices, which are connected by a slower network, `data` spans the slices, and
    `fsdp` and `expert` stay within one slice.

    Raises:
      ValueError: if the product of the axes is not the number of devices, or `data` is not a
        multiple of the number of slices.
    """
    if devices is None:
        start_backend()
        devices = jax.devices()
    shape = [getattr(config, axis) for axis in AXES]
    free = [axis for axis, size in zip(AXES, shape, strict=True) if size == -1]
    fixed = math.prod(size for size in shape if size != -1)
    if free and len(devices) % fixed == 0:
        shape[AXES.index(free[0])] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        need = (
            f"needs a divisor of the {len(devices)} devices here, and its fixed axes multiply to "
            f"{fixed}"
            if free
            else f"needs {fixed} devices, and there are {len(devices)} here"
        )
        raise ValueError(
            f"config.mesh={_describe(shape)} {need}; change config.mesh, or give -1 for "
            "config.mesh.data"
        )
    slices = count_slices(devices)
    if shape[0] % slices:
        raise ValueError(
            f"config.mesh={_describe(shape)}: config.mesh.data={shape[0]} must be a multiple of "
            f"the {slices} slices, so that config.mesh.fsdp and config.mesh.expert stay within "
            "one; lower these two"
        )
    # Lets a mesh axis be part of a physical axis of the torus, such as 8 chips on a 16 x 16 slice.
    split = {"allow_split_physical_axes": True, "devices": devices}
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, **split)
    else:
        within = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **split)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: list[jax.Device]) -> int:
    """The number of TPU slices that the devices belong to; 1 for other platforms."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def check_batch(mesh: Mesh, key: str, batch: int) -> None:
    """Raises ValueError unless the batch size `batch`, set by config field `key`, divides evenly
    over all devices."""
    if batch % mesh.size:
        raise ValueError(
            f"{key}={batch} must be a multiple of the mesh's {mesh.size} devices "
            f"({_describe(list(mesh.shape.values()))}), over all of which a batch is split; "
            f"change {key} or config.mesh"
        )


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Constrains the sharding of activation `x`, given one logical name from `ACTIVATIONS` per
    axis; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*(ACTIVATIONS[name] for name in names))
    )


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrains tokens (B, T, D) that were looked up in a table.

    Their columns are split first: otherwise, to get the table's gradient, every device would gather
    those of all tokens, full width.
    """
    return constrain(constrain(x, "looked_up", "tokens", "columns"), "batch", "tokens", "width")


def batch_shards() -> int:
    """The number of shards of a batch: all devices of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def on_own_examples(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `function`, of arrays with examples along the first axis, over the mesh's devices, each
    with its own examples. If these do not split evenly, every device computes all of them."""
    if batch_shards() == 1:
        return function

    def run(*arrays: jax.Array) -> Any:
        split = BATCH if len(arrays[0]) % batch_shards() == 0 else PartitionSpec()
        # check_vma would require Pallas kernels to declare the axes over which results vary.
        return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)(*arrays)

    return run


def take_rows(tree: Any, rows: jax.Array) -> Any:
    """Selects examples from each device's share of a batch, so that none leaves its device.

    Args:
      tree: arrays with examples along the first axis; scalars are returned unchanged.
      rows: (devices, chosen) indices within each device's share.
    """

    def take(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return x
        shares = x.reshape(len(rows), -1, *x.shape[1:])
        return jax.vmap(lambda share, chosen: share[chosen])(shares, rows).reshape(-1, *x.shape[1:])

    return jax.tree.map(take, tree)


def put_rows(tree: Any, chosen: Any, rows: jax.Array) -> Any:
    """`tree` with the examples that `take_rows` chose replaced by `chosen`."""

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        old, new = (z.reshape(len(rows), -1, *z.shape[1:]) for z in (x, y))
        return jax.vmap(lambda a, b, row: a.at[row].set(b))(old, new, rows).reshape(x.shape)

    return jax.tree.map(put, tree, chosen)


def match_rules(rules: Rules, params: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter, from the first rule whose regex is found in its path.

    Args:
      rules: ordered (regex, PartitionSpec) pairs; no catch-all, so that a new parameter is noticed.
      params: nested dict of arrays or ShapeDtypeStructs; the path of a leaf is `/a/b/c`.
      mesh: the mesh that the specs' axis names refer to.

    Raises:
      ValueError: for a parameter that no rule matches, a spec with more axes than its parameter, or
        a parameter axis that the mesh axis does not divide.
    """
    shardings = {}
    for path, leaf in traverse_util.flatten_dict(params, keep_empty_nodes=True, sep="/").items():
        if leaf is traverse_util.empty_node:  # kept, so that both trees have the same structure
            shardings[path] = leaf
            continue
        spec = next((spec for regex, spec in rules if re.search(regex, "/" + path)), None)
        if spec is None:
            raise ValueError(f"no partition rule matches parameter {path!r} of shape {leaf.shape}")
        _check_divides(path, leaf.shape, spec, mesh)
        shardings[path] = NamedSharding(mesh, spec)
    return traverse_util.unflatten_dict(shardings, sep="/")


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with the shapes and dtypes of `shapes` and the given shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh, split over all devices; each host supplies its own rows."""
    return {
        name: jax.make_array_from_process_local_data(batched(mesh), rows)
        for name, rows in batch.items()
    }


def move_to_devices(params: dict[str, Any], sharding: Sharding) -> None:
    """Replaces the numpy arrays in a nested dict by arrays on devices, in place and one by one, so
    that host memory never holds a second copy of all of them."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            move_to_devices(value, sharding)
        elif isinstance(value, np.ndarray):
            params[name] = jax.block_until_ready(put(value, sharding))


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Puts an array on devices; every process must hold all of it."""
    # Not device_put, which with several processes gathers everyone's array to compare them.
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def batched(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of examples, split over all devices."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _check_divides(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"partition rule {spec} has more axes than parameter {path!r} of shape {shape}"
        )
    for size, entry in zip(shape, spec, strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if size % math.prod(mesh.shape[axis] for axis in axes):
            over = " x ".join(f"config.mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            fields = " or ".join(f"config.mesh.{axis}" for axis in axes)
            raise ValueError(
                f"parameter {path!r} of shape {shape} splits its axis of {size} over {over}, which "
                f"does not divide it; change {fields} or the model's size"
            )


def _describe(shape: list[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
