"""Malicious files: the sizes they declare are checked against their content before they are
read."""

import json
import pickle
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch_files
from mutations import doubled_lists, doubled_tuples
from safetensors.numpy import save_file
from same import assert_same
from torch_files import Call, Global, New, Raw, storage, tensor

from common_jax.untrusted import brief, parse_json, plain, read_npz
from common_jax.weights import read_plain, read_tensors, torch_archive, torch_pickle

FLOATS = storage("FloatStorage", "0", 2)
ONES = tensor(FLOATS, (2,), (1,))
DOUBLED, TUPLES = doubled_lists(40), doubled_tuples(40)
DEEP = b")" + b"\x85" * 20_000  # ((((...


@pytest.fixture(autouse=True)
def bounded():
    """Fails a test that takes more than 64 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def archive(tmp_path, value, storages=None, *, extra=None):
    path = tmp_path / "weights.pth"
    numbers = {"0": np.ones(2, np.float32)} if storages is None else storages
    torch_files.write_archive(path, value, numbers, extra=extra)
    return path


@pytest.mark.parametrize(
    "opcodes",
    [
        b"]r\x00\x00\x00\x10",  # a memo index of 2^28, which took 4 GiB
        DOUBLED,  # 2^40 lists
        b"}" + TUPLES + b"Ns",  # 2^40 tuples to hash
        b"}" + DEEP + b"Ns",  # tuples that nest too deep to hash
    ],
    ids=["memo", "lists", "tuples", "deep"],
)
def test_repeated_pickle_contents_cost_nothing(tmp_path, opcodes):
    path = archive(tmp_path, {"model": {"a": ONES}, "odd": Raw(opcodes)})
    assert_same(read_tensors(path), {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"weights\.pth holds 'b', a (list|dict), where"):
        read_tensors(archive(tmp_path, {"a": ONES, "b": Raw(opcodes)}))


def test_integer_keys_with_equal_hashes_are_replaced():
    keys = [number * (2**61 - 1) for number in range(1, 20)]
    items = b"".join(pickle.dumps(key, protocol=2)[2:-1] + b"N" for key in keys)
    found = torch_pickle.load(b"\x80\x02}(" + items + b"u.", script=False)
    assert len(found) == len(keys)
    assert [key for key in found if isinstance(key, int)] == [x for x in keys if x < 2**64]


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"Np%d\n" % (2**61 - 1), "uses an opcode that PyTorch does not write"),
        (b"c%s\nb\n" % (b"a" * 100_000), r"names a class a+\.\.\., whose name is too long"),
    ],
    ids=["memo", "class"],
)
def test_pickle_bombs_are_refused(opcodes, message):
    with pytest.raises(ValueError, match=message):
        torch_pickle.load(b"\x80\x02" + opcodes + b".", script=False)


def test_read_plain_skips_large_cyclic_and_deep_lists(tmp_path):
    few = [[1, 2], [3.5, "x"]]
    path = archive(tmp_path, {"model": {"a": ONES}, "few": few, "many": Raw(DOUBLED), "no": [ONES]})
    assert read_plain(path) == {"few": few}
    itself = Raw(b"]q\x00h\x00a")
    assert read_plain(archive(tmp_path, {"model": {"a": ONES}, "list": itself, "x": 1})) == {"x": 1}
    nested = Raw(b"]" * 100 + b"a" * 99)
    assert read_plain(archive(tmp_path, {"model": {"a": ONES}, "list": nested, "x": 1})) == {"x": 1}


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(FLOATS, (HUGE,), (0,)), "more than 64 times what the file holds"),
        (tensor(FLOATS, (0, 1 << 61, 1 << 61), (1, 1, 1)), "more than 64 times"),
        (tensor(FLOATS, (1 << 62,), (0,)), "gives a the shape"),
        (tensor(FLOATS, (2.0,), (1,)), r"gives a the shape \(2\.0,\)"),
        (tensor(FLOATS, (True, 2), (1, 1)), r"gives a the shape \(True, 2\)"),
        (tensor(FLOATS, (2,), (1 << 62,)), "gives a the shape"),
        (tensor(FLOATS, (1,), (1,), offset=1 << 61), "has too few values"),
        (tensor(FLOATS, (1,), (1,), offset="0"), "gives a the shape .* at '0'"),
        (tensor(FLOATS, (1,) * 65, (1,) * 65), "shape or strides are not a list of sizes"),
        (tensor(FLOATS, None, (1,)), "shape or strides are not a list of sizes: None"),
        (tensor(FLOATS, (2,), (1,), more=({}, 5)), "has a damaged data.pkl"),
        (tensor(storage("FloatStorage", "0", HUGE), (2,), (1,)), "should be 4398046511104"),
        (tensor(storage("FloatStorage", "0", 2.0), (2,), (1,)), r"a storage '0' of 2\.0 values"),
        (tensor(storage("FloatStorage", 0, 2), (2,), (1,)), "a storage 0 of 2 values"),
        (Raw(b"\x8e" + struct.pack("<Q", HUGE)), "has a damaged data.pkl"),
        (Raw(b"\x8b\xff\xff\xff\x7f"), "has a damaged data.pkl"),
        (Raw(b"\x8a\xff" + b"\xff" * 254 + b"\x7f"), "holds an integer of 2039 bits"),
        (Raw(b"L" + b"9" * 5000 + b"L\n"), "has a damaged data.pkl"),
        (Raw(b"\x82\x01"), "uses an opcode that PyTorch does not write"),
        (Raw(b"K\x01)R"), "has a damaged data.pkl .*cannot be called"),
        (Raw(b"ctorch\nSize\n(K\x01tR"), "shape or strides are not a list of sizes: 1"),
    ],
)
def test_invalid_numbers_are_refused_before_reading(tmp_path, value, message):
    path = archive(tmp_path, {"a": value})
    with pytest.raises(ValueError, match=rf"weights\.pth .*{message}") as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()


def test_strides_of_length_1_axes_are_ignored(tmp_path):
    path = archive(tmp_path, {"a": tensor(FLOATS, (1, 2), (1 << 61, 1))})
    assert_same(read_tensors(path), {"a": np.ones((1, 2), np.float32)})


def test_oversized_storage_is_not_read(tmp_path):
    large = np.zeros(1 << 24, np.uint8)
    value = {"a": tensor(storage("FloatStorage", "0", 2), (2,), (1,))}
    path = archive(tmp_path, value, {"0": large})
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with pytest.raises(ValueError, match="16777216 bytes in weights/data/0, which should be 8"):
        read_tensors(path)
    assert tracemalloc.get_traced_memory()[1] - before < 4 << 20


def packed(path, contents):
    """A zip with compressed entries."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in contents.items():
            file.writestr(f"weights/{name}", content)
    return path


