"""The JSON files beside published weights, which have settings that tensors do not show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliptrans_jax.tensors import open_clip
from cliptrans_jax.tensors.config_json import CONFIG
from common_jax.weights import weights_file
from common_jax.weights.beside import PROCESSORS
from common_jax.weights.files import FOLDER_FILES
from common_jax.workdir import read_json

Beside = Mapping[str, Mapping[str, Any]]  # name of a file -> its content


def read_beside(path: Path) -> Beside:
    """The JSON files that belong to the weights in a folder, or to a file of weights.

    A folder may contain weights of both OpenCLIP and Hugging Face, each with their own JSON files.
    Weights with other file names may be in any folder; for them, only OpenCLIP's JSON file is read.

    Raises:
      ValueError: if a file is not a JSON object.
    """
    file = weights_file(path) if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    if file is not None and file.name.startswith("open_clip"):
        names = (open_clip.FILE,)
    elif path.is_dir() or path.name in FOLDER_FILES:
        names = (CONFIG, *PROCESSORS, open_clip.FILE)
    else:
        names = (open_clip.FILE,)
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}
