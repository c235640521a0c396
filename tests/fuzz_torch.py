"""PyTorch's archives: samples, our reading, and that of Python's unpickler with nothing
imported."""

import contextlib
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import mutations
import numpy as np
import torch_files
from fuzz_format import Format
from torch_files import Call, Global, New

from common_jax.weights import read_plain, read_tensors

Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng(0)
TENSORS: Tensors = {
    "weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "half": RNG.normal(size=(5,)).astype(np.float16),
    "brain": RNG.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False, True]),
    "none": np.zeros((0, 3), np.float32),
}


def _torch_samples() -> tuple[bytes, ...]:
    def written(value, storages, extra=None) -> bytes:
        files = {"data.pkl": b"\x80\x02" + torch_files.encode(value) + b".", "byteorder": b"little"}
        files |= {f"data/{key}": np.asarray(array).tobytes() for key, array in storages.items()}
        files |= extra or {}
        return mutations.write_zip((f"archive/{name}", content) for name, content in files.items())

    storages: dict[str, Any] = {}
    state = torch_files.state_dict(TENSORS, storages)
    held = torch_files.storage("FloatStorage", "0", 12)
    views = {"turned": torch_files.tensor(held, (3, 4), (1, 3)), **state}
    spread = {"spread": torch_files.tensor(held, (5, 2), (0, 1), offset=3), **state}
    args = New(Global("argparse", "Namespace"), {"lr": 0.1, "epochs": 3})
    training = {"model": state, "args": args, "epoch": 4, "best": [1.0, 2], "optimizer": {0: state}}
    one = torch_files.tensor(held, (12,), (1,))
    net = New(Global("__torch__", "Net"), {"weight": one, "mask": one, "training": False})
    code = b'class Net(Module):\n  __parameters__ = ["weight", ]\n  __buffers__ = []\n'
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (one, True, {}))
    return (
        *(written(value, storages) for value in (state, views, spread, training)),
        written({"a": parameter}, storages),
        written(net, storages, {"constants.pkl": b"", "code/__torch__.py": code}),
    )


def _read_torch(path: Path) -> tuple[Tensors, dict[str, Any]]:
    tensors = read_tensors(path)
    return tensors, read_plain(path)


class _Any:
    """Accepts everything and does nothing."""

    def __new__(cls, *arguments, **names):
        return object.__new__(cls)

    def __init__(self, *arguments, **names):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = add = update = append


class _Pickle(pickle.Unpickler):
    """Python's unpickler, with nothing imported."""

    def find_class(self, module, name):
        if name.startswith("_rebuild_tensor"):
            return lambda *arguments: ("tensor", *arguments)
        if name.startswith(("_rebuild_parameter", "build_", "restore_type_tag")):
            return lambda value, *others: value
        if name == "OrderedDict":
            return dict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in ("torch", "torch.storage"):
            kinds = {kind: dtype for dtype, kind in torch_files.KINDS.items()}
            if name in kinds:
                return kinds[name]
            with contextlib.suppress(TypeError):
                return np.dtype(getattr(ml_dtypes, name, name))
        return type(name, (_Any,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid):
        return pid


def _plain_torch(path: Path, content: bytes) -> tuple[Tensors, dict[str, Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        root = name.removesuffix("data.pkl")
        top = _Pickle(io.BytesIO(archive.read(name)), encoding="utf-8").load()

        def array(tensor) -> np.ndarray:
            _, (_, dtype, key, _, _), offset, shape, strides, *_ = tensor
            numbers = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
            steps = [step * numbers.itemsize for step in strides]
            if 0 in shape:
                return np.empty(shape, dtype)
            return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps).copy()

        def is_tensor(value) -> bool:
            return isinstance(value, tuple) and value[:1] == ("tensor",)

        if isinstance(top, _Any):  # TorchScript with one module
            code = f"{root}code/__torch__.py"
            declared = archive.read(code) if code in archive.namelist() else b""
            if not re.search(rb"Net.*\n  __parameters__ = \[.*\]\n  __buffers__ = \[", declared):
                declared = b'"weight" "mask"'  # of an earlier version, which does not say
            entries = {k: v for k, v in top.state.items() if f'"{k}"'.encode() in declared}
            return {k: array(v) for k, v in entries.items() if is_tensor(v)}, {}
        inner = next(
            (top[key] for key in ("model", "state_dict") if isinstance(top.get(key), dict)), top
        )
        tensors = {k.removeprefix("module."): array(v) for k, v in inner.items()}

    def is_plain(value) -> bool:
        if isinstance(value, list | tuple) and not is_tensor(value):
            return all(map(is_plain, value))
        return isinstance(value, bool | int | float | str)

    return tensors, {k: v for k, v in top.items() if isinstance(k, str) and is_plain(v)}


def torch_archives() -> Format:
    """State dicts, a training checkpoint and TorchScript."""
    return Format(
        "PyTorch archive",
        "weights.pth",
        _torch_samples(),
        (
            *[mutations.zip_entries(mutations.pickled, only="data.pkl")] * 4,
            *(mutations.zip_entries(), mutations.zip_fields),
        ),
        _read_torch,
        _plain_torch,
        checked=True,
    )
