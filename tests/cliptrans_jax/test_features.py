"""Features are equal on every mesh and host; a cache is used only for the same inputs."""

import dataclasses
import errno
import io
import logging
import os
import pathlib
import socket
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_cliptrans import number_tokenizer

from cliptrans_jax import features as cache
from cliptrans_jax.data.corpus import Corpus, Numbered
from cliptrans_jax.data.tokenizers import tokens
from cliptrans_jax.features import cached, encode_all, fingerprint
from common_jax.inputs import BadExample, eval_batches
from common_jax.mesh import MeshConfig, constrain, make_mesh

SIZE, BATCH, WIDTH, OUT = 21, 8, 5, 3
KERNEL = np.random.default_rng(0).normal(size=(WIDTH, OUT)).astype(np.float32)
PARAMS = {"dense": {"kernel": KERNEL, "bias": np.arange(OUT, dtype=np.float32)}}
TEXT = np.random.default_rng(1).normal(size=(SIZE, WIDTH)).astype(np.float32)
WANTED = np.tanh(TEXT @ KERNEL + PARAMS["dense"]["bias"])


class Examples:
    """The rows of TEXT; those in `broken` cannot be read."""

    arrays = None

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index in self.broken:
            raise BadExample(f"{index}.jpg", "broken")
        return {"text": TEXT[index]}


def apply(params, batch):
    x = batch["text"] @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jnp.tanh(constrain(x, "batch", "width"))


def batches(broken=()):
    return eval_batches(Examples(broken), transform=None, batch=BATCH, bad_share=0.5)


def mesh_of(count=8, **axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[:count])


# Encoding.


def test_features_are_equal_and_ordered_on_every_mesh():
    on_one = encode_all(apply, PARAMS, batches(), mesh=mesh_of(1), size=SIZE)
    assert on_one.dtype == np.float32
    np.testing.assert_allclose(on_one, WANTED, rtol=1e-5, atol=1e-6)
    for mesh in (mesh_of(), mesh_of(fsdp=2, expert=2), mesh_of(2)):
        features = encode_all(apply, PARAMS, batches(), mesh=mesh, size=SIZE)
        np.testing.assert_allclose(features, on_one, rtol=1e-6, atol=1e-6)


def test_features_of_sharded_bfloat16_networks_are_float32():
    mesh = mesh_of(fsdp=4)
    sharding = NamedSharding(mesh, P(None, None))
    params = jax.device_put(PARAMS["dense"]["kernel"], sharding)
    features = encode_all(
        lambda kernel, batch: (batch["text"] @ kernel).astype(jnp.bfloat16),
        params,
        batches(),
        mesh=mesh,
    )
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, TEXT @ KERNEL, rtol=2e-2, atol=2e-2)


def test_unreadable_examples_are_refused():
    with pytest.raises(ValueError, match=r"2 examples could not be read, .* number 3;"):
        encode_all(apply, PARAMS, batches(broken=(3, 9)), mesh=mesh_of(1))
    # The last one looks like padding, unless the number of examples is known.
    with pytest.raises(ValueError, match=f"got {SIZE - 1} examples of {SIZE}"):
        encode_all(apply, PARAMS, batches(broken=(SIZE - 1,)), mesh=mesh_of(1), size=SIZE)


def test_empty_input_and_indivisible_batches_are_refused():
    with pytest.raises(ValueError, match="nothing to encode"):
        encode_all(apply, PARAMS, [], mesh=mesh_of(1))
    with pytest.raises(ValueError, match="a batch of 8 must be a multiple of the mesh's 3 devices"):
        encode_all(apply, PARAMS, batches(), mesh=mesh_of(3))


def test_non_finite_features_are_refused():
    with pytest.raises(FloatingPointError, match=r"1 examples have features .* number 4;"):
        encode_all(
            lambda params, batch: jnp.where(batch["text"] == TEXT[4], jnp.nan, batch["text"]),
            {},
            batches(),
            mesh=mesh_of(1),
        )


