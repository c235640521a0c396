"""The JSON files beside published weights."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common_jax.untrusted import brief
from common_jax.weights.files import FOLDER_FILES, weights_file
from common_jax.workdir import read_json

# Hugging Face's files with settings of images: its older library writes the first, newer ones the
# second, with the settings under IMAGES.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
IMAGES = "image_processor"


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


def image_processors(files: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The settings of images in the `PROCESSORS` among the files of a folder, by file name.

    Args:
      files: content by file name.
      where: the folder, for messages.

    Raises:
      ValueError: for settings that are not a dictionary.
    """
    flat, nested = PROCESSORS
    found = {flat: files[flat]} if flat in files else {}
    settings = files.get(nested, {}).get(IMAGES)
    if not isinstance(settings, dict | None):
        raise ValueError(f"{where}: {nested} says {IMAGES}={brief(settings)}, not a dictionary")
    return found | ({nested: settings} if settings else {})
