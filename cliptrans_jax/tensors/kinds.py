"""The kinds of published networks: names of their tensors, and sources of their sizes."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.tensors import config_json, open_clip, sizes
from cliptrans_jax.tensors.config_json import CONFIG, Hf
from cliptrans_jax.towers import clip_names, mclip_names, resnet_names
from cliptrans_jax.towers.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClip, MClipConfig
from cliptrans_jax.towers.resnet import ClipResNet, ResNetConfig
from cliptrans_jax.translators import mbart_names
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.untrusted import brief
from common_jax.weights.table import (
    Format,
    Table,
    choose_prefix,
    describe_nearest,
    prefixes,
    rank_kinds,
)

Tensors = Mapping[str, np.ndarray]

# Kinds by model type or class in config.json; a whole CLIP is its image tower.
KIND_BY_NAME = types.MappingProxyType(
    {
        "mbart": "mbart",
        "MBartForConditionalGeneration": "mbart",
        "M-CLIP": "mclip",
        "MultilingualCLIP": "mclip",
        "clip": "clip_vision",
        "CLIPModel": "clip_vision",
        "clip_vision_model": "clip_vision",
        "clip_text_model": "clip_text",
    }
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One naming of a network's tensors.

    Attributes:
      marker: regex of a tensor that all files of this layout have, and no others.
      config_type: class of the config.
      from_tensors: (tensors, their file) -> config, inferred from shapes.
      shapes: config -> shapes of our parameters.
      table: config -> table of names.
      about: name of the JSON file beside the weights.
      from_about: (content of that file, the weights' file) -> config; None if it has none.
      unstated: fields of the config that shapes do not show; without that file those of the
        published models are assumed.
      varied: whether models with equal tensors differ in the activation, which must then be given.
    """

    marker: str
    config_type: type
    from_tensors: Callable[[Tensors, str], Any]
    shapes: Callable[[Any], Mapping[str, Any]]
    table: Callable[[Any], Table]
    about: str = CONFIG
    from_about: Callable[[Hf, str], Any] | None = None
    unstated: tuple[str, ...] = ()
    varied: bool = False

    def config(self, tensors: Tensors, about: Hf | None, file: str) -> Any:
        """The config from the JSON file beside the weights or, without it, from the tensors.

        Raises:
          ValueError: naming a key or tensor that is missing or does not fit.
        """
        if about is None or self.from_about is None:
            return self.from_tensors(tensors, file)
        return self.from_about(about, file)


def kind_of_config(hf: Hf | None, file: str) -> str | None:
    """The kind that a config.json names; None if it names none.

    Raises:
      ValueError: for a model of another kind.
    """
    if not hf:
        return None
    if "modelBase" in hf:
        return "mclip"
    classes = hf.get("architectures")
    names = [hf.get("model_type"), *(classes if isinstance(classes, list) else ())]
    known = (KIND_BY_NAME.get(x) for x in names if isinstance(x, str))
    if kind := next(filter(None, known), None):
        return kind
    if any(names):
        raise ValueError(
            f"{file} is of no known kind, {sorted(KINDS)}: its config.json says "
            f"model_type={brief(hf.get('model_type'))}, architectures={brief(classes)}"
        )
    return None


def kind_of_tensors(tensors: Tensors) -> str | None:
    """The kind that the tensors' names show, below the shortest prefix; None without a marker."""
    claims = rank_kinds(_formats(), tensors)
    return claims[0].kind if claims else None


def require_kind(tensors: Tensors, file: str) -> str:
    """`kind_of_tensors`; raises ValueError instead of returning None."""
    if kind := kind_of_tensors(tensors):
        return kind
    raise ValueError(
        f"{file} is of no known kind: {sorted(KINDS)}; its tensors are called "
        f"{brief(sorted(tensors)[:4])}{describe_nearest(_formats(), tensors)}\n"
        "give the weights of one of these"
    )


def first_kind(allowed: tuple[str, ...], tensors: Tensors) -> str:
    """The first of these kinds that the tensors have, else the first one."""
    there = (k for k in allowed if any(prefixes(one.marker, tensors) for one in KINDS[k]))
    return next(there, allowed[0])


def find_layout(kind: str, tensors: Tensors, file: str, weights: str = "") -> tuple[Layout, str]:
    """The layout of a kind's tensors in a file, and the prefix of their names.

    Args:
      kind: a key of KINDS.
      tensors: by their names.
      file: name of their file, for messages.
      weights: the prefix, such as "teacher.", if several networks of the kind are in the file.

    Raises:
      ValueError: if the file has no such network, or several.
    """
    for layout in KINDS[kind]:
        there = prefixes(layout.marker, tensors)
        if weights in there or (there and not weights):
            return layout, choose_prefix([layout.marker], tensors, weights, file)
    markers = " or ".join(layout.marker.replace("\\", "") for layout in KINDS[kind])
    other = kind_of_tensors(tensors)
    hint = f"; it holds {other!r}" if other else ""
    where = f" below {weights!r}" if weights else ""
    raise ValueError(f"{file} holds no {kind!r}{where}, whose {markers} is missing{hint}")


