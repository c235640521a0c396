"""Small published networks for CLIPTrans' tests: configs, parameters with distinct numbers, and the
files that they are published as."""

import dataclasses
import functools
import json

from tiny import random_like
from tiny_cliptrans import UNEVEN

from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.tensors import config_json, kinds
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.resnet import ResNetConfig
from common_jax.weights import table as tables
from common_jax.weights import write_tensors

MODEL = ModelConfig(UNEVEN, MapperConfig(prefix=3, features=6))
SIZES = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "features": 8}
MCLIP = MClipConfig(vocab=40, positions=12, **SIZES)
VISION = ClipVisionConfig(image=8, patch=4, **SIZES)
TEXT = ClipTextConfig(vocab=40, positions=10, **SIZES)
RESNET = ResNetConfig(image=64, layers=(2, 1, 1, 1), width=4, features=8)
OPENAI_TEXT = dataclasses.replace(TEXT, width=128)
CONFIGS = {
    "mbart": UNEVEN,
    "mclip": MCLIP,
    "clip_vision": VISION,
    "clip_text": TEXT,
    "clip_res": RESNET,
    "cliptrans": MODEL,
}
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 8,
    "text_config": _SIZES | {"vocab_size": 40, "max_position_embeddings": 10},
    "vision_config": _SIZES | {"image_size": 8, "patch_size": 4},
}


@functools.cache
def shapes_of(marker, config):
    layouts = (layout for layouts in kinds.KINDS.values() for layout in layouts)
    return next(layout for layout in layouts if layout.marker == marker).shapes(config)


def make_params(layout, config, *, seed=0):
    """Parameters with a distinct number in every place."""
    return random_like(shapes_of(layout.marker, config), seed=seed)


def make_tensors(kind, config=None, *, layout=0, seed=0):
    layout, config = kinds.KINDS[kind][layout], config or CONFIGS[kind]
    return tables.write(layout.table(config), make_params(layout, config, seed=seed))


def write_folder(folder, hf, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def hf_mbart(**changes):
    return config_json.mbart_hf_config(UNEVEN) | changes
