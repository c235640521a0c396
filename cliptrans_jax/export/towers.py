"""Exports towers that were trained here as folders for `transformers`."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cliptrans_jax.tensors import siglip_json
from cliptrans_jax.tensors.config_json import (
    CLIP_FEATURES,
    CLIP_TEXT_FIELDS,
    CLIP_VISION_FIELDS,
    MCLIP_FIELDS,
    written,
)
from cliptrans_jax.tensors.kinds import KINDS
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig
from cliptrans_jax.towers.table import tower_of
from cliptrans_jax.towers.tower import Pictures
from common_jax.weights import write_tensors
from common_jax.weights.table import write

PROJECTION = "LinearTransformation."  # M-CLIP's last layer, which XLM-RoBERTa lacks
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
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
      use: Python code for the model card.
      prefix: prefix of the published names that the class does not use.
      beside: prefix of the tensors that the class does not have; they go into
        `projection.safetensors`.
    """

    cls: str
    config: Callable[[Any], dict[str, Any]]
    use: str
    prefix: str = ""
    beside: str | None = None


def write_tower(folder: Path, params: Mapping[str, Any], config: Any) -> None:
    """Writes weights, config.json and, for pictures, preprocessor_config.json to a new folder.

    Args:
      folder: folder to create.
      params: parameters of the tower, in numpy.
      config: its sizes, an instance of a class in `HUB`.

    Raises:
      ValueError: if `HUB` lacks the class.
    """
    if type(config) not in HUB:
        raise ValueError(
            f"{type(config).__name__} cannot be exported: it has no record in HUB of "
            "cliptrans_jax/export/towers.py"
        )
    tower = HUB[type(config)]
    table = KINDS[tower_of(config).kind][0].table  # the first layout is that of Hugging Face
    tensors = {
        name.removeprefix(tower.prefix): np.asarray(x, np.float32)
        for name, x in write(table(config), params).items()
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
    fixed = {"model_type": "xlm-roberta", "attention_probs_dropout_prob": 0.0}
    return written(config, MCLIP_FIELDS) | fixed


def _clip_text(config: ClipTextConfig) -> dict[str, Any]:
    ids = {"bos_token_id": config.vocab - 2, "eos_token_id": config.vocab - 1}
    fixed = {"model_type": "clip_text_model", "attention_dropout": 0.0}
    return written(config, CLIP_TEXT_FIELDS | CLIP_FEATURES) | ids | fixed


def _clip_vision(config: ClipVisionConfig) -> dict[str, Any]:
    fixed = {"model_type": "clip_vision_model", "attention_dropout": 0.0}
    return written(config, CLIP_VISION_FIELDS | CLIP_FEATURES) | fixed


def _siglip_text(config: SiglipTextConfig) -> dict[str, Any]:
    fields = siglip_json.TEXT_FIELDS | {"pad": "pad_token_id"}
    return written(config, fields) | SIGLIP | {"model_type": "siglip_text_model"}


def _siglip_vision(config: SiglipVisionConfig) -> dict[str, Any]:
    fixed = SIGLIP | {"model_type": "siglip_vision_model"}
    return written(config, siglip_json.VISION_FIELDS) | fixed


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
        MCLIP_USE.format(cls="XLMRobertaModel"),
        prefix="transformer.",
        beside=PROJECTION,
    ),
    LabseConfig: HubTower(
        "BertModel",
        lambda config: _mclip(config) | {"model_type": "bert"},
        MCLIP_USE.format(cls="BertModel"),
        prefix="transformer.",
        beside=PROJECTION,
    ),
    SiglipTextConfig: HubTower(
        "SiglipTextModel",
        _siglip_text,
        TEXT_USE.format(cls="SiglipTextModel", output="pooler_output"),
    ),
    ClipTextConfig: HubTower(
        "CLIPTextModelWithProjection",
        _clip_text,
        TEXT_USE.format(cls="CLIPTextModelWithProjection", output="text_embeds"),
    ),
    ClipVisionConfig: HubTower(
        "CLIPVisionModelWithProjection",
        _clip_vision,
        PICTURE_USE.format(cls="CLIPVisionModelWithProjection", output="image_embeds"),
    ),
    SiglipVisionConfig: HubTower(
        "SiglipVisionModel",
        _siglip_vision,
        PICTURE_USE.format(cls="SiglipVisionModel", output="pooler_output"),
    ),
}
