"""Tensor names of the published encoders, and their configs: M-CLIP's text tower, CLIP's towers in
Hugging Face's files, and those of RN50x64 in OpenAI's.

Each `*_table` names every parameter of its tower; each `*_DROPPED` says what else its file may
hold, the other tower of a CLIP included. Tensors keep the type that they have in the file.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from cliptrans_jax.names import (
    Entry,
    Table,
    convolution,
    copy,
    linear,
    norm,
    self_attention,
    stacked_attention,
    transpose,
)
from cliptrans_jax.towers import clip, mclip
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.resnet import ResNetConfig
from common_jax.untrusted import brief

Dropped = Mapping[str, str]  # regex of whole tensor names -> why they have no place
Hf = Mapping[str, Any]  # a config.json of Hugging Face

_BUFFER = "a buffer that counts 0, 1, 2, ..."
_TEMPERATURE = "the temperature of CLIP's own training"
_OTHER_TOWER = "of the other tower, which is read by itself"

MCLIP_DROPPED: Dropped = types.MappingProxyType(
    {
        r"transformer\.embeddings\.position_ids": _BUFFER,
        r"transformer\.pooler\.dense\.(weight|bias)": "a pooler that M-CLIP's mean replaces",
    }
)
CLIP_VISION_DROPPED: Dropped = types.MappingProxyType(
    {
        r"vision_model\.embeddings\.position_ids": _BUFFER,
        r"logit_scale": _TEMPERATURE,
        r"text_model\..*|text_projection\.weight": _OTHER_TOWER,
    }
)
CLIP_TEXT_DROPPED: Dropped = types.MappingProxyType(
    {
        r"text_model\.embeddings\.position_ids": _BUFFER,
        r"logit_scale": _TEMPERATURE,
        r"vision_model\..*|visual_projection\.weight": _OTHER_TOWER,
    }
)
_OPENAI_DROPPED = {
    r"logit_scale": _TEMPERATURE,
    r"input_resolution|context_length|vocab_size": "a size, which the config says",
}
OPENAI_RESNET_DROPPED: Dropped = types.MappingProxyType(
    _OPENAI_DROPPED
    | {
        r"visual\..*\.num_batches_tracked": "a count of training steps",
        r"transformer\..*|ln_final\..*|text_projection": _OTHER_TOWER,
        r"token_embedding\.weight|positional_embedding": _OTHER_TOWER,
    }
)
OPENAI_VISION_DROPPED: Dropped = types.MappingProxyType(
    _OPENAI_DROPPED
    | {
        r"transformer\..*|ln_final\..*|text_projection": _OTHER_TOWER,
        r"token_embedding\.weight|positional_embedding": _OTHER_TOWER,
    }
)
OPENAI_TEXT_DROPPED: Dropped = types.MappingProxyType(
    _OPENAI_DROPPED | {r"visual\..*": _OTHER_TOWER}
)

MCLIP_BASES: Mapping[str, MClipConfig] = types.MappingProxyType(
    {"xlm-roberta-large": MClipConfig(), "FacebookAI/xlm-roberta-large": MClipConfig()}
)
_MCLIP_FIELDS = {
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
    "model_type": ("xlm-roberta", "roberta"),
    "hidden_act": tuple(mclip.ACTIVATIONS),
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
_CLIP_VISION_FIELDS = _CLIP_FIELDS | {"image": "image_size", "patch": "patch_size"}
_CLIP_TEXT_FIELDS = _CLIP_FIELDS | {"vocab": "vocab_size", "positions": "max_position_embeddings"}
_CLIP_FEATURES = {"features": "projection_dim"}
_CLIP_FILE, _MCLIP_FILE = "CLIP's config.json", "M-CLIP's config.json"
_XLMR_FILE = "XLM-RoBERTa's config.json"
_CLIP_ALLOWED = {
    "hidden_act": tuple(clip.ACTIVATIONS),
    "dropout": (0.0,),
    "attention_dropout": (0.0,),
}
# No published model has more; shapes are made of these numbers before tensors are looked at.
MOST, MOST_LAYERS = 10_000_000, 1000
_EXPECTED = {
    int: "a whole number from {least} to {most}",
    float: "a number from {least} to {most}",
    bool: "true or false",
    str: "a text",
}


def mclip_table(config: MClipConfig) -> Table:
    """Entries of `models.mclip.MClip`, by the names of M-CLIP's own files (CLIPTrans, M-CLIP)."""
    source = "transformer.embeddings"
    table = {
        "embeddings/words": copy(f"{source}.word_embeddings.weight"),
        "embeddings/positions": copy(f"{source}.position_embeddings.weight"),
        "embeddings/types": copy(f"{source}.token_type_embeddings.weight"),
        **norm(f"{source}.LayerNorm", "embeddings/norm"),
        **linear("LinearTransformation", "projection"),
    }
    for i in range(config.layers):
        source, target = f"transformer.encoder.layer.{i}", f"layer_{i}"
        queries, keys, values = (
            f"{source}.attention.self.{part}" for part in ("query", "key", "value")
        )
        table |= self_attention(
            (queries, keys, values),
            f"{source}.attention.output.dense",
            f"{target}/attention",
            heads=config.heads,
        )
        table |= norm(f"{source}.attention.output.LayerNorm", f"{target}/attention_norm")
        table |= linear(f"{source}.intermediate.dense", f"{target}/mlp/up")
        table |= linear(f"{source}.output.dense", f"{target}/mlp/down")
        table |= norm(f"{source}.output.LayerNorm", f"{target}/mlp_norm")
    return table


