"""The JSON files beside published weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from common_jax.weights.files import FOLDER_FILES, weights_file
from common_jax.workdir import read_json


def read_beside(path: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Reads the JSON files with these names beside a folder's weights, or beside a weights file
    with one of the usual names. Reads none beside any other file, whose folder may hold anything.

    Raises:
      ValueError: for a file that does not hold a JSON object.
    """
    if path.is_dir() and weights_file(path):
        folder = path
    elif path.name in FOLDER_FILES:
        folder = path.parent
    else:
        return {}
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}
