"""Exports towers that were trained here as folders for `transformers`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cliptrans_jax.towers import clip_names, mclip_names, siglip_names
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig
from cliptrans_jax.towers.table import tower_of
from cliptrans_jax.towers.tower import Pictures
from common_jax.weights import write_tensors
from common_jax.weights.table import Table, write

PROJECTION = "LinearTransformation."  # M-CLIP's last layer, which XLM-RoBERTa lacks
# Code for the model card. `cls` is the class, `output` the field with the features.
MCLIP_USE = """Vectors of sentences:

```python
from safetensors.torch import load_file
from transformers import AutoTokenizer, {cls}

tokenizer = AutoTokenizer.from_pretrained("FOLDER/text_tower")
tower = {cls}.from_pretrained("FOLDER/text_tower", add_pooling_layer=False)
last = load_file("FOLDER/text_tower/projection.safetensors")
inputs = tokenizer(["SENTENCE"], return_tensors="pt", padding=True)
mask = inputs["attention_mask"][..., None]
mean = (tower(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
features = mean @ last["LinearTransformation.weight"].T + last["LinearTransformation.bias"]
```"""
# Padded up to the last position, whose state is the feature: SigLIP has no mask.
TEXT_USE = """Vectors of sentences:

```python
from transformers import AutoTokenizer, {cls}

tokenizer = AutoTokenizer.from_pretrained("FOLDER/text_tower")
tower = {cls}.from_pretrained("FOLDER/text_tower")
padding = {{"padding": "max_length", "max_length": tower.config.max_position_embeddings}}
inputs = tokenizer(["SENTENCE"], return_tensors="pt", **padding)
features = tower(inputs["input_ids"]).{output}
```"""
PICTURE_USE = """Vectors of pictures:

```python
from transformers import AutoImageProcessor, {cls}

processor = AutoImageProcessor.from_pretrained("FOLDER/image_tower")
tower = {cls}.from_pretrained("FOLDER/image_tower")
features = tower(**processor(picture, return_tensors="pt")).{output}
```"""


@dataclasses.dataclass(frozen=True)
class HubTower:
    """How a tower is represented in `transformers`.

    Attributes:
      cls: class that loads the folder.
      config: sizes -> the content of config.json, except for the class.
      table: sizes -> names of its tensors.
      use: Python code for the model card.
      prefix: prefix of those names that the class does not use.
      beside: prefix of the tensors that the class does not have; they go into
        `projection.safetensors`.
    """

    cls: str
    config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    use: str
    prefix: str = ""
    beside: str | None = None


def write_tower(folder: Path, params: Mapping[str, Any], config: Any) -> None:
    """Writes weights, config.json and, for pictures, preprocessor_config.json to a new folder.

    Args:
      folder: folder to create.
      params: parameters of the tower, in numpy.
      config: its sizes, an instance of a class in `HUB`.
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


def _siglip(config: SiglipTextConfig | SiglipVisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
    }


def _siglip_text(config: SiglipTextConfig) -> dict[str, Any]:
    return _siglip(config) | {
        "model_type": "siglip_text_model",
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions,
        "projection_size": config.features,
        "pad_token_id": config.pad,
    }


def _siglip_vision(config: SiglipVisionConfig) -> dict[str, Any]:
    return _siglip(config) | {
        "model_type": "siglip_vision_model",
        "image_size": config.image,
        "patch_size": config.patch,
    }


def _preprocessor(pictures: Pictures, side: int) -> dict[str, Any]:
    square = {"height": side, "width": side}
    if pictures.crops:
        shape = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": square,
        }
    else:
        shape = {"image_processor_type": "SiglipImageProcessor", "size": square}
    return shape | {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": int(Image.Resampling[pictures.resampling]),
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
        "XLMRobertaModel",
        _mclip,
        mclip_names.table,
        MCLIP_USE.format(cls="XLMRobertaModel"),
        prefix="transformer.",
        beside=PROJECTION,
    ),
    LabseConfig: HubTower(
        "BertModel",
        lambda config: _mclip(config) | {"model_type": "bert"},
        mclip_names.table,
        MCLIP_USE.format(cls="BertModel"),
        prefix="transformer.",
        beside=PROJECTION,
    ),
    SiglipTextConfig: HubTower(
        "SiglipTextModel",
        _siglip_text,
        siglip_names.text_table,
        TEXT_USE.format(cls="SiglipTextModel", output="pooler_output"),
    ),
    ClipTextConfig: HubTower(
        "CLIPTextModelWithProjection",
        _clip_text,
        clip_names.text_table,
        TEXT_USE.format(cls="CLIPTextModelWithProjection", output="text_embeds"),
    ),
    ClipVisionConfig: HubTower(
        "CLIPVisionModelWithProjection",
        _clip_vision,
        clip_names.vision_table,
        PICTURE_USE.format(cls="CLIPVisionModelWithProjection", output="image_embeds"),
    ),
    SiglipVisionConfig: HubTower(
        "SiglipVisionModel",
        _siglip_vision,
        siglip_names.vision_table,
        PICTURE_USE.format(cls="SiglipVisionModel", output="pooler_output"),
    ),
}