def clip_vision_table(config: ClipVisionConfig) -> Table:
    """Entries of `models.clip.ClipVision`, by the names of Hugging Face's CLIP files."""
    source = "vision_model"
    return {
        "class_token": copy(f"{source}.embeddings.class_embedding"),
        "positions": copy(f"{source}.embeddings.position_embedding.weight"),
        "patches/kernel": _patches(f"{source}.embeddings.patch_embedding.weight", config.patch),
        **norm(f"{source}.pre_layrnorm", "pre_norm"),  # so spelled in the files
        **_clip_blocks(config, source),
        **norm(f"{source}.post_layernorm", "post_norm"),
        "projection/kernel": transpose("visual_projection.weight"),
    }


def clip_text_table(config: ClipTextConfig) -> Table:
    """Entries of `models.clip.ClipText`, by the names of Hugging Face's CLIP files."""
    source = "text_model"
    return {
        "words": copy(f"{source}.embeddings.token_embedding.weight"),
        "positions": copy(f"{source}.embeddings.position_embedding.weight"),
        **_clip_blocks(config, source),
        **norm(f"{source}.final_layer_norm", "final_norm"),
        "projection/kernel": transpose("text_projection.weight"),
    }


def openai_resnet_table(config: ResNetConfig) -> Table:
    """Entries of `models.resnet.ClipResNet`, by the names of OpenAI's RN50x64."""
    table = {}
    for i in (1, 2, 3):
        table[f"stem/conv_{i}/kernel"] = convolution(f"visual.conv{i}.weight")
        table |= _batch_norm(f"visual.bn{i}", f"stem/norm_{i}")
    for stage, depth in enumerate(config.layers):
        for i in range(depth):
            source, target = f"visual.layer{stage + 1}.{i}", f"stage_{stage}_block_{i}"
            for j in (1, 2, 3):
                table[f"{target}/conv_{j}/kernel"] = convolution(f"{source}.conv{j}.weight")
                table |= _batch_norm(f"{source}.bn{j}", f"{target}/norm_{j}")
            if i == 0:
                shortcut = convolution(f"{source}.downsample.0.weight")
                table[f"{target}/shortcut/kernel"] = shortcut
                table |= _batch_norm(f"{source}.downsample.1", f"{target}/shortcut_norm")
    source, target = "visual.attnpool", "attention_pool"
    table[f"{target}/positions"] = copy(f"{source}.positional_embedding")
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("c", "out")):
        table |= linear(f"{source}.{theirs}_proj", f"{target}/{ours}")
    return table


