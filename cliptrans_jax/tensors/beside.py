"""What stands beside published weights: the JSON files that say what no tensor tells."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliptrans_jax.tensors import open_clip
from common_jax.tensors import weights_file
from common_jax.tensors.files import FOLDER_FILES

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
Beside = Mapping[str, Mapping[str, Any]]  # a file's name -> its content


def read_beside(path: Path) -> Beside:
    """The JSON files about the weights in a folder, or in a file of it.

    OpenCLIP's weights lie beside Hugging Face's in one folder, each with files of its own; a file
    with a name of its own may have been put anywhere, and only OpenCLIP's file is taken to be
    about it.

    Raises:
      ValueError: for a file that is no JSON.
    """
    file = weights_file(path) if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    if file is not None and file.name.startswith("open_clip"):
        names = (open_clip.FILE,)
    elif path.is_dir() or path.name in FOLDER_FILES:
        names = (CONFIG, PREPROCESSOR, open_clip.FILE)
    else:
        names = (open_clip.FILE,)
    return {name: read_about(folder / name) for name in names if (folder / name).is_file()}


def read_about(path: Path) -> Mapping[str, Any]:
    """The content of a JSON file that holds a dictionary.

    Raises:
      ValueError: for any other file, naming it.
      OSError: when it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, as its makers write it")
    return content


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
