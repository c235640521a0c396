"""The transformer that an M-CLIP was made from, wherever its config.json lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliptrans_jax.convert_towers import MCLIP_BASES, mclip_config
from cliptrans_jax.tensors import beside
from cliptrans_jax.towers.mclip import MClipConfig
from common_jax.untrusted import brief
from common_jax.workdir import read_json


def config(hf: Mapping[str, Any], file: str) -> MClipConfig:
    """Sizes of an M-CLIP text tower.

    Args:
      hf: its config.json; `modelBase` may be a folder, as its makers had it, or one below that of
        `file`.
      file: the folder or the file of its weights.

    Raises:
      ValueError: as `mclip_config`, and for a `modelBase` that is not there.
    """
    name = hf.get("modelBase")
    if not isinstance(name, str) or name in MCLIP_BASES:
        return mclip_config(hf, None)
    path = Path(file)
    folder = path if path.is_dir() else path.parent
    for place in (folder / name, folder / name / beside.CONFIG):
        if place.suffix == ".json" and place.is_file():
            return mclip_config(hf, read_json(place))
    raise ValueError(
        f"modelBase={brief(name)} of M-CLIP's config.json is neither one of "
        f"{sorted(MCLIP_BASES)} nor a folder here with a config.json: say what the tower was made "
        "from with --config.sources.clip_text_base (`base` of pretrained.load), one of these names "
        "or a folder with the config.json of an XLM-RoBERTa"
    )