def _formats() -> Iterator[Format]:
    for kind, layouts in KINDS.items():
        for one in layouts:
            yield kind, one.marker, lambda one=one: [one.table(one.config_type())]


def _abstract(network: nn.Module, *arguments: Any) -> Mapping[str, Any]:
    return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]


def _translator_shapes(config: ModelConfig) -> Mapping[str, Any]:
    return jax.eval_shape(Translator(config).init, jax.random.key(0))


def _mbart_shapes(config: MBartConfig) -> Mapping[str, Any]:
    return _translator_shapes(ModelConfig(config, MapperConfig(prefix=0)))["mbart"]


def _image_shapes(network: type[nn.Module]) -> Callable[[Any], Mapping[str, Any]]:
    def shapes(config: Any) -> Mapping[str, Any]:
        picture = jax.ShapeDtypeStruct((1, config.image, config.image, 3), jnp.float32)
        return _abstract(network(config, jnp.float32), picture)

    return shapes


def _text_shapes(network: type[nn.Module]) -> Callable[[Any], Mapping[str, Any]]:
    def shapes(config: Any) -> Mapping[str, Any]:
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return _abstract(network(config, jnp.float32), ids, ids)

    return shapes


MBART_UNSTATED = (
    "encoder_heads",
    "decoder_heads",
    "scale_embedding",
    "dropout",
    "pad",
    "eos",
    "start",
)
# Towers of OpenAI and OpenCLIP have the same tensors but different activations.
_clip = functools.partial(Layout, unstated=("heads", "eps", "activation"), varied=True)

MBART = Layout(
    marker=r"model\.encoder\.layernorm_embedding\.weight",
    config_type=MBartConfig,
    from_tensors=sizes.mbart_config,
    from_about=lambda hf, file: config_json.mbart_config(hf),
    shapes=_mbart_shapes,
    table=mbart_names.table,
    unstated=MBART_UNSTATED,
)
CLIPTRANS = Layout(
    marker=r"mbart\.model\.encoder\.layernorm_embedding\.weight",
    config_type=ModelConfig,
    from_tensors=sizes.cliptrans_config,
    shapes=_translator_shapes,
    table=cliptrans_names.table,
    unstated=tuple(f"mbart.{name}" for name in MBART_UNSTATED),
)
KINDS: Mapping[str, tuple[Layout, ...]] = types.MappingProxyType(
    {
        "mbart": (MBART,),
        "mclip": (
            Layout(
                marker=r"LinearTransformation\.weight",
                config_type=MClipConfig,
                from_tensors=lambda tensors, file: MClipConfig(),
                from_about=config_json.mclip_folder_config,
                shapes=_text_shapes(MClip),
                table=mclip_names.table,
                unstated=("heads", "eps", "pad", "dropout", "activation"),
            ),
        ),
        "clip_vision": (
            _clip(
                marker=r"vision_model\.pre_layrnorm\.weight",
                config_type=ClipVisionConfig,
                from_tensors=lambda tensors, file: ClipVisionConfig(),
                from_about=lambda hf, file: config_json.clip_vision_config(hf),
                shapes=_image_shapes(ClipVision),
                table=clip_names.vision_table,
            ),
            _clip(
                marker=r"visual\.ln_pre\.weight",
                config_type=ClipVisionConfig,
                from_tensors=sizes.openai_vision_config,
                from_about=lambda content, file: open_clip.vision_config(content),
                shapes=_image_shapes(ClipVision),
                table=clip_names.openai_vision_table,
                about=open_clip.FILE,
            ),
        ),
        "clip_res": (
            Layout(
                marker=r"visual\.attnpool\.positional_embedding",
                config_type=ResNetConfig,
                from_tensors=sizes.resnet_config,
                shapes=_image_shapes(ClipResNet),
                table=resnet_names.table,
            ),
        ),
        "clip_text": (
            _clip(
                marker=r"text_model\.final_layer_norm\.weight",
                config_type=ClipTextConfig,
                from_tensors=lambda tensors, file: ClipTextConfig(),
                from_about=lambda hf, file: config_json.clip_text_config(hf),
                shapes=_text_shapes(ClipText),
                table=clip_names.text_table,
            ),
            _clip(
                marker=r"ln_final\.weight",
                config_type=ClipTextConfig,
                from_tensors=sizes.openai_text_config,
                from_about=lambda content, file: open_clip.text_config(content),
                shapes=_text_shapes(ClipText),
                table=clip_names.openai_text_table,
                about=open_clip.FILE,
            ),
        ),
        "cliptrans": (CLIPTRANS,),
    }
)
