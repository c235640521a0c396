"""PyTorch's zip archives written without PyTorch, read by our reader and, if installed, by
PyTorch."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
from same import assert_same

from common_jax.weights import read_plain, read_tensors, write_torch

ARRAYS = {
    "single": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(4, np.float16),
    "brain": np.ones((3, 1), ml_dtypes.bfloat16),
    "double": np.linspace(0, 1, 8).reshape(2, 2, 2),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "none": np.zeros((0, 3), np.float32),
}
SHARED = np.arange(6, dtype=np.float32).reshape(2, 3)
CHECKPOINT = {
    "model": {**ARRAYS, "turned": SHARED.T, "first": SHARED, "again": SHARED},
    "model_stages": [{"norm.weight": SHARED}],
    "model_name": "vit_base_patch16_224",
    "block_index": 2,
    "divided_depths": (3, 3),
    "epoch": 1 << 40,
    "lr": 0.5,
    "scaler": None,
    "done": True,
}


def test_written_torch_file_is_read_back(tmp_path):
    path = tmp_path / "weights.pth"
    write_torch(path, CHECKPOINT)
    assert_same(read_tensors(path), CHECKPOINT["model"])
    plain = {"model_name", "block_index", "divided_depths", "epoch", "lr", "done"}
    assert read_plain(path) == {name: CHECKPOINT[name] for name in plain}
    write_torch(path, CHECKPOINT)  # and once more
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"weights\.pth exists and holds something else"):
        write_torch(path, {"model": ARRAYS})
    assert path.read_bytes() == before
    write_torch(path, {"model": ARRAYS}, replace=True)
    assert_same(read_tensors(path), ARRAYS)
    with pytest.raises(TypeError, match="of type set cannot be"):
        write_torch(path, {"model": {1}})
    with pytest.raises(TypeError, match="array is uint32, and"):
        write_torch(path, {"a": np.ones(2, np.uint32)})
    with pytest.raises(ValueError, match=r"weights\.npz must end in one of \.bin"):
        write_torch(tmp_path / "weights.npz", ARRAYS)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(read_tensors(path), ARRAYS)
    assert read_plain(tmp_path / "a.safetensors") == {}


def test_storages_are_aligned_for_mapping(tmp_path):
    write_torch(tmp_path / "a.pth", ARRAYS)
    raw = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        for entry in archive.infolist():
            header = raw[entry.header_offset :][:30]
            lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
            start = entry.header_offset + 30 + sum(lengths)
            assert start % 64 == 0 and raw[start:].startswith(archive.read(entry))


def test_torch_loads_written_files(tmp_path):
    torch = pytest.importorskip("torch", reason="torch, which reads the file, is not installed")
    write_torch(tmp_path / "weights.pth", CHECKPOINT)
    for mapped in (False, True):
        found = torch.load(tmp_path / "weights.pth", weights_only=True, mmap=mapped)
        assert list(found) == list(CHECKPOINT)
        for name in read_plain(tmp_path / "weights.pth"):
            assert found[name] == CHECKPOINT[name]
        assert found["model"].keys() == CHECKPOINT["model"].keys()
        for name, want in CHECKPOINT["model"].items():
            assert str(found["model"][name].dtype) == f"torch.{want.dtype}", name
            got = found["model"][name].double().numpy()
            np.testing.assert_array_equal(got, want.astype(np.float64), err_msg=name)
        tied = [found["model"]["first"], found["model"]["again"]]
        tied += found["model_stages"][0].values()
        assert len({tensor.data_ptr() for tensor in tied}) == 1
