"""Network configs from the config.json files of Hugging Face and M-CLIP repositories."""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliptrans_jax.towers import clip, mclip
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.labse import LabseConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.translators import mbart
from cliptrans_jax.translators.mbart import MBartConfig
from cliptrans_jax.translators.nllb import NllbConfig
from cliptrans_jax.translators.transformer import TransformerConfig
from common_jax.untrusted import brief
from common_jax.workdir import read_json

Hf = Mapping[str, Any]  # a config.json of Hugging Face
CONFIG = "config.json"

# Our fields for the sizes of mBART and NLLB -> keys in config.json.
TRANSLATOR_FIELDS = types.MappingProxyType(
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
        "start": "decoder_start_token_id",
    }
)
QUANTISED = "quantization_config"
DEQUANTISE = "read the dequantised model (transformers: model.dequantize(), model.save_pretrained)"
MBART_FILE = "mBART's config.json"
# Other keys that change an mBART, with the only supported value. The rest concern decoding,
# initialisation, classifiers and versions, and are ignored: init_std, use_cache, num_beams,
# max_length, forced_bos_token_id, id2label, tokenizer_class, dtype and so on.
MBART_FIXED: Mapping[str, Any] = types.MappingProxyType(
    {
        "model_type": "mbart",
        "architectures": ["MBartForConditionalGeneration"],
        "activation_function": "gelu",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }
)
# The same for keys of older files and of files with quantised weights.
MBART_FIXED_ONCE: Mapping[str, Any] = types.MappingProxyType(
    {
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "normalize_before": True,
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "extra_pos_embeddings": mbart.OFFSET,
        "pruned_heads": {},
        QUANTISED: None,
    }
)
NLLB_FILE = "NLLB's config.json"
# Like `MBART_FIXED`. Keys that M2M-100's files inherited from mBART, such as normalize_before, have
# no effect on its network.
NLLB_FIXED: Mapping[str, Any] = types.MappingProxyType(
    {
        "model_type": "m2m_100",
        "architectures": ["M2M100ForConditionalGeneration"],
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    }
)
# Dropout rates in published files that networks here do not have; the account mentions them.
TRANSLATOR_UNUSED = (
    *("attention_dropout", "activation_dropout"),
    *("encoder_layerdrop", "decoder_layerdrop"),
)
CLIP_UNUSED = ("dropout", "attention_dropout")
MCLIP_BASES: Mapping[str, MClipConfig] = types.MappingProxyType(
    {
        "xlm-roberta-large": MClipConfig(),
        "FacebookAI/xlm-roberta-large": MClipConfig(),
        "setu4993/LaBSE": LabseConfig(),
        "sentence-transformers/LaBSE": LabseConfig(),
    }
)
# Tower configs, by the model type in the base model's own config.json.
_MCLIP_CLASSES = {"xlm-roberta": MClipConfig, "roberta": MClipConfig, "bert": LabseConfig}
MCLIP_FIELDS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "eps": "layer_norm_eps",
    "pad": "pad_token_id",
    "dropout": "hidden_dropout_prob",
    "activation": "hidden_act",
}
_MCLIP_ALLOWED = {
    "model_type": (*_MCLIP_CLASSES,),
    "hidden_act": mclip.ACTIVATIONS,
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
_CLIP_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}
CLIP_VISION_FIELDS = _CLIP_FIELDS | {"image": "image_size", "patch": "patch_size"}
CLIP_TEXT_FIELDS = _CLIP_FIELDS | {"vocab": "vocab_size", "positions": "max_position_embeddings"}
CLIP_FEATURES = {"features": "projection_dim"}  # beside a tower's section
_CLIP_FILE, _MCLIP_FILE = "CLIP's config.json", "M-CLIP's config.json"
_BASE_FILE = "the base's config.json"
_CLIP_ALLOWED = {"hidden_act": clip.ACTIVATIONS}
# Bounds that all published models satisfy. They are needed because shapes are built from these
# numbers before tensors are checked.
MOST, MOST_LAYERS = 10_000_000, 1000
_EXPECTED = {
    int: "a whole number from {least} to {most}",
    float: "a number from {least} to {most}",
    bool: "true or false",
    str: "a text",
}


def mbart_config(hf: Hf) -> MBartConfig:
    """The config of an mBART from its config.json. `decoder_start_token_id` defaults to the end
    token, as that is what shifted labels start with.

    Raises:
      ValueError: naming a missing key, or a key with an unsupported value; see `MBART_FIXED`.
    """
    fixed = MBART_FIXED | MBART_FIXED_ONCE
    return _read_translator(hf, MBartConfig, fixed, MBART_FILE)


