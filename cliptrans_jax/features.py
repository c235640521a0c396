"""Feature vectors of frozen encoders: computed once over a whole set, kept in files that know what
they were made from.

The originals' caches are trusted whatever lies in them. Here a file carries a fingerprint of the
encoder's weights and of the texts or pictures, and is used only if that is the one asked for.
"""

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from flax import traverse_util
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from common_jax import hosts
from common_jax.mesh import replicated, to_devices
from common_jax.untrusted import brief, plain, read_npz
from common_jax.workdir import temporary_beside

Batch = Mapping[str, Any]
# apply(params, batch) -> feature vectors of any float dtype
Apply = Callable[[Any, Batch], Float[Array, "B M"]]

Encoded = tuple[Float[Array, "B M"], Float[Array, "B"], Int[Array, "B"]]  # features, mask, rows

LOG_SECONDS = 20  # between log lines, where there is no terminal for a progress bar
BROADCAST_BYTES = 1 << 26  # at most that go to the other hosts at once, through their devices


def encode_program(apply: Apply, mesh: Mesh) -> Callable[..., Encoded]:
    """encode(params, batch, row) -> (features (B, M), mask, row), jitted, the whole of it on every
    device. Devices of a mesh need not come in the order of the hosts: rows carry their numbers."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def encode(params: Any, batch: Batch, row: Int[Array, "B"]) -> Encoded:
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
    """The features of all examples in their order, the whole of them on every host.

    Args:
      apply: the encoder; jitted here, its batch split over all axes of `mesh`.
      params: its parameters, laid out on `mesh` or not yet on any device.
      batches: as `common_jax.inputs.eval_batches` gives them: this host's rows of each global
        batch, `_mask` 0 on the padding after the last example.
      size: how many examples there must be; None leaves it to the batches.
      title: for the progress bar or the log lines.

    Raises:
      ValueError: when there are no batches, they do not divide over the mesh, an example is masked
        out before the last one, or there are not `size`; features without their own example would
        shift all that follow.
      FloatingPointError: for features that are not finite.
    """
    encode = encode_program(apply, mesh)
    # Once, and not with every batch.
    if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        params = jax.device_put(params, replicated(mesh))
    parts, masks = [], []

    def collect(encoded: Encoded) -> None:
        features, mask, row = map(np.asarray, encoded)
        order = np.argsort(row)
        parts.append(features[order])
        masks.append(mask[order])

    pending = None
    with jax.set_mesh(mesh):
        for batch in _progress(batches, title):
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
            encoded = encode(params, on_devices, row)
            if pending is not None:
                collect(pending)  # while the devices work on the next
            pending = encoded
    if pending is None:
        raise ValueError(f"{title}: there is nothing to encode, the set is empty")
    collect(pending)
    features, real = np.concatenate(parts), np.concatenate(masks) > 0
    return _checked(features, real, size, title)


def fingerprint(params: Any, *content: Any) -> str:
    """A name, in hexadecimal digits, of an encoder's weights and what it encodes.

    The weights are summed up where they lie, so that nothing large moves; the result does not
    depend on how they are sharded. It changes with any value, shape, dtype or name among them, and
    with any part of the content and the order of the parts.

    Args:
      params: nested dict of arrays of at most 32 bits a value.
      content: str, bytes or arrays: texts, file contents and whatever else decides the features,
        such as the size that pictures are resized to.

    Raises:
      TypeError: for content of another kind, which has no bytes of its own.
    """
    digest = hashlib.sha256(b"features 1")
    flat = traverse_util.flatten_dict(params, sep="/")
    sums = {path: _checksum_of(leaf) for path, leaf in sorted(flat.items())}  # all dispatched
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
    """The features of `compute()`, from `folder/name.npz` if that has the same fingerprint.

    Otherwise all hosts compute it and the first one writes the file, whole or not at all. Only the
    first host reads the file, so that the hosts agree and need not share a disk. A file that is cut
    off or otherwise broken is computed again, with a warning.

    Args:
      folder: made where it is missing; may be on an object store.
      name: of the file, without a suffix.
      fingerprint: of all that decides the features.
      compute: called on every host, or on none.
    """
    path, features = epath.Path(folder) / f"{name}.npz", None
    if jax.process_index() == 0:
        features = _read(path, fingerprint)
    features = _from_first_host(features)
    if features is not None:
        return features
    features = np.asarray(compute(), np.float32)
    if jax.process_index() == 0:
        _write(path, features, fingerprint)
    return features


def _progress(batches: Iterable[Batch], title: str) -> Iterable[Batch]:
    if jax.process_index():
        yield from batches
    elif sys.stderr.isatty():
        yield from tqdm.tqdm(batches, desc=title, unit="batch")
    else:
        start = last = time.monotonic()
        for number, batch in enumerate(batches):
            if (now := time.monotonic()) - last >= LOG_SECONDS:
                last = now
                logging.info("%s: %d batches in %.0f s", title, number, now - start)
            yield batch


def _checked(
    features: Float32[np.ndarray, "_ M"], real: Bool[np.ndarray, "_"], size: int | None, title: str
) -> Float32[np.ndarray, "B M"]:
    count = int(real.sum())
    if not real[:count].all():
        missing = np.flatnonzero(~real[: np.flatnonzero(real)[-1]])
        raise ValueError(
            f"{title}: {len(missing)} examples could not be read, the first of them number "
            f"{missing[0]}; each needs its features: repair or remove what the log names"
        )
    if size is not None and count != size:
        raise ValueError(
            f"{title}: {count} examples came of {size}; repair or remove those that the log names"
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
    return _checksum_on(mesh)(leaf)


@functools.lru_cache(maxsize=8)
def _checksum_on(mesh: Mesh | None) -> Callable[[Any], UInt32[Array, "2"]]:
    return jax.jit(_checksum, out_shardings=None if mesh is None else replicated(mesh))


def _checksum(x: Array) -> UInt32[Array, "2"]:
    """Two sums, modulo 2^32, over the values' bit patterns, each mixed with its place.

    Mixing is one to one, so that one changed value always changes both sums; sums do not depend on
    who adds what up. A mere product with the place would not see two values change signs.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    keys = [_mix(place ^ np.uint32(seed)) for seed in (0x243F6A88, 0x85A308D3)]  # digits of pi
    return jnp.stack([jnp.sum(_mix(bits ^ key), dtype=jnp.uint32) for key in keys])


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A one to one map of 32-bit numbers that leaves no pattern: MurmurHash3's last steps."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _add(digest: Any, part: Any) -> None:
    """Adds a part, its kind and its length, so that parts cannot run into each other."""
    if isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            raise TypeError("an array of objects has no bytes of its own; give texts or numbers")
        kind, body = f"{part.dtype.str} {part.shape}", np.ascontiguousarray(part).data.cast("B")
    elif isinstance(part, str):
        kind, body = "str", part.encode()
    elif isinstance(part, bytes):
        kind, body = "bytes", part
    else:
        raise TypeError(f"{type(part).__name__} has no bytes of its own; give bytes, str or arrays")
    digest.update(f"{kind} {len(body)}\n".encode())
    digest.update(body)


