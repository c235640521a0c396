"""Reads safetensors files, after the library has checked their header, and writes them.

The data are read here, since the library lacks numpy types for some dtypes of fewer than 16 bits,
and written here, since it would copy all of them first.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from common_jax.untrusted import RefusedError, parse_json, plain

# In the library's order, from narrow to wide.
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "C64": np.complex64,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the same bytes as the library would, but one tensor at a time. Raises ValueError for a
    dtype that the format lacks."""
    for name, x in tensors.items():
        if x.dtype not in NAMES:
            raise ValueError(
                f"{name} is {x.dtype.str}, which safetensors lacks; convert it to one of "
                f"{', '.join(DTYPES)}"
            )
    # Hugging Face's loader requires "format" in the metadata.
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # The widest dtypes first, so that all data are aligned.
    kinds = [*reversed(NAMES)]
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))
    for name in order:
        x, begin = tensors[name], end
        end += x.nbytes
        entry = {"dtype": NAMES[x.dtype], "shape": [*x.shape], "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            # As bytes, since some dtypes cannot be written directly.
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8))


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a file's tensors by name, in the order of the header.

    Raises:
      ValueError: naming the file, if it is damaged, truncated, or has a dtype that numpy lacks.
      OSError: if it cannot be read.
    """
    try:
        with safetensors.safe_open(path, "numpy"):  # checks that tensors tile the file exactly
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                dtype, (begin, end) = DTYPES.get(entry["dtype"]), entry["data_offsets"]
                if dtype is None:
                    raise RefusedError(
                        f"holds {plain(name)} with dtype {plain(entry['dtype'])}, which is not "
                        f"one of {', '.join(DTYPES)}; save it in one of these"
                    )
                raw = bytearray(end - begin)
                file.seek(8 + length + begin)
                file.readinto(raw)
                tensors[name] = np.frombuffer(raw, dtype).reshape(entry["shape"])
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None
    # The library accepts some odd headers, and numpy does not accept every shape.
    except (safetensors.SafetensorError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or cut off ({plain(str(error))}); copy or download it again"
        ) from None
    return tensors
