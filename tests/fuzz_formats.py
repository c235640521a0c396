"""The formats of files that strangers give us: samples of each, how they are forged, how we read
them, and a simple independent reading that says whether what we read is right."""

import contextlib
import dataclasses
import io
import json
import logging
import math
import pickle
import random
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mutations
import numpy as np
import safetensors
import safetensors.numpy
import torch_files
from mutations import Mutate
from PIL import Image
from torch_files import Call, Global, New

from common_jax.tensors import read_plain, read_tensors
from common_jax.tensors.safetensors_file import DTYPES

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


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      name: in the table.
      file: its name on disk.
      samples: whole files of it.
      edits: forgeries that know its structure, and give whatever checksums it has.
      read: our reading of a path; ValueError and OSError are documented.
      plain: an independent reading, of the path and the bytes in it; raises where it cannot.
      checked: whether checksums cover the data, so that bytes changed without them must not show.
      prepare: writes what must lie beside the file into a folder.
      agree: whether what we read is what an independent reading gives, or the sample.
    """

    name: str
    file: str
    samples: tuple[bytes, ...]
    edits: tuple[Mutate, ...]
    read: Callable[[Path], Any]
    plain: Callable[[Path, bytes], Any]
    checked: bool
    prepare: Callable[[Path], None] = lambda folder: None
    agree: Callable[[Any, Any], bool] = lambda found, plain: same(found, plain)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in content and type, NaN with NaN."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


# ----- PyTorch -----


def _torch_samples() -> tuple[bytes, ...]:
    def written(value, storages, extra=None) -> bytes:
        file = io.BytesIO()
        files = {"data.pkl": b"\x80\x02" + torch_files.encode(value) + b".", "byteorder": b"little"}
        files |= {f"data/{key}": np.asarray(array).tobytes() for key, array in storages.items()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in (files | (extra or {})).items():
                archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        return file.getvalue()

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
    """Takes everything and does nothing."""

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
    """Python's own, with nothing imported."""

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

        if isinstance(top, _Any):  # TorchScript, of one module
            declared = (
                archive.read(f"{root}code/__torch__.py")
                if "code" in str(archive.namelist())
                else b'"weight" "mask"'
            )
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


# ----- safetensors -----


def _safetensors_samples() -> tuple[bytes, ...]:
    arrays = {name: np.ascontiguousarray(x) for name, x in TENSORS.items()}
    eight = np.arange(6, dtype=np.uint8).tobytes()
    header = {"a": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}}
    header["b"] = {"dtype": "F8_E5M2", "shape": [6], "data_offsets": [6, 12]}
    return (
        safetensors.numpy.save(arrays, metadata={"format": "pt"}),
        safetensors.numpy.save({"a": arrays["weight"]}),
        _with_header(json.dumps(header).encode(), eight + eight),
    )


