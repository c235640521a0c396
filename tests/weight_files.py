"""Small networks' weights in the originals' formats, written without PyTorch under each kind's
names."""

import pathlib

import numpy as np
import torch_files

from common_jax.weights.table import expected_tensors
from m2mkd_jax import pretrained

# Content of the config files here, which are passed as --config.
CONFIG = """
import dataclasses

from tiny import tiny_config

from common_jax.config import unfreeze
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.models.vit import ViTConfig

NAC = NacConfig(
    tokenizer=TokenizerConfig(preset="nano", width=16, stages=2, grid_width=5),
    inputs=4,
    mediators=6,
    outputs=2,
    iterations=2,
    width=12,
    code_width=10,
    signature_width=7,
    heads=2,
    head_width=4,
    share_ffns=True,
)


def get_config(arg=None):
    config = tiny_config("distill")
    if arg == "nac":
        meta = ViTConfig(patch=4, width=16, heads=2, depths=(1,) * 4)
        config = dataclasses.replace(config, model=NAC, meta=meta)
    return unfreeze(config)
"""


def write_config(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "config.py"
    path.write_text(CONFIG)
    return path


_EXPECTED = {}


def make_state(kind, config, stage=None, *, seed=0):
    """Tensors of a kind with distinct numbers in every place; what a NAC's iterations share is the
    same in each."""
    rng, key = np.random.default_rng(seed), (kind, stage, config.model.kind)
    names = pretrained.KINDS[kind]
    if key not in _EXPECTED:
        _EXPECTED[key] = expected_tensors(names.table(config, stage), names.shapes(config, stage))
    state, of_path = {}, {}
    for name, (path, shape) in _EXPECTED[key].items():
        array = of_path.get(path) if kind.startswith("nac") else None
        array = rng.standard_normal(shape).astype(np.float32) if array is None else array
        state[name] = of_path[path] = array
    return state


def listed_by_stage(state, depths):
    """The state with its tensors repeated under `stages.<i>.`, where the original's modules list
    them."""
    starts = np.cumsum((0, *depths))
    listed = dict(state)
    for name, array in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            stage = int(np.searchsorted(starts, int(number), side="right")) - 1
            local = f"blocks.{int(number) - starts[stage]}.{rest}"
        else:
            stage, local = len(depths) - 1 if name.startswith(("norm.", "head.")) else 0, name
        listed[f"stages.{stage}.{local}"] = array
    return listed


def save_checkpoint(path, tensors, *, key="model", **beside):
    """A file {key: tensors, **beside} with an optimizer's state that should never be read."""
    storages = {}
    value = {**beside, key: torch_files.state_dict(tensors, storages)}
    moments = torch_files.tensor(torch_files.storage("FloatStorage", "x", 1), (1,), (1,))
    value |= {"optimizer": {"state": {0: {"exp_avg": moments}}}, "epoch": 99}
    torch_files.write_archive(path, value, storages)


def deit(width=192, side=32, labels=7, blocks=2):
    """A DeiT-Tiny under timm's names, with fewer blocks and smaller images."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // 16) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (labels, width),
        "head.bias": (labels,),
    }
    for i in range(blocks):
        block = {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }
        for name, shape in block.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