# Fingerprints.


def test_fingerprint_does_not_depend_on_the_layout():
    wide = {"a": {"w": np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)}}
    wide["a"]["half"] = jnp.asarray(wide["a"]["w"], jnp.bfloat16)
    wide["ids"], wide["flag"] = np.arange(16, dtype=np.int32), np.array([True, False] * 8)
    wide["scalar"] = np.float32(2)
    name = fingerprint(wide, "text")
    assert len(name) == 64
    int(name, 16)
    assert fingerprint(jax.tree.map(jnp.asarray, wide), "text") == name
    mesh = mesh_of(fsdp=2, expert=2)
    for first in (P(), P("fsdp"), P(("data", "fsdp", "expert"))):

        def place(leaf, spec=first):
            return jax.device_put(leaf, NamedSharding(mesh, spec if np.ndim(leaf) else P()))

        assert fingerprint(jax.tree.map(place, wide), "text") == name


def test_fingerprint_does_not_depend_on_the_checksum_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32)
    whole = fingerprint({"x": values})
    for block in (1, 6, 13):  # less than a row, a row, two rows
        monkeypatch.setattr(cache, "BLOCK", block)
        assert fingerprint({"x": values}) == fingerprint({"x": jnp.asarray(values)}) == whole


def test_fingerprint_changes_with_any_weight():
    kernel, bias = PARAMS["dense"]["kernel"], PARAMS["dense"]["bias"]
    swapped, turned = kernel.copy(), kernel.copy()
    swapped[[0, 3]] = swapped[[3, 0]]
    turned[0, 0], turned[1, 1] = 0.5, -0.5
    turned_back = turned.copy()
    turned_back[0, 0], turned_back[1, 1] = -0.5, 0.5  # two sign bits swap places
    bit = kernel.copy()
    bit.view(np.uint32)[4, 2] ^= 1
    variants = [
        {"dense": {"kernel": kernel, "bias": bias}},
        {"dense": {"kernel": bit, "bias": bias}},
        {"dense": {"kernel": swapped, "bias": bias}},
        {"dense": {"kernel": turned, "bias": bias}},
        {"dense": {"kernel": turned_back, "bias": bias}},
        {"dense": {"kernel": kernel.reshape(OUT, WIDTH), "bias": bias}},
        {"dense": {"kernel": kernel.view(np.int32), "bias": bias}},
        {"dense": {"kernels": kernel, "bias": bias}},
        {"dense": {"kernel": kernel, "bias": -bias}},
        {"dense": {"kernel": kernel}},
        {"a": bias, "b": bias + 1},
        {"a": bias + 1, "b": bias},
        {"a": np.zeros(2, np.float32)},
        {"a": np.zeros(3, np.float32)},
        {"a": np.zeros((0, 3), np.float32)},
        {},
    ]
    assert len({fingerprint(params) for params in variants}) == len(variants)


def test_fingerprint_detects_single_bits_and_swaps():
    # All changes of a single bit, and all swaps of two out of 24 values with similar bits.
    values = np.float32(1) + np.arange(24, dtype=np.float32) * np.float32(2**-23)
    seen = {fingerprint({"x": values})}
    for i in range(24):
        for j in range(i):
            swapped = values.copy()
            swapped[[i, j]] = swapped[[j, i]]
            seen.add(fingerprint({"x": swapped}))
    for bit in range(32):
        changed = values.copy()
        changed.view(np.uint32)[7] ^= np.uint32(1) << bit
        seen.add(fingerprint({"x": changed}))
    assert len(seen) == 1 + 24 * 23 // 2 + 32