def openai_text_table(config: ClipTextConfig) -> Table:
    """Entries of `models.clip.ClipText`, by the names of OpenAI's files."""
    table = {
        "words": copy("token_embedding.weight"),
        "positions": copy("positional_embedding"),
        **norm("ln_final", "final_norm"),
        "projection/kernel": copy("text_projection"),  # stored (in, out)
    }
    return table | _openai_blocks(config, "transformer")


def openai_vision_table(config: ClipVisionConfig) -> Table:
    """Entries of `models.clip.ClipVision`, by the names of OpenAI's files."""
    return {
        "class_token": copy("visual.class_embedding"),
        "positions": copy("visual.positional_embedding"),
        "patches/kernel": _patches("visual.conv1.weight", config.patch),
        **norm("visual.ln_pre", "pre_norm"),
        **_openai_blocks(config, "visual.transformer"),
        **norm("visual.ln_post", "post_norm"),
        "projection/kernel": copy("visual.proj"),  # stored (in, out)
    }


def _openai_blocks(config: ClipVisionConfig | ClipTextConfig, tower: str) -> dict[str, Entry]:
    table = {}
    for i in range(config.layers):
        source, target = f"{tower}.resblocks.{i}", f"layer_{i}"
        table |= stacked_attention(f"{source}.attn", f"{target}/attention", heads=config.heads)
        table |= norm(f"{source}.ln_1", f"{target}/attention_norm")
        table |= norm(f"{source}.ln_2", f"{target}/mlp_norm")
        table |= linear(f"{source}.mlp.c_fc", f"{target}/mlp/up")
        table |= linear(f"{source}.mlp.c_proj", f"{target}/mlp/down")
    return table


def mclip_config(hf: Hf, transformer_hf: Hf | None) -> MClipConfig:
    """Sizes of an M-CLIP text tower.

    Args:
      hf: the config.json of the M-CLIP repository: `modelBase`, `transformerDimensions`, `numDims`.
      transformer_hf: that of the XLM-RoBERTa that `modelBase` names; None where `MCLIP_BASES` has
        it.

    Raises:
      ValueError: naming the key and the value, for one that is missing or that the tower cannot be
        computed with, and for a `transformerDimensions` that is not the width.
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
        require_supported(transformer_hf, _MCLIP_ALLOWED, _XLMR_FILE)
        for key in _MCLIP_FIELDS.values():
            _required(transformer_hf, key, _XLMR_FILE)
        sizes = checked(transformer_hf, _MCLIP_FIELDS, MClipConfig, _XLMR_FILE)
        config = MClipConfig(**features, **sizes)
    if (width := _required(hf, "transformerDimensions", _MCLIP_FILE)) != config.width:
        raise ValueError(
            f"transformerDimensions={width!r} of M-CLIP's config.json is not the width of its "
            f"transformer, {config.width}; the two files are not of one model"
        )
    return config


def clip_vision_config(hf: Hf) -> ClipVisionConfig:
    """Sizes of an image tower, from the config.json of a whole CLIP or of the tower alone.

    A key that is left out has the value of openai/clip-vit-base-patch32, as in Hugging Face's code.
    The `vision_config_dict` of older files takes the place of `vision_config`.

    Raises:
      ValueError: naming the key and the value that the tower cannot be computed with.
    """
    _required(hf, "model_type", _CLIP_FILE)
    require_supported(hf, {"model_type": ("clip", "clip_vision_model")}, _CLIP_FILE)
    tower, where = _tower(hf, "vision_config")
    require_supported(tower, _CLIP_ALLOWED | {"num_channels": (3,)}, where)
    sizes = checked(tower, _CLIP_VISION_FIELDS, ClipVisionConfig, where)
    return ClipVisionConfig(**sizes, **checked(hf, _CLIP_FEATURES, ClipVisionConfig, _CLIP_FILE))


def clip_text_config(hf: Hf) -> ClipTextConfig:
    """Sizes of a text tower, from the config.json of a whole CLIP or of the tower alone.

    A key that is left out has the value of openai/clip-vit-base-patch32, as in Hugging Face's code.
    The `text_config_dict` of older files takes the place of `text_config`.

    Raises:
      ValueError: naming the key and the value that the tower cannot be computed with.
    """
    _required(hf, "model_type", _CLIP_FILE)
    require_supported(hf, {"model_type": ("clip", "clip_text_model")}, _CLIP_FILE)
    tower, where = _tower(hf, "text_config")
    require_supported(tower, _CLIP_ALLOWED, where)
    sizes = checked(tower, _CLIP_TEXT_FIELDS, ClipTextConfig, where)
    sizes |= checked(hf, _CLIP_FEATURES, ClipTextConfig, _CLIP_FILE)
    config = ClipTextConfig(**sizes)
    # The end token must be the largest id, where the tower looks for it; Hugging Face does so too
    # where a file says 2, as OpenAI's do.
    require_supported(tower, {"eos_token_id": (2, config.vocab - 1)}, where)
    return config


def checked(hf: Hf, fields: Mapping[str, str], cls: type, where: str) -> dict[str, Any]:
    """What a config.json says, by the fields of `cls`; keys that are left out are left out.

    Args:
      hf: the file's content.
      fields: field of `cls` -> key in the file.
      cls: a dataclass, whose defaults say of which type each field is.
      where: what to call the file, or its section, in messages.

    Raises:
      ValueError: naming the key and the value, for one of another type or out of its range.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
    given = {field: hf[key] for field, key in fields.items() if key in hf}
    for field, value in given.items():
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
    return given