def test_decompressed_size_is_bounded(tmp_path):
    pickled = b"\x80\x02" + torch_files.encode({"a": ONES}) + b"."
    numbers = np.random.default_rng(0).normal(size=2).astype(np.float32).tobytes()
    path = packed(tmp_path / "a.pth", {"data.pkl": pickled, "data/0": numbers})
    np.testing.assert_array_equal(read_tensors(path)["a"], np.frombuffer(numbers, np.float32))
    count = 1 << 23
    value = {"a": tensor(storage("FloatStorage", "0", count), (count,), (1,))}
    bomb = b"\x80\x02" + torch_files.encode(value) + b"."
    packed(path, {"data.pkl": bomb, "data/0": bytes(4 * count)})
    with pytest.raises(ValueError, match=r"a\.pth declares 33554432 bytes in 'weights/data/0'"):
        read_tensors(path)
    packed(path, {"data.pkl": b"\x80\x02" + b"]" * (1 << 22) + b".", "data/0": numbers})
    with pytest.raises(ValueError, match=r"a\.pth declares 4194307 bytes in 'weights/data\.pkl'"):
        read_tensors(path)


def test_code_beside_tensors_may_be_larger_than_the_file(tmp_path):
    # TorchScript compresses its code, so for a small module code is most of the content.
    pickled = b"\x80\x02" + torch_files.encode({"a": ONES}) + b"."
    code = b"def forward(self, x):\n" + b"  x = torch.add(x, x)\n" * 2000
    numbers = np.ones(2, np.float32).tobytes()
    contents = {"data.pkl": pickled, "data/0": numbers, "code/net.py": code}
    path = packed(tmp_path / "a.pth", contents)
    assert path.stat().st_size < len(code)
    np.testing.assert_array_equal(read_tensors(path)["a"], [1, 1])


def test_entry_inflating_beyond_its_declared_size_is_cut_off(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", bytes(1 << 24))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", 1 << 24), struct.pack("<I", 100)))
    tracemalloc.reset_peak()
    with pytest.raises(ValueError, match=r"a\.npz is damaged or cut off \(Bad CRC-32"):
        read_npz(path, ["x"])
    assert tracemalloc.get_traced_memory()[1] < 4 << 20


