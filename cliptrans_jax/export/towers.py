"""Folders of towers that were trained here, for `transformers`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cliptrans_jax.towers import clip_names, mclip_names
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.table import tower_of
from cliptrans_jax.towers.tower import Pictures
from common_jax.weights import write_tensors
from common_jax.weights.table import Table, write

PROJECTION = "LinearTransformation."  # M-CLIP's last layer, which XLM-RoBERTa lacks


@dataclasses.dataclass(frozen=True)
class HubTower:
    """The form of a tower in `transformers`.

    Attributes:
      cls: class that loads its folder.
      config: sizes -> the content of config.json, apart from the class.
      table: sizes -> names of its tensors.
      prefix: of those names, which the class does not have.
      beside: prefix of the tensors that the class has no place for; they go into
        `projection.safetensors`.
    """

    cls: str
    config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    prefix: str = ""
    beside: str | None = None


def write_tower(folder: Path, params: Mapping[str, Any], config: Any) -> None:
    """Writes weights, config.json and, for pictures, preprocessor_config.json to a new folder.

    Args:
      folder: to make.
      params: of the tower, in numpy.
      config: its sizes, of a class in `HUB`.
    """
    tower = HUB[type(config)]
    tensors = {
        name.removeprefix(tower.prefix): np.asarray(x, np.float32)
        for name, x in write(tower.table(config), params).items()
    }
    beside = {
        name: tensors.pop(name)
        for name in list(tensors)
        if tower.beside is not None and name.startswith(tower.beside)
    }
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors)
    if beside:
        write_tensors(folder / "projection.safetensors", beside)
    content = {"architectures": [tower.cls], "dtype": "float32"} | tower.config(config)
    _write(folder / "config.json", content)
    if (pictures := tower_of(config).pictures) is not None:
        _write(folder / "preprocessor_config.json", _preprocessor(pictures, config.image))


def _mclip(config: MClipConfig) -> dict[str, Any]:
    return {
        "model_type": "xlm-roberta",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.types,
        "layer_norm_eps": config.eps,
        "pad_token_id": config.pad,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": config.activation,
    }


def _clip(config: ClipTextConfig | ClipVisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        "hidden_act": config.activation,
        "projection_dim": config.features,
        "attention_dropout": 0.0,
    }


def _clip_text(config: ClipTextConfig) -> dict[str, Any]:
    return _clip(config) | {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions,
        "bos_token_id": config.vocab - 2,
        "eos_token_id": config.vocab - 1,
    }


def _clip_vision(config: ClipVisionConfig) -> dict[str, Any]:
    return _clip(config) | {
        "model_type": "clip_vision_model",
        "image_size": config.image,
        "patch_size": config.patch,
    }


def _preprocessor(pictures: Pictures, side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": int(Image.Resampling[pictures.resampling]),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*pictures.mean],
        "image_std": [*pictures.std],
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


HUB: Mapping[type, HubTower] = {
    MClipConfig: HubTower(
        "XLMRobertaModel", _mclip, mclip_names.table, prefix="transformer.", beside=PROJECTION
    ),
    ClipTextConfig: HubTower("CLIPTextModelWithProjection", _clip_text, clip_names.text_table),
    ClipVisionConfig: HubTower(
        "CLIPVisionModelWithProjection", _clip_vision, clip_names.vision_table
    ),
}