def test_fingerprint_changes_with_any_content():
    rows = np.arange(6.0).reshape(2, 3)
    contents = [
        (),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("c", "ab"),
        (b"abc",),
        (b"ab", b"c"),
        ("", "abc"),
        (rows,),
        (rows[::-1],),
        (rows.reshape(3, 2),),
        (rows.astype(np.float32),),
        (np.asfortranarray(rows)[:, :2],),
        (np.array(["ab", "c"]),),
        (np.zeros(0),),
    ]
    assert len({fingerprint({}, *content) for content in contents}) == len(contents)
    assert fingerprint({}, np.asfortranarray(rows)) == fingerprint({}, rows)


@pytest.mark.parametrize("content", [3, None, ["text"], np.array(["text", None])])
def test_unhashable_content_is_refused(content):
    with pytest.raises(TypeError, match="cannot be hashed"):
        fingerprint({}, content)


# The cache.


class Counter:
    def __init__(self, value=WANTED):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_stored_features_are_reused(tmp_path, caplog):
    folder, compute = tmp_path / "new" / "features", Counter()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert np.array_equal(cached(folder, "train.en", "f00d", compute), WANTED)
    assert compute.calls == 1
    assert [path.name for path in folder.iterdir()] == ["train.en.npz"]
    messages = [record.message for record in caplog.records]
    assert "does not exist yet" in messages[0]
    assert f"{SIZE} feature vectors read" in messages[1]


def test_changed_fingerprint_recomputes_and_logs_why(tmp_path, caplog):
    cached(tmp_path, "x", "f00d", Counter())
    second = Counter(WANTED + 1)
    with caplog.at_level(logging.INFO):
        assert np.array_equal(cached(tmp_path, "x", "beef", second), WANTED + 1)
    assert "x.npz was made from other weights, texts or pictures (f00d, now beef)" in caplog.text
    assert np.array_equal(cached(tmp_path, "x", "beef", second), WANTED + 1)
    assert second.calls == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    place = content.index(WANTED.tobytes()) + 7
    content[place] ^= 1
    path.write_bytes(bytes(content))