def test_duplicate_or_dangling_zip_entries_are_refused(tmp_path):
    path = archive(tmp_path, {"a": ONES})
    raw = path.read_bytes()
    last = raw.rindex(b"weights/data/0")
    path.write_bytes(raw[:last] + b"weights/data/1" + raw[last + 14 :])  # only in the directory
    with pytest.raises(ValueError, match=r"weights\.pth (lacks weights/data/0|is damaged)"):
        read_tensors(path)
    archive(tmp_path, {"a": ONES}, extra={"byteorder": b"big"})
    raw = path.read_bytes()
    last = raw.rindex(b"weights/byteorder")
    path.write_bytes(raw[:last] + b"weights/byteordex" + raw[last + 17 :])
    with pytest.raises(ValueError, match=r"weights\.pth is damaged .*header"):
        read_tensors(path)
    archive(tmp_path, {"a": ONES})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("weights/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="two entries with the same name"):
        read_tensors(path)


def test_shared_script_modules_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_archive, "MOST_VISITS", 1000)
    opcodes = torch_files.encode(New(Global("__torch__", "Net"), {"weight": ONES})) + b"q\x00"
    for i in range(40):  # each module holds the previous one twice: 2^40 paths
        opcodes += b"c__torch__\nNet\n)\x81}(Vx\nh%cVy\nh%cubq%c" % (i, i, i + 1)
    path = archive(tmp_path, Raw(opcodes), extra={"constants.pkl": b""})
    with pytest.raises(ValueError, match=r"weights\.pth has modules that nest deeper than 64"):
        read_tensors(path)


# ----- safetensors -----


def write(path, header, numbers=bytes(8)):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + numbers)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_safetensors_float8_and_bfloat16_are_read(tmp_path):
    numbers = np.array([0.5, -2, 448], ml_dtypes.float8_e4m3fn)
    header = {"a": entry("F8_E4M3", (3,), (0, 3)), "b": entry("BF16", (1,), (3, 5))}
    path = write(tmp_path / "a.safetensors", header, numbers.tobytes() + b"\x80\x3f")
    assert_same(read_tensors(path), {"a": numbers, "b": np.array([1.0], ml_dtypes.bfloat16)})


ODD_HEADERS = [
    ({"a": entry("F4", (16,))}, "holds a with dtype F4, which is not one of"),
    ({"a": entry("F32", (3,))}, "invalid shape, data type, or offset"),
    ({"a": entry(shape=(-2,))}, "invalid value: integer `-2`"),
    ({"a": entry(shape=(2.0,))}, r"floating point `2\.0`"),
    ({"a": entry(shape=(True, 2))}, "boolean `true`"),
    ({"a": entry(shape=(1,) * 65 + (2,))}, "found 66"),
    ({"a": entry(offsets=(8, 0))}, "invalid offset for tensor `a`"),
    ({"a": entry(), "b": entry(shape=(0, 1 << 61, 4), offsets=(8, 8))}, "array is too big"),
    ({"a": entry(), "b": entry()}, "invalid offset"),
    ({"a": entry(shape=(1,), offsets=(4, 8))}, "invalid offset for tensor `a`"),
    ({"a": entry(shape=(1,), offsets=(0, 4))}, "file not fully covered"),
    ({"a": [1]}, "invalid type: integer `1`"),
    ({"a": ["F32", [2], [0, 8]]}, "list indices must be"),
    ([1], "invalid type: sequence"),
    ({"__metadata__": {"a": 3}}, "expected a string"),
    (
        json.dumps({"a": entry(), "b": entry()}).replace("b", "a").encode(),
        "has the key 'a' twice",
    ),
    (b"[" * 9000, "invalid type: sequence"),
    (b"\xff", "invalid UTF-8"),
    (b'{"a\\ud800": 1}', "unexpected end of hex escape"),
    ({"\x1b[31m" * 1000: [1]}, "invalid type: integer `1`"),
]


