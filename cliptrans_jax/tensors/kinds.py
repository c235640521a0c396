"""Kinds of published networks: what their files call the tensors, and where their sizes are."""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cliptrans_jax import convert, names
from cliptrans_jax import convert_towers as towers
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.tensors import beside, mclip, open_clip, sizes
from cliptrans_jax.towers.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClip, MClipConfig
from cliptrans_jax.towers.resnet import ClipResNet, ResNetConfig
from cliptrans_jax.translators import mbart
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.untrusted import brief

Tensors = Mapping[str, np.ndarray]
Hf = Mapping[str, Any]  # a config.json of Hugging Face

# mBART's sizes by their keys in config.json.
MBART_FIELDS = types.MappingProxyType(
    {
        "vocab": "vocab_size",
        "width": "d_model",
        "encoder_layers": "encoder_layers",
        "decoder_layers": "decoder_layers",
        "encoder_heads": "encoder_attention_heads",
        "decoder_heads": "decoder_attention_heads",
        "encoder_hidden": "encoder_ffn_dim",
        "decoder_hidden": "decoder_ffn_dim",
        "positions": "max_position_embeddings",
        "dropout": "dropout",
        "scale_embedding": "scale_embedding",
        "pad": "pad_token_id",
        "eos": "eos_token_id",
    }
)
MBART_FILE = "mBART's config.json"
# What else changes an mBART, and the one value that can be computed. All other keys are about
# decoding, fresh weights, classifiers and versions, and are not looked at: init_std, use_cache,
# num_beams, max_length, forced_bos_token_id, id2label, tokenizer_class, dtype and their like.
MBART_FIXED: Mapping[str, Any] = types.MappingProxyType(
    {
        "model_type": "mbart",
        "architectures": ["MBartForConditionalGeneration"],
        "activation_function": "gelu",
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }
)
# The same of keys that only older files have, or files of quantised weights.
MBART_FIXED_ONCE: Mapping[str, Any] = types.MappingProxyType(
    {
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "normalize_before": True,
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "extra_pos_embeddings": mbart.OFFSET,
        "pruned_heads": {},
        "quantization_config": None,
    }
)
# Kinds by what config.json calls its model or its class; of a whole CLIP, the image tower.
TOLD_BY = types.MappingProxyType(
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
    """How the tensors of one network are named in a file.

    Attributes:
      marker: a tensor that every such file has, and no file of another layout.
      config_type: class of the config.
      config: (tensors, config.json of their folder or None, their file) -> config.
      shapes: config -> shapes of our parameters.
      table: config -> table of names.
      dropped: regex of names that have no place here -> why.
      aliases: name -> the name of the tensor that it equals.
      zeros: tensors that are zeros where they are missing.
      about: the file beside the weights that says what no tensor tells.
      untold: fields of the config that no tensor tells; without that file they are assumed to be
        as published.
      varied: whether models of the same tensors differ in the activation, so that something must
        say it.
    """

    marker: str
    config_type: type
    config: Callable[[Tensors, Hf | None, str], Any]
    shapes: Callable[[Any], Mapping[str, Any]]
    table: Callable[[Any], names.Table]
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    about: str = beside.CONFIG
    untold: tuple[str, ...] = ()
    varied: bool = False


def mbart_config(hf: Hf) -> MBartConfig:
    """Sizes of an mBART from its config.json; a `decoder_start_token_id` that is left out is the
    end's, with which shifted labels start.

    Raises:
      ValueError: naming the key and the value that is missing, or that the network cannot be
        computed with; see `MBART_FIXED`.
    """
    for key, value in (MBART_FIXED | MBART_FIXED_ONCE).items():
        if hf.get(key) not in (value, None):
            raise ValueError(
                f"{key}={brief(hf[key])} of {MBART_FILE} is not supported: it must "
                f"be {value!r}; take another model, or change it there if the weights allow that"
            )
    if missing := [key for key in MBART_FIELDS.values() if hf.get(key) is None]:
        raise ValueError(f"{MBART_FILE} lacks {', '.join(missing)}; it has {sorted(hf)[:20]}")
    given = towers.checked(hf, MBART_FIELDS, MBartConfig, MBART_FILE)
    start = {"start": given["eos"]}
    if hf.get("decoder_start_token_id") is not None:
        start = towers.checked(hf, {"start": "decoder_start_token_id"}, MBartConfig, MBART_FILE)
    return MBartConfig(**given, **start)


def mbart_hf_config(config: MBartConfig) -> dict[str, Any]:
    """The config.json of an mBART, `mbart_config` backwards."""
    plain = {key: getattr(config, field) for field, key in MBART_FIELDS.items()}
    ids = {"bos_token_id": 0, "decoder_start_token_id": config.start}
    return MBART_FIXED | plain | ids | {"forced_eos_token_id": config.eos, "dtype": "float32"}


def kind_of_config(hf: Hf | None, file: str) -> str | None:
    """The kind that a config.json names; None without one, or when it names none.

    Raises:
      ValueError: for a model of none of these kinds.
    """
    if not hf:
        return None
    if "modelBase" in hf:
        return "mclip"
    classes = hf.get("architectures")
    told = [hf.get("model_type"), *(classes if isinstance(classes, list) else ())]
    if kind := next((TOLD_BY[x] for x in told if isinstance(x, str) and x in TOLD_BY), None):
        return kind
    if any(told):
        raise ValueError(
            f"{file} is of no known kind, {sorted(KINDS)}: its config.json says "
            f"model_type={brief(hf.get('model_type'))}, architectures={brief(classes)}"
        )
    return None


def kind_of_tensors(tensors: Tensors) -> str | None:
    """The first kind that the tensors may be of, by their names as they are or below the shortest
    prefix."""
    below = {
        kind: min(map(len, found))
        for kind, layouts in KINDS.items()
        for layout in layouts
        if (found := _prefixes(layout, tensors))
    }
    return min(below, key=below.get) if below else None


def first_kind(allowed: tuple[str, ...], tensors: Tensors) -> str:
    """The first of these kinds that the tensors are of; the first of all where they are of none."""
    there = (k for k in allowed if any(_prefixes(layout, tensors) for layout in KINDS[k]))
    return next(there, allowed[0])


def find_layout(kind: str, tensors: Tensors, file: str, weights: str = "") -> tuple[Layout, str]:
    """How the tensors of that kind are named in a file, and what stands before all their names.

    Args:
      kind: a key of KINDS.
      tensors: by their names.
      file: what to call their origin in messages.
      weights: that prefix, "teacher.", where several networks of the kind are there.

    Raises:
      ValueError: when the file holds no such network, or several.
    """
    for layout in KINDS[kind]:
        found = [p for p in _prefixes(layout, tensors) if not weights or p == weights]
        if "" in found or len(found) == 1:
            return layout, min(found)
        if found:
            raise ValueError(
                f"{file} holds a {kind!r} below each of {', '.join(map(repr, found[:5]))}: choose "
                f"with weights={found[0]} (--config.sources.weights={found[0]} of a run)"
            )
    markers = " or ".join(layout.marker for layout in KINDS[kind])
    other = kind_of_tensors(tensors)
    hint = f"; it holds {other!r}" if other else ""
    where = f" below {weights!r}" if weights else ""
    raise ValueError(f"{file} holds no {kind!r}{where}, whose {markers} is missing{hint}")


def _prefixes(layout: Layout, tensors: Tensors) -> list[str]:
    """What stands before the names of networks of a layout."""
    marker = layout.marker
    ends = (name for name in tensors if name == marker or name.endswith(f".{marker}"))
    return sorted({name.removesuffix(marker) for name in ends})


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


def _told(
    read: Callable[[Hf], Any], published: Callable[[], Any]
) -> Callable[[Tensors, Hf | None, str], Any]:
    """The config of a config.json, or else the published model's, which the shapes must confirm."""
    return lambda tensors, hf, file: read(hf) if hf is not None else published()


def _mclip_config(tensors: Tensors, hf: Hf | None, file: str) -> MClipConfig:
    return mclip.config(hf, file) if hf is not None else MClipConfig()


def _mbart_config(tensors: Tensors, hf: Hf | None, file: str) -> MBartConfig:
    return mbart_config(hf) if hf is not None else sizes.mbart_sizes(tensors, "", file)


MBART_UNTOLD = (
    "encoder_heads",
    "decoder_heads",
    "scale_embedding",
    "dropout",
    "pad",
    "eos",
    "start",
)
CLIP_UNTOLD = ("heads", "eps", "activation")

MBART = Layout(
    marker="model.encoder.layernorm_embedding.weight",
    config_type=MBartConfig,
    config=_mbart_config,
    shapes=_mbart_shapes,
    table=convert.mbart_table,
    aliases=convert.ALIASES,
    zeros=("final_logits_bias",),
    untold=MBART_UNTOLD,
)
CLIPTRANS = Layout(
    marker="mbart.model.encoder.layernorm_embedding.weight",
    config_type=ModelConfig,
    config=sizes.cliptrans_config,
    shapes=_translator_shapes,
    table=convert.cliptrans_table,
    aliases=convert.cliptrans_aliases(),
    dropped={r"clip\..*": 'of the encoder, which is read by itself (kind="mclip", "clip_text")'},
    zeros=("mbart.final_logits_bias",),
    untold=tuple(f"mbart.{name}" for name in MBART_UNTOLD),
)
KINDS: Mapping[str, tuple[Layout, ...]] = types.MappingProxyType(
    {
        "mbart": (MBART,),
        "mclip": (
            Layout(
                marker="LinearTransformation.weight",
                config_type=MClipConfig,
                config=_mclip_config,
                shapes=_text_shapes(MClip),
                table=towers.mclip_table,
                dropped=towers.MCLIP_DROPPED,
                untold=("heads", "eps", "pad", "dropout", "activation"),
            ),
        ),
        "clip_vision": (
            Layout(
                marker="vision_model.pre_layrnorm.weight",
                config_type=ClipVisionConfig,
                config=_told(towers.clip_vision_config, ClipVisionConfig),
                shapes=_image_shapes(ClipVision),
                table=towers.clip_vision_table,
                dropped=towers.CLIP_VISION_DROPPED,
                untold=CLIP_UNTOLD,
                varied=True,
            ),
            Layout(
                marker="visual.ln_pre.weight",
                config_type=ClipVisionConfig,
                config=sizes.openai_vision_config,
                shapes=_image_shapes(ClipVision),
                table=towers.openai_vision_table,
                dropped=towers.OPENAI_VISION_DROPPED,
                about=open_clip.FILE,
                untold=CLIP_UNTOLD,
                varied=True,
            ),
        ),
        "clip_res": (
            Layout(
                marker="visual.attnpool.positional_embedding",
                config_type=ResNetConfig,
                config=sizes.resnet_config,
                shapes=_image_shapes(ClipResNet),
                table=towers.openai_resnet_table,
                dropped=towers.OPENAI_RESNET_DROPPED,
            ),
        ),
        "clip_text": (
            Layout(
                marker="text_model.final_layer_norm.weight",
                config_type=ClipTextConfig,
                config=_told(towers.clip_text_config, ClipTextConfig),
                shapes=_text_shapes(ClipText),
                table=towers.clip_text_table,
                dropped=towers.CLIP_TEXT_DROPPED,
                untold=CLIP_UNTOLD,
                varied=True,
            ),
            Layout(
                marker="ln_final.weight",
                config_type=ClipTextConfig,
                config=sizes.openai_text_config,
                shapes=_text_shapes(ClipText),
                table=towers.openai_text_table,
                dropped=towers.OPENAI_TEXT_DROPPED,
                about=open_clip.FILE,
                untold=CLIP_UNTOLD,
                varied=True,
            ),
        ),
        "cliptrans": (CLIPTRANS,),
    }
)