def mbart_hf_config(config: MBartConfig) -> dict[str, Any]:
    """The config.json of an mBART; the inverse of `mbart_config`."""
    return _write_translator(config, MBART_FIXED)


def nllb_config(hf: Hf) -> NllbConfig:
    """The config of a dense NLLB-200 or M2M-100, like `mbart_config`; see `NLLB_FIXED`."""
    return _read_translator(hf, NllbConfig, NLLB_FIXED | {QUANTISED: None}, NLLB_FILE)


def nllb_hf_config(config: NllbConfig) -> dict[str, Any]:
    """The config.json of an NLLB; the inverse of `nllb_config`."""
    return _write_translator(config, NLLB_FIXED)


def mclip_config(hf: Hf, transformer_hf: Hf | None) -> MClipConfig:
    """The config of an M-CLIP text tower.

    Args:
      hf: the config.json of the M-CLIP repository: `modelBase`, `transformerDimensions`, `numDims`.
      transformer_hf: the config.json of `modelBase`, an XLM-RoBERTa or a BERT; None for one of
        `MCLIP_BASES`.

    Raises:
      ValueError: naming a missing key, a key with an unsupported value, or a
        `transformerDimensions` that differs from the width.
    """
    _required(hf, "numDims", _MCLIP_FILE)
    features = checked(hf, {"features": "numDims"}, MClipConfig, _MCLIP_FILE)
    if transformer_hf is None:
        name = _required(hf, "modelBase", _MCLIP_FILE)
        if not (isinstance(name, str) and name in MCLIP_BASES):
            raise ValueError(
                f"modelBase={name!r} of M-CLIP's config.json is not one of {sorted(MCLIP_BASES)}; "
                "give the config.json of that model too"
            )
        config = dataclasses.replace(MCLIP_BASES[name], **features)
    else:
        require_supported(transformer_hf, _MCLIP_ALLOWED, _BASE_FILE)
        for key in MCLIP_FIELDS.values():
            _required(transformer_hf, key, _BASE_FILE)
        sizes = checked(transformer_hf, MCLIP_FIELDS, MClipConfig, _BASE_FILE)
        cls = _MCLIP_CLASSES[transformer_hf.get("model_type", "xlm-roberta")]
        config = cls(**features, **sizes)
    if (width := _required(hf, "transformerDimensions", _MCLIP_FILE)) != config.width:
        raise ValueError(
            f"transformerDimensions={width!r} of M-CLIP's config.json is not the width of its "
            f"transformer, {config.width}; the two files are not of one model"
        )
    return config


def mclip_folder_config(hf: Hf, file: str) -> MClipConfig:
    """`mclip_config`, with the config.json of its transformer read from `modelBase`.

    Args:
      hf: the M-CLIP's config.json; `modelBase` may be an absolute folder or one relative to `file`.
      file: folder or file of the weights.

    Raises:
      ValueError: as `mclip_config`, and if the `modelBase` is missing.
    """
    name = hf.get("modelBase")
    if not isinstance(name, str) or name in MCLIP_BASES:
        return mclip_config(hf, None)
    path = Path(file)
    folder = path if path.is_dir() else path.parent
    for place in (folder / name, folder / name / CONFIG):
        if place.suffix == ".json" and place.is_file():
            return mclip_config(hf, read_json(place))
    raise ValueError(
        f"modelBase={brief(name)} of M-CLIP's config.json is neither one of "
        f"{sorted(MCLIP_BASES)} nor a folder here with a config.json: name the tower's base "
        "with --config.sources.clip_text_base (`base` of pretrained.load), one of these names "
        "or a folder with the config.json of an XLM-RoBERTa or a BERT"
    )


def clip_vision_config(hf: Hf) -> ClipVisionConfig:
    """The config of an image tower, from the config.json of a whole CLIP or of the tower alone.

    Missing keys default to openai/clip-vit-base-patch32, as in Hugging Face's code. Older files
    have `vision_config_dict` instead of `vision_config`.

    Raises:
      ValueError: naming a key with an unsupported value.
    """
    tower, where = tower_section(hf, "vision", family="clip", file=_CLIP_FILE)
    require_supported(tower, _CLIP_ALLOWED | {"num_channels": (3,)}, where)
    features = checked(hf, CLIP_FEATURES, ClipVisionConfig, _CLIP_FILE)
    sizes = checked(tower, CLIP_VISION_FIELDS, ClipVisionConfig, where)
    return ClipVisionConfig(**sizes, **features)


