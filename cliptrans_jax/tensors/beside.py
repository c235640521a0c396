"""The JSON files beside published weights, which say what no tensor shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliptrans_jax.tensors import open_clip
from cliptrans_jax.tensors.config_json import CONFIG
from common_jax.weights import weights_file
from common_jax.weights.files import FOLDER_FILES
from common_jax.workdir import read_json

PREPROCESSOR = "preprocessor_config.json"
Beside = Mapping[str, Mapping[str, Any]]  # a file's name -> its content


def read_beside(path: Path) -> Beside:
    """The JSON files about the weights in a folder, or in a file of it.

    OpenCLIP's weights lie beside Hugging Face's in one folder, each with files of its own; a file
    with a name of its own may have been put anywhere, and only OpenCLIP's file is taken to be
    about it.

    Raises:
      ValueError: for a file that holds no JSON object.
    """
    file = weights_file(path) if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    if file is not None and file.name.startswith("open_clip"):
        names = (open_clip.FILE,)
    elif path.is_dir() or path.name in FOLDER_FILES:
        names = (CONFIG, PREPROCESSOR, open_clip.FILE)
    else:
        names = (open_clip.FILE,)
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}


def picture_numbers(beside: Beside) -> tuple[str, Any, Any]:
    """(file, mean, std) by which pictures were normalised, as a file says it; ("", None, None)
    where none does."""
    if PREPROCESSOR in beside:
        content, keys = beside[PREPROCESSOR], ("image_mean", "image_std")
        return PREPROCESSOR, *(content.get(key) for key in keys)
    content = beside.get(open_clip.FILE, {}).get("preprocess_cfg")
    if isinstance(content, dict):
        return open_clip.FILE, content.get("mean"), content.get("std")
    return "", None, None