def drop(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.npy", b"")


def other_kind(path):
    with path.open("wb") as file:
        np.savez(file, features=WANTED.astype(np.float64), fingerprint=np.array("f00d"))


def no_archive(path):
    with path.open("wb") as file:
        np.save(file, WANTED)


def emptied(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[:200])


def with_header(header, body=bytes(64)):
    """Writes features with any kind of npy header."""

    def spoil(path):
        text = header.encode().ljust(117) + b"\n"
        npy = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body
        name = io.BytesIO()
        np.save(name, np.array("f00d"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("features.npy", npy)
            archive.writestr("fingerprint.npy", name.getvalue())

    return spoil


def npy(dtype, shape):
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"


ODD = [
    with_header(npy("'<f4'", (1 << 40, 512))),
    with_header(npy("'<f4'", (0, 1 << 62))),
    with_header(npy("'<f4'", (-1, 4))),
    with_header(npy("'<f4'", (16,))),
    with_header(npy("'<f4'", ("a", 4))),
    with_header(npy("'|O'", (4, 4))),
    with_header(npy("'<U0'", (1 << 40, 1 << 20))),
    with_header(npy("[('a', '<f4')]", (4, 4))),
    with_header(npy("'<f3'", (4, 4))),
    with_header("(" * 110),
    with_header("-" * 110 + "1"),
    with_header("{'descr': '<f4'"),
    with_header(""),
]


@pytest.mark.parametrize("spoil", [cut, flip, drop, other_kind, no_archive, emptied, half, *ODD])
def test_broken_file_is_reported_and_recomputed(tmp_path, caplog, spoil):
    compute = Counter()
    cached(tmp_path, "x", "f00d", compute)
    spoil(tmp_path / "x.npz")
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(cached(tmp_path, "x", "f00d", compute), WANTED)
    assert compute.calls == 2
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    warnings = [record.message for record in loud]
    assert len(warnings) == 1 and warnings[0].startswith(str(tmp_path / "x.npz"))
    assert warnings[0].endswith("recomputing the features of x.npz")
    cached(tmp_path, "x", "f00d", compute)
    assert compute.calls == 2


def test_failed_write_keeps_the_old_file_and_features_in_memory(tmp_path, monkeypatch, caplog):
    cached(tmp_path, "x", "f00d", Counter())
    monkeypatch.setattr(np, "savez", failing)
    assert np.array_equal(cached(tmp_path, "x", "beef", Counter(WANTED + 1)), WANTED + 1)
    assert f"No space left on device: '{tmp_path}/x.npz'; features are kept" in caplog.text
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert np.array_equal(cached(tmp_path, "x", "f00d", failing), WANTED)


def failing(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


# Several hosts.


def numbers_of(folder, calls):
    """The ids of a corpus that counts as large; `calls` gets an entry each time they are made."""
    tokens.LARGE, tokenizer = 3, number_tokenizer(limit=6)
    corpus = Corpus("x", {"en": ("3 4", "5", "6")}, None, Numbered("x", 3))
    counted = dataclasses.replace(
        tokenizer, cut=lambda texts: [calls.append(1), *tokenizer.cut(texts)][1:]
    )
    ids = tokens.encode_corpus(counted, corpus, "en", frame=None, folder=folder)
    assert [row.tolist() for row in ids] == [[0, 3, 4, 2], [0, 5, 2], [0, 6, 2]]
    return ids.flat.tolist()


def two_hosts(port, host, folder):
    """What each of two hosts, with two devices each, does with its own folders."""
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=host)
    devices = sorted(jax.devices(), key=lambda device: (device.id % 2, device.process_index))
    assert [device.process_index for device in devices] == [0, 1, 0, 1]
    mesh = jax.make_mesh((2, 2, 1), ("data", "fsdp", "expert"), devices=devices)
    own = pathlib.Path(folder) / str(host)
    cache.BROADCAST_BYTES = 5 * 4 * OUT  # the rows go to the other host in five parts
    calls = []

    def compute():
        calls.append(1)
        mine = eval_batches(Examples(), transform=None, batch=BATCH, shard=(host, 2))
        return encode_all(apply, PARAMS, mine, mesh=mesh, size=SIZE)

    features = cached(own, "x", "f00d", compute)
    np.testing.assert_allclose(features, WANTED, rtol=1e-5, atol=1e-6)
    again = cached(own, "x", "f00d", compute)  # only the first host has a file
    assert np.array_equal(again, features)
    assert np.array_equal(cached(own, "x", "beef", compute), features)
    assert len(calls) == 2
    assert own.exists() == (host == 0)
    cache.MAPPED_BYTES = WANTED.nbytes  # the first host maps its file, and the other cannot
    np.testing.assert_array_equal(cached(own, "x", "beef", compute), features)
    shared = pathlib.Path(folder) / "shared"
    made = cached(shared, "x", "f00d", compute)
    read = cached(shared, "x", "f00d", compute)
    np.testing.assert_array_equal(made, features)
    np.testing.assert_array_equal(read, features)
    assert len(calls) == 3 and not read.flags.writeable and made.flags.writeable == (host == 1)
    assert numbers_of(shared, calls) == numbers_of(own, calls) == numbers_of(shared, calls)
    assert len(calls) == (5 if host == 0 else 4)  # both see one of the first host's files
    sharding = NamedSharding(mesh, P(None, ("fsdp",)))
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    split = jax.make_array_from_callback((3, 4), sharding, lambda index: whole[index])
    assert fingerprint({"w": split}) == fingerprint({"w": whole})


def test_two_hosts_compute_the_same_features(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = pathlib.Path(__file__).parents[2]
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    hosts = [
        subprocess.Popen(
            [sys.executable, __file__, str(port), str(host), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(2)
    ]
    outputs = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)


if __name__ == "__main__":
    two_hosts(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
