"""The JSON files beside published weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from common_jax.weights.files import FOLDER_FILES, weights_file
from common_jax.workdir import read_json


def read_beside(path: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The JSON files of these names beside the weights in a folder, or beside a file of one; none
    for a file of any other name, whose folder may hold anything.

    Raises:
      ValueError: for a file that holds no JSON object.
    """
    if path.is_dir() and weights_file(path):
        folder = path
    elif path.name in FOLDER_FILES:
        folder = path.parent
    else:
        return {}
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}
