"""Features from frozen encoders, computed once for a whole set and cached in files.

The original implementations trust any cache file. Here a file has a fingerprint of the encoder's
weights and of its inputs, and is only used if the fingerprint matches.
"""

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from common_jax import hosts
from common_jax.log import progress
from common_jax.mesh import put, replicated, to_devices
from common_jax.step import one_behind
from common_jax.untrusted import plain
from common_jax.workdir import read_arrays, write_arrays

Batch = Mapping[str, Any]
# apply(params, batch) -> feature vectors of any float dtype
Apply = Callable[[Any, Batch], Float[Array, "B M"]]

Encoded = tuple[Float[Array, "B M"], Float[Array, " B"], Int[Array, " B"]]  # features, mask, rows

BLOCK = 1 << 22  # values of a leaf per checksum call
# Larger files are memory-mapped, and batches read their rows from disk; smaller ones are read
# whole.
MAPPED_BYTES = 1 << 26
BROADCAST_BYTES = 1 << 26  # limit per broadcast from the first host, through the devices


def encode_program(apply: Apply, mesh: Mesh) -> Callable[..., Encoded]:
    """encode(params, batch, row) -> (features (B, M), mask, row), jitted and replicated.

    Rows carry their indices, since the devices of a mesh need not be in the order of the hosts.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def encode(params: Any, batch: Batch, row: Int[Array, " B"]) -> Encoded:
        return apply(params, batch).astype(jnp.float32), batch["_mask"], row

    return encode


def encode_all(
    apply: Apply,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    size: int | None = None,
    title: str = "features",
) -> Float32[np.ndarray, "B M"]:
    """Computes the features of all examples, in order, on every host.

    Args:
      apply: the encoder; jitted here, with the batch split over all axes of `mesh`.
      params: its parameters, on `mesh` or still on the host.
      batches: from `common_jax.inputs.eval_batches`: this host's rows of each global batch, with
        `_mask` 0 for the padding after the last example.
      size: expected number of examples; None for any.
      title: title of the progress bar and of log lines.

    Raises:
      ValueError: if there are no batches, a batch is not a multiple of the mesh, the number of
        examples is not `size`, or one before the last is masked out, after which all features would
        belong to the wrong examples.
      FloatingPointError: for features that are not finite.
    """
    encode = encode_program(apply, mesh)
    # Otherwise every call would transfer them again.
    whole = replicated(mesh)
    params = jax.tree.map(lambda x: put(x, whole) if isinstance(x, np.ndarray) else x, params)

    def dispatched() -> Iterator[Encoded]:
        for batch in progress(batches, title=title, unit="batch"):
            hosts.check()
            rows = len(batch["_mask"])
            if rows * jax.process_count() % mesh.size:
                raise ValueError(
                    f"{title}: a batch of {rows * jax.process_count()} must be a multiple of the "
                    f"mesh's {mesh.size} devices; change the batch size or config.mesh"
                )
            row = np.arange(rows, dtype=np.int32) + rows * jax.process_index()
            on_devices = to_devices({**batch, "_row": row}, mesh)
            row = on_devices.pop("_row")
            yield encode(params, on_devices, row)

    parts, masks = [], []
    with jax.set_mesh(mesh):
        for encoded in one_behind(dispatched()):
            features, mask, row = map(np.asarray, encoded)
            order = np.argsort(row)  # from device order to example order
            parts.append(features[order])
            masks.append(mask[order])
    if not parts:
        raise ValueError(f"{title}: the set is empty, so there is nothing to encode")
    features, real = np.concatenate(parts), np.concatenate(masks) > 0
    return _checked(features, real, size, title)


def fingerprint(params: Any, *content: Any) -> str:
    """A hexadecimal digest of an encoder's weights and its inputs.

    Checksums of the weights are computed on their devices and do not depend on the sharding. The
    digest covers every value, shape, dtype and name, and every part of the content in order.

    Args:
      params: nested dict of arrays with at most 32 bits per value.
      content: str, bytes or arrays that determine the features: texts, file contents, the size that
        pictures are resized to.

    Raises:
      TypeError: for content of another type.
    """
    digest = hashlib.sha256(b"features 1")
    flat = traverse_util.flatten_dict(params, sep="/")
    # All checksums are dispatched before waiting for the first.
    sums = {path: _checksum_of(leaf) for path, leaf in sorted(flat.items())}
    for path, value in sums.items():
        leaf = flat[path]
        _add(digest, f"{path} {np.dtype(leaf.dtype).name} {tuple(leaf.shape)}")
        _add(digest, np.asarray(value))
    for part in content:
        _add(digest, part)
    return digest.hexdigest()


def cached(
    folder: epath.PathLike,
    name: str,
    fingerprint: str,
    compute: Callable[[], Float32[np.ndarray, "B M"]],
) -> Float32[np.ndarray, "B M"]:
    """The result of `compute()`, or the content of `folder/name.npz` if its fingerprint matches.

    If not, all hosts compute the features, and the first one writes the file atomically. Only the
    first host decides whether the file matches, so that hosts agree, and it sends the features to
    the others, so that no shared disk is needed. Files of at least MAPPED_BYTES are memory-mapped,
    by all hosts if all of them see the file. A damaged file is replaced, with a warning; one that
    cannot be written only causes a warning.

    Args:
      folder: created if missing; may be in an object store.
      name: name of the file, without suffix.
      fingerprint: fingerprint of everything that determines the features.
      compute: called on every host or on none.
    """
    path, features = epath.Path(folder) / f"{name}.npz", None
    if jax.process_index() == 0:
        features = _read(path, fingerprint)
    features = _from_first_host(features, lambda: _read(path, fingerprint))
    if features is not None:
        return features
    features = np.asarray(compute(), np.float32)
    if jax.process_index() == 0:
        try:
            write_arrays(path, fingerprint, {"features": features})
        except OSError as error:
            logging.warning(
                "%s; features are kept in memory, and the next start recomputes them", error
            )
            return features
        if features.nbytes >= MAPPED_BYTES and (mapped := _read(path, fingerprint)) is not None:
            return mapped
    return features


def _checked(
    features: Float32[np.ndarray, "_ M"], real: Bool[np.ndarray, " _"], size: int | None, title: str
) -> Float32[np.ndarray, "B M"]:
    count = int(real.sum())
    # Padding may only follow the last example: a gap would shift all features after it.
    if not real[:count].all():
        missing = np.flatnonzero(~real[: np.flatnonzero(real)[-1]])
        raise ValueError(
            f"{title}: {len(missing)} examples could not be read, the first of them number "
            f"{missing[0]}; repair or remove those that the log names"
        )
    if size is not None and count != size:
        raise ValueError(
            f"{title}: got {count} examples of {size}; repair or remove those that the log names"
        )
    features = features[:count]
    if not (finite := np.isfinite(features).all(axis=1)).all():
        raise FloatingPointError(
            f"{title}: {count - int(finite.sum())} examples have features that are not finite, the "
            f"first of them number {int(np.argmin(finite))}; check the encoder's weights"
        )
    return features


def _checksum_of(leaf: Any) -> UInt32[Array, "2"]:
    assert np.dtype(leaf.dtype).itemsize <= 4, leaf.dtype
    sharding = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    checksum = _checksum_on(mesh)
    rows = BLOCK // max(1, math.prod(leaf.shape[1:]))
    if leaf.ndim == 0 or len(leaf) <= rows or (mesh is not None and mesh.size > 1):
        return checksum(leaf, np.uint32(0))
    # XLA for CPUs materialises what it sums, at twice the size of the leaf.
    rows = max(1, rows)
    stride = leaf.size // len(leaf)
    firsts = range(0, len(leaf), rows)
    parts = (checksum(leaf[i : i + rows], np.uint32(i * stride % 2**32)) for i in firsts)
    return functools.reduce(jnp.add, parts)


# Cached, since a new jitted function per leaf would recompile for equal shapes.
@functools.lru_cache(maxsize=8)
def _checksum_on(mesh: Mesh | None) -> Callable[[Any, np.uint32], UInt32[Array, "2"]]:
    return jax.jit(_checksum, out_shardings=None if mesh is None else replicated(mesh))


def _checksum(x: Array, first: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    """Two sums, modulo 2^32, over the bit patterns of all values, each mixed with its position;
    `first` is the position of the first value.

    Mixing is a bijection, so changing a single value always changes both sums, and sums do not
    depend on the sharding. With products instead, two values could flip their signs unnoticed.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # The position in row-major order, which does not depend on the sharding.
    place, stride = jnp.full(x.shape, first), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    keys = [_mix(place ^ np.uint32(seed)) for seed in (0x243F6A88, 0x85A308D3)]  # digits of pi
    return jnp.stack([jnp.sum(_mix(bits ^ key), dtype=jnp.uint32) for key in keys])


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit numbers: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _add(digest: Any, part: Any) -> None:
    """Adds a part with its kind and length, so that parts split differently have different
    digests."""
    if isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            raise TypeError("an array of objects cannot be hashed; give texts or numbers")
        kind, body = f"{part.dtype.str} {part.shape}", np.ascontiguousarray(part).data.cast("B")
    elif isinstance(part, str):
        kind, body = "str", part.encode()
    elif isinstance(part, bytes):
        kind, body = "bytes", part
    else:
        raise TypeError(f"{type(part).__name__} cannot be hashed; give bytes, str or arrays")
    digest.update(f"{kind} {len(body)}\n".encode())
    digest.update(body)