def _tower(hf: Hf, name: str) -> tuple[Hf, str]:
    """What is said of one tower of a CLIP, and what to call it in messages."""
    older = f"{name}_dict"
    key = older if hf.get(older) is not None else name
    whole = hf["model_type"] == "clip" or key in hf
    tower = hf.get(key) if whole else hf
    tower = {} if tower is None else tower
    if not isinstance(tower, dict):
        raise ValueError(f"{key}={brief(tower)} of {_CLIP_FILE} must be a dictionary of sizes")
    return tower, f"{key} in {_CLIP_FILE}" if whole else _CLIP_FILE


def _required(hf: Hf, key: str, where: str) -> Any:
    if key not in hf:
        raise ValueError(
            f"{key} is missing in {where}, which has {sorted(hf)[:20]}; give the file of the model "
            "whose weights are read"
        )
    return hf[key]


def require_supported(hf: Hf, allowed: Mapping[str, tuple], where: str) -> None:
    """Raises ValueError for a key of a file, or of its section, that has none of the values that
    are `allowed` for it; `where` as in `checked`."""
    for key, values in allowed.items():
        if key in hf and hf[key] not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(
                f"{key}={brief(hf[key])} of {where} is not supported: it must be {expected}; take "
                "another model"
            )


def _patches(name: str, patch: int) -> Entry:
    """A convolution whose stride is its side, [D, 3, rows, columns], as the kernel (rows * columns
    * 3, D) of a product."""
    whole = convolution(name)

    def write(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        return whole.write(kernel.reshape(patch, patch, 3, kernel.shape[-1]))

    return Entry(whole.names, lambda x: whole.read(x).reshape(-1, x.shape[0]), write)


def _batch_norm(source: str, target: str) -> dict[str, Entry]:
    return {
        **norm(source, target),
        f"{target}/mean": copy(f"{source}.running_mean"),
        f"{target}/var": copy(f"{source}.running_var"),
    }


def _clip_blocks(config: ClipVisionConfig | ClipTextConfig, tower: str) -> dict[str, Entry]:
    table = {}
    for i in range(config.layers):
        source, target = f"{tower}.encoder.layers.{i}", f"layer_{i}"
        queries, keys, values, out = (
            f"{source}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")
        )
        attention = f"{target}/attention"
        table |= self_attention((queries, keys, values), out, attention, heads=config.heads)
        table |= norm(f"{source}.layer_norm1", f"{target}/attention_norm")
        table |= norm(f"{source}.layer_norm2", f"{target}/mlp_norm")
        table |= linear(f"{source}.mlp.fc1", f"{target}/mlp/up")
        table |= linear(f"{source}.mlp.fc2", f"{target}/mlp/down")
    return table
