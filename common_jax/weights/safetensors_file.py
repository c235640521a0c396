"""Reads safetensors files, whose header the library checks against the file.

The numbers are read here, since the library has no numpy types for all of fewer than 16 bits.
"""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from common_jax.untrusted import RefusedError, parse_json, plain

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in the order of the header.

    Raises:
      ValueError: naming the file, if it is damaged, truncated, or has a dtype that numpy lacks.
      OSError: if it cannot be read.
    """
    try:
        with safetensors.safe_open(path, "numpy"):  # tensors fill the file, without gap or overlap
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
                        f"holds {plain(name)} in the type {plain(entry['dtype'])}, which is not "
                        f"read, only {', '.join(DTYPES)}; save it in one of these"
                    )
                raw = bytearray(end - begin)
                file.seek(8 + length + begin)
                file.readinto(raw)
                tensors[name] = np.frombuffer(raw, dtype).reshape(entry["shape"])
    except RefusedError as refused:
        raise ValueError(f"{path} {refused}") from None
    # The library takes a few forms of entries, and numpy not every shape.
    except (safetensors.SafetensorError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or cut off ({plain(str(error))}); copy or download it again"
        ) from None
    return tensors