@pytest.mark.parametrize(("header", "message"), ODD_HEADERS)
def test_invalid_safetensors_header_is_reported(tmp_path, header, message):
    path = write(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=rf"a\.safetensors .*{message}") as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 2000 and str(caught.value).isprintable()


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_header_longer_than_its_file_is_not_read(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut off"):
        read_tensors(path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": INDEX}}, "which holds no tensors"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', which is not in its own"),
        ({"weight_map": {"a": ".."}}, "names '..', which is not in"),
        ({"weight_map": {"a": "c:x"}}, "names 'c:x', which is not in"),
        ({"weight_map": {"a": "x" * 300}}, "which is not in its own folder"),
        ({"weight_map": {"a": "\x00"}}, "which is not in its own folder"),
        ({"weight_map": {"a": "\ud800"}}, "which is not in its own folder"),
        ({"weight_map": {"a": 3}}, "it maps 'a' to the file 3"),
        ({"weight_map": {"a": ["x"]}}, "it maps 'a' to the file"),
        ({"weight_map": []}, "is not an index of shards"),
        ([], "is not an index of shards"),
        ({"weight_map": {"a": "loop.safetensors"}}, r"loop\.safetensors, missing"),
        ({"weight_map": {str(i): f"{i}.safetensors" for i in range(999)}}, r"missing; fetch"),
    ],
)
def test_shard_index_cannot_point_elsewhere(tmp_path, content, message):
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_tensors(tmp_path)
    assert INDEX in str(caught.value) and len(str(caught.value)) < 2000


def test_huge_number_of_missing_shards_is_not_enumerated(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "m_999999999999.pth")
    with pytest.raises(FileNotFoundError, match=r"are missing: m_1\.pth, .*m_5\.pth, \.\.\.;"):
        read_tensors(tmp_path / "m.pth")


# ----- text that messages quote -----


def test_quoted_values_are_short_and_printable():
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]
    values = [doubled, "x" * 10_000, {str(i): i for i in range(9999)}, "\ud800\x1b", 10**4000]
    for value in values:
        assert len(brief(value)) <= 200 and brief(value).isprintable()
    assert brief({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    assert plain("a\nb\x1b[31m") == "a?b?[31m"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "has the key 'a' twice in one object"),
        (b'{"a": 1', r"is not JSON \(Expecting .*line 1 column 8"),
        (b"\xff\xfe", "is not UTF-8 .* at byte 0"),
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 5000, "is not JSON"),
    ],
)
def test_invalid_json_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_json(content)


def test_json_may_have_a_bom_and_infinities():
    assert parse_json(b'\xef\xbb\xbf{"a": [1, null]}') == {"a": [1, None]}
    assert parse_json(b"[Infinity, -Infinity]") == [float("inf"), -float("inf")]


def test_npz_files_are_read_as_numpy_writes_them(tmp_path):
    arrays = {
        "turned": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "text": np.array("f00d"),
        "swapped": np.arange(3, dtype=">f4"),
        "none": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
        "point": np.array(2.5),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    assert_same(read_npz(tmp_path / "a.npz", arrays), arrays)
    mapped = read_npz(tmp_path / "a.npz", arrays, mapped=True)
    assert_same(mapped, arrays)
    assert not any(array.flags.writeable for array in mapped.values())
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    assert_same(read_npz(tmp_path / "packed.npz", arrays, mapped=True), arrays)
    with pytest.raises(ValueError, match=r"a\.npz lacks 'other\.npy'"):
        read_npz(tmp_path / "a.npz", ["other"])
    np.savez(tmp_path / "a.npz", odd=np.array([Call(1, ())], object))
    with pytest.raises(ValueError, match=r"a\.npz holds 'odd' in a form that numpy does not"):
        read_npz(tmp_path / "a.npz", ["odd"])


@pytest.mark.parametrize("mapped", [False, True])
def test_damaged_npz_bytes_are_detected_or_harmless(tmp_path, mapped):
    arrays, path = {"x": np.arange(40, dtype=np.int32)}, tmp_path / "a.npz"
    np.savez(path, **arrays)
    content = path.read_bytes()
    damaged = [content[:size] for size in range(0, len(content), 7)]
    damaged += [
        content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        for place in range(0, len(content), 3)
    ]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert_same(read_npz(path, ["x"], mapped=mapped), arrays)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > len(damaged) / 2


def test_text_with_invalid_characters_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", text=np.array("abcd"))
    text = np.array("abcd").tobytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        content = file.read("text.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("text.npy", content.replace(text, b"\xff" * len(text)))
    with pytest.raises(ValueError, match=re.escape("a.npz holds 'text' with characters")):
        read_npz(tmp_path / "a.npz", ["text"])
