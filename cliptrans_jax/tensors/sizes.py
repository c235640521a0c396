"""Infers the configs of networks from the shapes of their tensors.

Shapes do not show heads, ids, epsilons and activations: those of the published models are assumed.
"""

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.towers import resnet
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.resnet import ResNetConfig
from cliptrans_jax.translators import mbart, transformer_names
from cliptrans_jax.translators.mbart import MBartConfig
from cliptrans_jax.translators.nllb import NllbConfig
from cliptrans_jax.translators.transformer import TransformerConfig

Tensors = Mapping[str, np.ndarray]

HEADS = ("encoder_heads", "decoder_heads")
NO_HEADS: Mapping[str, int] = types.MappingProxyType({})
# Output and input layer of each kind of mapping network; the first whose output exists is taken.
MAPPER_OUT = {
    "transformer": "projector.weight",
    "hidden_mlp": "hidden.2.weight",
    "mlp": "hidden.0.weight",
}
MAPPER_IN = MAPPER_OUT | {"hidden_mlp": "hidden.0.weight"}


def cliptrans_config(tensors: Tensors, file: str, given: Mapping[str, Any]) -> ModelConfig:
    """The config of a CLIPTrans checkpoint; raises ValueError if a tensor is missing or misshapen,
    or if the heads of an mBART of an unpublished width are not `given`, by path such as
    "mbart.encoder_heads"."""
    heads = {name: given[f"mbart.{name}"] for name in HEADS if f"mbart.{name}" in given}
    sizes = mbart_config(tensors, file, "mbart.", heads)
    return ModelConfig(sizes, _mapper_sizes(tensors, sizes.width, file))


def mbart_config(
    tensors: Tensors, file: str, prefix: str = "", heads: Mapping[str, int] = NO_HEADS
) -> MBartConfig:
    """The config of an mBART below a prefix; raises as `cliptrans_config`."""
    config = _translator_config(MBartConfig(), (1024,), tensors, file, prefix, heads)
    rows = _shape(tensors, f"{prefix}model.encoder.embed_positions.weight", 2, file)[0]
    return dataclasses.replace(config, positions=rows - mbart.OFFSET)


def nllb_config(tensors: Tensors, file: str) -> NllbConfig:
    """The config of an NLLB-200 or M2M-100; raises as `cliptrans_config`."""
    return _translator_config(NllbConfig(), (1024, 2048), tensors, file)


def _translator_config(
    published: TransformerConfig,
    widths: tuple[int, ...],
    tensors: Tensors,
    file: str,
    prefix: str = "",
    heads: Mapping[str, int] = NO_HEADS,
) -> Any:
    """The published config with the tensors' sizes and these heads. Tensors do not show the number
    of heads, which is the same in all published models; for other widths it must be given."""
    names = (transformer_names.EMBEDDING, *transformer_names.ALIASES)
    names = [prefix + name for name in names]
    embedding = next((name for name in names if name in tensors), names[0])
    vocab, width = _shape(tensors, embedding, 2, file)
    if width not in widths and (missing := [name for name in HEADS if name not in heads]):
        # Only a translator without a prefix may have a config.json beside it.
        flags = " and ".join(f"--config.model.{prefix}{name}=N" for name in missing)
        give = f"give {flags}" if prefix else "put its config.json beside it"
        raise ValueError(
            f"{file} has a translator of width {width}, and its tensors do not show the number of "
            f"heads: {give} (published ones, of width {' or '.join(map(str, widths))}, have "
            f"{published.encoder_heads})"
        )
    sizes = dict(heads)
    for side in ("encoder", "decoder"):
        layers = f"{prefix}model.{side}.layers."
        sizes[f"{side}_layers"] = _count(tensors, layers)
        sizes[f"{side}_hidden"] = _shape(tensors, f"{layers}0.fc1.weight", 2, file)[0]
    return dataclasses.replace(published, vocab=vocab, width=width, **sizes)


def _mapper_sizes(tensors: Tensors, width: int, file: str) -> MapperConfig:
    kind = next((kind for kind, name in MAPPER_OUT.items() if f"adapter.{name}" in tensors), None)
    if kind is None:
        return MapperConfig(prefix=0)
    rows = _shape(tensors, f"adapter.{MAPPER_OUT[kind]}", 2, file)[0]
    if rows % width:
        raise ValueError(
            f"{file} has adapter.{MAPPER_OUT[kind]} with {rows} rows, which must be a multiple of "
            f"mBART's width {width}"
        )
    features = _shape(tensors, f"adapter.{MAPPER_IN[kind]}", 2, file)[1]
    return MapperConfig(kind, prefix=rows // width, features=features)


def resnet_config(tensors: Tensors, file: str) -> ResNetConfig:
    """The config of OpenAI's ResNet; raises as `cliptrans_config`."""
    places = _shape(tensors, "visual.attnpool.positional_embedding", 2, file)[0] - 1
    return ResNetConfig(
        image=round(max(places, 1) ** 0.5) * resnet.STRIDE,
        layers=tuple(_count(tensors, f"visual.layer{i}.") for i in (1, 2, 3, 4)),
        width=_shape(tensors, "visual.bn3.weight", 1, file)[0],
        features=_shape(tensors, "visual.attnpool.c_proj.weight", 2, file)[0],
    )


def openai_text_config(tensors: Tensors, file: str) -> ClipTextConfig:
    """The config of a text tower under OpenAI's names; raises as `cliptrans_config`."""
    vocab, width = _shape(tensors, "token_embedding.weight", 2, file)
    return ClipTextConfig(
        vocab=vocab,
        positions=_shape(tensors, "positional_embedding", 2, file)[0],
        width=width,
        layers=_count(tensors, "transformer.resblocks."),
        heads=max(1, width // resnet.HEAD_WIDTH),  # in all of OpenAI's models
        hidden=_shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", 2, file)[0],
        features=_shape(tensors, "text_projection", 2, file)[1],
    )


def openai_vision_config(tensors: Tensors, file: str) -> ClipVisionConfig:
    """The config of a ViT under OpenAI's names; raises as `cliptrans_config`."""
    width, _, _, patch = _shape(tensors, "visual.conv1.weight", 4, file)
    patch = max(1, patch)
    places = _shape(tensors, "visual.positional_embedding", 2, file)[0] - 1
    return ClipVisionConfig(
        image=round(max(places, 1) ** 0.5) * patch,
        patch=patch,
        width=width,
        layers=_count(tensors, "visual.transformer.resblocks."),
        heads=max(1, width // resnet.HEAD_WIDTH),  # in all of OpenAI's models
        hidden=_shape(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2, file)[0],
        features=_shape(tensors, "visual.proj", 2, file)[1],
    )


def _shape(tensors: Tensors, name: str, axes: int, file: str) -> tuple[int, ...]:
    if name not in tensors or tensors[name].ndim != axes:
        actual = f"is {tensors[name].shape}" if name in tensors else "is missing"
        raise ValueError(
            f"{file} does not show its sizes: {name} {actual}, and must have {axes} axes"
        )
    return tensors[name].shape


def _count(tensors: Tensors, prefix: str) -> int:
    """The number of layers whose names start with `prefix`."""
    numbers = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    return len({match[1] for name in tensors if (match := numbers.match(name))})