def _read(path: epath.Path, fingerprint: str) -> Float32[np.ndarray, "B M"] | None:
    """The features of a whole file of this fingerprint; the log says why there are none."""
    if not path.exists():
        logging.info("%s: not there yet, computing it", path)
        return None
    try:
        arrays = read_npz(path, ("fingerprint", "features"))
        features, file_fingerprint = arrays["features"], arrays["fingerprint"]
        if features.ndim != 2 or features.dtype != np.float32:
            raise ValueError(
                f"{path} is damaged (features are {features.dtype} {brief(features.shape)})"
            )
        if file_fingerprint.ndim or file_fingerprint.dtype.kind != "U":
            raise ValueError(
                f"{path} is damaged (a fingerprint is {file_fingerprint.dtype} {brief(file_fingerprint.shape)})"
            )
    except (OSError, ValueError) as error:
        logging.warning("%s; the features of %s are computed again", error, path.name)
        return None
    if str(file_fingerprint) != fingerprint:
        logging.info(
            "%s was made from other weights, texts or pictures (%s, now %.12s), computing it again",
            path,
            plain(str(file_fingerprint)[:12]),
            fingerprint,
        )
        return None
    logging.info("%s: %d feature vectors read", path, len(features))
    return features


def _write(path: epath.Path, features: Float32[np.ndarray, "B M"], fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            np.savez(file, features=features, fingerprint=np.array(fingerprint))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _from_first_host(
    features: Float32[np.ndarray, "B M"] | None,
) -> Float32[np.ndarray, "_ M"] | None:
    """The array that the first host holds, on every host."""
    if jax.process_count() == 1:
        return features
    shape = (-1, -1) if features is None else features.shape
    rows, width = map(int, multihost_utils.broadcast_one_to_all(np.array(shape, np.int32)))
    if rows < 0:
        return None
    if features is None:
        features = np.empty((rows, width), np.float32)
    step = max(1, BROADCAST_BYTES // max(1, 4 * width))
    for start in range(0, rows, step):
        part = features[start : start + step]
        features[start : start + step] = multihost_utils.broadcast_one_to_all(part)
    return features