def _read(path: epath.Path, fingerprint: str) -> Float32[np.ndarray, "B M"] | None:
    """The features of an intact file with this fingerprint, else None; the log says why."""
    if not path.exists():
        logging.info("%s does not exist yet; computing it", path)
        return None
    try:
        mapped = path.stat().length >= MAPPED_BYTES
        stored, arrays = read_arrays(path, {"features": (np.float32, 2)}, mapped=mapped)
    except (OSError, ValueError) as error:
        logging.warning("%s; recomputing the features of %s", error, path.name)
        return None
    if stored != fingerprint:
        logging.info(
            "%s was made from other weights, texts or pictures (%s, now %.12s); recomputing it",
            *(path, plain(stored[:12]), fingerprint),
        )
        return None
    features = arrays["features"]
    logging.info("%s: %d feature vectors read", path, len(features))
    return features


def _from_first_host(
    features: Float32[np.ndarray, "B M"] | None,
    read: Callable[[], Float32[np.ndarray, "B M"] | None],
) -> Float32[np.ndarray, "_ M"] | None:
    """Returns the first host's array on every host; `read` reads a large one from the first host's
    file if this host sees it."""
    if jax.process_count() == 1:
        return features
    shape = (-1, -1) if features is None else features.shape
    # A shape of (-1, -1) tells the other hosts that there is no array.
    rows, width = map(int, multihost_utils.broadcast_one_to_all(np.array(shape, np.int32)))
    if rows < 0:
        return None
    if 4 * rows * width >= MAPPED_BYTES:
        features = read() if features is None else features
        if not hosts.any_process(features is None):
            return features
    received = np.empty((rows, width), np.float32) if features is None else features
    step = max(1, BROADCAST_BYTES // max(1, 4 * width))
    for start in range(0, rows, step):
        part = multihost_utils.broadcast_one_to_all(received[start : start + step])
        if features is None:  # features in a mapped file are read-only
            received[start : start + step] = part
    return received