def _with_header(header: bytes, numbers: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def _header(rng: random.Random, data: bytes) -> bytes:
    """The header changed, and its length with it."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + size], data[8 + size :]
    change = rng.choice((mutations.json_text, mutations.json_text, mutations.digits))
    return _with_header(change(rng, header), rng.choice((numbers, numbers, numbers + bytes(4))))


def _plain_safetensors(path: Path, content: bytes) -> Tensors:
    return {
        name.removeprefix("module."): np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(
            x["shape"]
        )
        for name, x in safetensors.deserialize(content)
    }


# ----- an index of shards -----

SHARDS = {"one.safetensors": ("weight", "half"), "two.safetensors": ("brain", "count")}
INDEX = "model.safetensors.index.json"


def _write_shards(folder: Path) -> None:
    for file, names in SHARDS.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in names}, folder / file)
    (folder / "loop.safetensors").unlink(missing_ok=True)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)


def _names(rng: random.Random, data: bytes) -> bytes:
    """An index that names other files."""
    try:
        index = json.loads(data)
        tensors = [*index["weight_map"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return mutations.flip(rng, data)
    files = [INDEX, "loop.safetensors", "folder.safetensors", "three.safetensors", *SHARDS]
    files += ["../one.safetensors", "/etc/passwd", "", ".", "a\x00", "a\n", "\ud800", "x" * 300]
    index["weight_map"] = {name: rng.choice(tuple(SHARDS)) for name in tensors}
    for name in tensors[: rng.randrange(4)]:
        index["weight_map"][name] = rng.choice(files)
    return json.dumps(index).encode()


def _plain_index(path: Path, content: bytes) -> Tensors:
    where = json.loads(content.decode("utf-8-sig"))["weight_map"]
    found: Tensors = {}
    for file in set(where.values()):
        found |= safetensors.numpy.load_file(path.parent / file)
    assert set(where) <= set(found)
    return found


# ----- caches, which are made again where they are broken -----

FEATURES = RNG.normal(size=(6, 4)).astype(np.float32)
PRINT = "f00d"


@contextlib.contextmanager
def _logged():
    """The messages of the log, from warnings up, and those below."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _require_one_warning(records: list[logging.LogRecord], again: str) -> None:
    """Raises what the one warning of a broken file says, as ValueError."""
    warnings = [r.getMessage() for r in records if r.levelno >= logging.WARNING]
    other = [r.getMessage() for r in records if "was made from other" in r.getMessage()]
    if len(warnings) + len(other) != 1:
        raise AssertionError(f"{again} with {len(warnings)} warnings: {warnings}")
    raise ValueError(*warnings, *other)


def _read_features(path: Path) -> np.ndarray:
    from cliptrans_jax.features import cached

    calls = []
    with _logged() as records:
        found = cached(path.parent, path.stem, PRINT, lambda: calls.append(1) or FEATURES)
    if calls:
        assert same(found, FEATURES)
        _require_one_warning(records, "computed again")
    return found


def _npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _plain_features(path: Path, content: bytes) -> np.ndarray:
    with np.load(io.BytesIO(content)) as arrays:
        assert str(arrays["fingerprint"]) == PRINT
        return np.ascontiguousarray(arrays["features"])


def _prior_settings() -> dict[str, Any]:
    from m2mkd_jax.models.nac.graphs import PriorConfig

    config = PriorConfig(graph="barabasi_albert", steps=2)
    return {"config": config, "nodes": 8, "signature_width": 4, "seed": 0}


def _prepare_prior(cache: Path | None) -> dict[str, Any]:
    from m2mkd_jax.models.nac.priors import prepare_prior

    return dataclasses.asdict(prepare_prior(**_prior_settings(), cache=cache))


def _prior_sample() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _prepare_prior(Path(folder))
        return (Path(folder) / "prior.npz").read_bytes()


def _read_prior(path: Path) -> dict[str, Any]:
    before = path.read_bytes()
    with _logged() as records:
        found = _prepare_prior(path.parent)
    if path.read_bytes() != before:
        assert same(found, _prepare_prior(None))
        warned = any(record.levelno >= logging.WARNING for record in records)
        if not warned:  # of other settings
            raise ValueError(f"{path} is of other settings")
        _require_one_warning(records, "made again")
    return found


def _plain_prior(path: Path, content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as arrays:
        values = {name: arrays[name] for name in arrays if name != "fingerprint"}
    names = _prepare_prior(None)
    return {k: values[k] if values[k].ndim else values[k].item() for k in names}


# ----- pictures -----


def _pictures() -> tuple[bytes, ...]:
    pixels = (np.arange(16 * 12 * 3).reshape(16, 12, 3) * 7 % 256).astype(np.uint8)
    files = []
    for kind, mode in (("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("BMP", "RGB")):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return (*files, file.getvalue())


def _other_kind(rng: random.Random, data: bytes) -> bytes:
    """Another format than the name says, some of which start a program where they are opened."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    kinds = (
        eps,
        b"GIF89a" + b"\xff" * 20,
        b"II*\x00\x08\x00\x00\x00" + data,
        b"P6 60000 60000 255 ",
    )
    return rng.choice((*kinds, b"<svg/>", b"P5 99999999 9999999 255\n", b"\x00\x00\x01\x00" + data))


def _png_size(rng: random.Random, data: bytes) -> bytes:
    """Another size in a PNG's header, with its checksum."""
    import zlib

    if not data.startswith(b"\x89PNG"):
        return mutations.extreme(rng, data[:64]) + data[64:]
    sizes = b"".join(
        (rng.choice((0, 1, 16, 40_000, 1 << 31)) % (1 << 32)).to_bytes(4) for _ in "ij"
    )
    head = data[12:16] + rng.choice((sizes, data[16:24])) + bytes(rng.choice((data[24:29],)))
    if rng.random() < 0.3:
        head = head[:12] + bytes((rng.choice((1, 2, 8, 16)), rng.randrange(8), 0, 0, 0))
    return data[:12] + head + zlib.crc32(head).to_bytes(4) + data[33:]


def _read_picture(path: Path) -> np.ndarray:
    """Both systems' reading of an image file."""
    from cliptrans_jax.data.corpus import FolderImages
    from m2mkd_jax.data.folders import DirectoryFiles, FolderSource

    files = DirectoryFiles(path.parent, (path.name,))
    source = FolderSource(files, np.zeros(1, np.int32), label_names=("a",), channels=3)
    found = source[0]["image"]
    other = FolderImages(path.parent, (path.name,))[0]
    assert same(np.ascontiguousarray(found), np.ascontiguousarray(other))
    return np.ascontiguousarray(found)


def _plain_picture(path: Path, content: bytes) -> np.ndarray:
    formats = ("BMP", "JPEG", "PNG", "WEBP")
    with Image.open(io.BytesIO(content), formats=formats) as image:
        if image.mode in ("I", "F", "I;16", "I;16B"):  # whose range is not 0 to 255
            return _read_picture(path)
        return np.asarray(image.convert("RGB"))


def _image_zip() -> bytes:
    names = ("train/cat/a.jpg", "train/cat/b.png", "train/dog/c.png")
    return mutations.write_zip(zip(names, _pictures(), strict=False))


def _read_image_zip(path: Path) -> dict[str, np.ndarray]:
    from m2mkd_jax.data.folders import FolderSource, find_folder

    found = find_folder(str(path), "train")
    source = FolderSource(found.files, found.labels, label_names=found.label_names, channels=3)
    names = found.files.names
    labels = [found.label_names[label] for label in found.labels]
    assert labels == [name.split("/")[1] for name in names]
    return {names[i]: np.ascontiguousarray(source[i]["image"]) for i in range(len(names))}


def _plain_image_zip(path: Path, content: bytes) -> dict[str, np.ndarray]:
    suffixes = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            name: _plain_picture(path, archive.read(name))
            for name in archive.namelist()
            if name.startswith("train/") and name.lower().endswith(suffixes)
        }


def _is_part(found: Any, whole: Any) -> bool:
    """Whether pictures are among others: a zip's list of its entries has no checksum, and one that
    it does not list is not there."""
    return all(name in whole and same(picture, whole[name]) for name, picture in found.items())


# ----- a run's own files -----

LINES = [
    {"step": 2, "epoch": 0.5, "train/loss": 1.25, "train/moe/load": [0.5, 0.25]},
    {"step": 4, "epoch": 1.0, "train/loss": float("nan"), "test/accuracy": 0.5},
    {"step": 6, "epoch": 1.5, "train/loss": 0.75},
]


def _metrics_sample() -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def _lines(rng: random.Random, data: bytes) -> bytes:
    """A line changed, lost, doubled or swapped."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = rng.choice((mutations.json_text, mutations.digits, mutations.flip))(
        rng, lines[place] or b"{}"
    )
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join(lines)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    from common_jax.metrics import read_metrics

    return read_metrics(path)


def _plain_metrics(path: Path, content: bytes) -> list[dict[str, Any]]:
    lines = content.split(b"\n")
    found = [json.loads(line.decode("utf-8-sig")) for line in lines[:-1]]
    try:
        last = json.loads(lines[-1].decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return found
    return [*found, last] if isinstance(last, dict) and type(last.get("step")) is int else found


def _config_sample() -> bytes:
    from tiny import tiny_config

    from common_jax.config import unfreeze

    config = unfreeze(tiny_config("distill")).to_dict()
    return json.dumps(config, indent=2).encode()


def _read_config(path: Path) -> Any:
    from common_jax.workdir import read_json

    return read_json(path)


def _plain_config(path: Path, content: bytes) -> Any:
    return json.loads(content.decode("utf-8-sig"))


_NPZ_EDITS = (
    mutations.zip_entries(mutations.npy),
    mutations.zip_entries(mutations.npy),
    mutations.zip_fields,
)
FORMATS: dict[str, Callable[[], Format]] = {
    "PyTorch archive": lambda: Format(
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
    ),
    "safetensors": lambda: Format(
        "safetensors",
        "model.safetensors",
        _safetensors_samples(),
        (_header,),
        read_tensors,
        _plain_safetensors,
        checked=False,
    ),
    "shard index": lambda: Format(
        "shard index",
        INDEX,
        (
            json.dumps(
                {"metadata": {}, "weight_map": {n: f for f, names in SHARDS.items() for n in names}}
            ).encode(),
        ),
        (mutations.json_text, _names),
        read_tensors,
        _plain_index,
        checked=False,
        prepare=_write_shards,
    ),
    "features npz": lambda: Format(
        "features npz",
        "train.npz",
        (_npz(features=FEATURES, fingerprint=np.array(PRINT)),),
        _NPZ_EDITS,
        _read_features,
        _plain_features,
        checked=True,
    ),
    "prior npz": lambda: Format(
        "prior npz",
        "prior.npz",
        (_prior_sample(),),
        _NPZ_EDITS,
        _read_prior,
        _plain_prior,
        checked=True,
    ),
    "image": lambda: Format(
        "image",
        "picture.jpg",
        _pictures(),
        (_other_kind, _png_size, _png_size),
        _read_picture,
        _plain_picture,
        checked=False,
    ),
    "image zip": lambda: Format(
        "image zip",
        "images.zip",
        (_image_zip(),),
        (mutations.zip_entries(), mutations.zip_entries(_png_size), mutations.zip_fields),
        _read_image_zip,
        _plain_image_zip,
        checked=True,
        agree=_is_part,
    ),
    "metrics.jsonl": lambda: Format(
        "metrics.jsonl",
        "metrics.jsonl",
        (_metrics_sample(),),
        (_lines, _lines),
        _read_metrics,
        _plain_metrics,
        checked=False,
    ),
    "config.json": lambda: Format(
        "config.json",
        "config.json",
        (_config_sample(),),
        (mutations.json_text,),
        _read_config,
        _plain_config,
        checked=False,
    ),
}


@contextlib.contextmanager
def limited(seconds: int):
    """Raises TimeoutError where the independent reading, which has no bounds, takes too long."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