def clip_text_config(hf: Hf) -> ClipTextConfig:
    """The same for a text tower, with section `text_config` or `text_config_dict`."""
    tower, where = tower_section(hf, "text", family="clip", file=_CLIP_FILE)
    require_supported(tower, _CLIP_ALLOWED, where)
    features = checked(hf, CLIP_FEATURES, ClipTextConfig, _CLIP_FILE)
    config = ClipTextConfig(**checked(tower, CLIP_TEXT_FIELDS, ClipTextConfig, where), **features)
    # The tower pools at the largest id, which must be the end token. So does Hugging Face if
    # eos_token_id=2, as it is in OpenAI's files.
    require_supported(tower, {"eos_token_id": (2, config.vocab - 1)}, where)
    return config


def checked(hf: Hf, fields: Mapping[str, str], cls: type, where: str) -> dict[str, Any]:
    """The values in a config.json by fields of `cls`; keys that the file lacks are left out.

    Args:
      hf: the file's content.
      fields: field of `cls` -> key in the file.
      cls: a dataclass, whose defaults define the types.
      where: name of the file or section, for messages.

    Raises:
      ValueError: naming a key with a value of another type or out of range.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
    values = {field: hf[key] for field, key in fields.items() if key in hf}
    for field, value in values.items():
        kind, key = kinds[field], fields[field]
        least = 0 if kind is float or key.endswith("_id") else 1
        most = MOST_LAYERS if field.endswith("layers") else MOST
        if kind in (int, float):
            is_number = isinstance(value, int | kind) and not isinstance(value, bool)
            fits = is_number and least <= value <= most
        else:
            fits = isinstance(value, kind)
        if not fits:
            expected = _EXPECTED[kind].format(least=least, most=most)
            raise ValueError(f"{key}={brief(value)} of {where} must be {expected}")
    return values


def written(config: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    """The keys of a config.json for the `fields` of a config; the inverse of `checked`."""
    return {key: getattr(config, field) for field, key in fields.items()}


def require_supported(hf: Hf, allowed: Mapping[str, tuple], where: str) -> None:
    """Raises ValueError for a key whose value is not `allowed`; `where` as in `checked`."""
    for key, values in allowed.items():
        if key in hf and hf[key] not in values:
            shown = [*(repr(value) for value in values if value is not None)]
            expected = " or ".join(shown + ["left out"] * (None in values))
            way_out = DEQUANTISE if key == QUANTISED else "use another model"
            raise ValueError(
                f"{key}={brief(hf[key])} of {where} is not supported: it must be {expected}; "
                f"{way_out}"
            )


def _read_translator(
    hf: Hf, cls: type[TransformerConfig], fixed: Mapping[str, Any], where: str
) -> Any:
    """The config of class `cls`, after checking that keys in `fixed` have their only supported
    value."""
    require_supported(hf, {key: (value, None) for key, value in fixed.items()}, where)
    start = {TRANSLATOR_FIELDS["start"]: hf.get("eos_token_id")}
    hf = start | {key: value for key, value in hf.items() if value is not None}
    if missing := [key for key in TRANSLATOR_FIELDS.values() if hf.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it has {sorted(hf)[:20]}")
    return cls(**checked(hf, TRANSLATOR_FIELDS, cls, where))


def _write_translator(config: TransformerConfig, fixed: Mapping[str, Any]) -> dict[str, Any]:
    ids = {"bos_token_id": 0, "forced_eos_token_id": config.eos}
    # Otherwise `transformers` uses its defaults, with which nothing here was trained.
    rates = dict.fromkeys(TRANSLATOR_UNUSED, 0.0)
    return fixed | rates | written(config, TRANSLATOR_FIELDS) | ids | {"dtype": "float32"}


def tower_section(hf: Hf, side: str, *, family: str, file: str) -> tuple[Hf, str]:
    """One tower's section in the file of a whole model or of the tower alone, and its name for
    messages.

    Args:
      hf: the file's content.
      side: "text" or "vision".
      family: model type of the whole model, such as "clip".
      file: name of the file, for messages.

    Raises:
      ValueError: for another model type, or a section that is not a dictionary.
    """
    _required(hf, "model_type", file)
    require_supported(hf, {"model_type": (family, f"{family}_{side}_model")}, file)
    key = section_key(hf, side)
    whole = hf["model_type"] == family or key in hf
    tower = hf.get(key) if whole else hf
    if not isinstance(tower, dict | None):
        raise ValueError(f"{key}={brief(tower)} of {file} must be a dictionary of sizes")
    return tower or {}, f"{key} in {file}" if whole else file


def section_key(hf: Hf, side: str) -> str:
    """The key of the section of one tower, "text" or "vision", in the file of a whole model."""
    older = f"{side}_config_dict"
    return older if hf.get(older) is not None else f"{side}_config"


def _required(hf: Hf, key: str, where: str) -> Any:
    if key not in hf:
        raise ValueError(
            f"{key} is missing in {where}, which has {sorted(hf)[:20]}; use the file that "
            "belongs to the weights"
        )
    return hf[key]
