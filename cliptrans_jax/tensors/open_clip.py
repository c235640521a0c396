"""Configs from the open_clip_config.json that OpenCLIP puts beside its weights."""

from collections.abc import Mapping
from typing import Any

from cliptrans_jax.tensors.config_json import checked, require_supported
from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from common_jax.untrusted import brief

FILE = "open_clip_config.json"
_VISION = {"image": "image_size", "patch": "patch_size", "width": "width", "layers": "layers"}
_TEXT = {
    "vocab": "vocab_size",
    "positions": "context_length",
    "width": "width",
    "layers": "layers",
    "heads": "heads",
}
# Other keys that change a tower, with the supported values.
_BOTH: Mapping[str, tuple] = {
    "ls_init_value": (None,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
}
_VISION_ALLOWED: Mapping[str, tuple] = _BOTH | {
    "pool_type": ("tok",),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "final_ln_after_pool": (False,),
    "pos_embed_type": ("learnable",),
    "timm_model_name": (None, ""),
}
_TEXT_ALLOWED: Mapping[str, tuple] = _BOTH | {
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    "hf_model_name": (None, ""),
}


def text_config(content: Mapping[str, Any]) -> ClipTextConfig:
    """The config of a text tower. Missing keys default to OpenCLIP's `CLIPTextCfg`; without
    `quick_gelu`, the activation is GELU.

    Raises:
      ValueError: naming a key that is missing, of another type, or not supported.
    """
    model = _section(content, "model_cfg")
    text, where = _section(model, "text_cfg"), f"text_cfg in {FILE}"
    require_supported(text, _TEXT_ALLOWED, where)
    sizes = checked(text, _TEXT, ClipTextConfig, where)
    return ClipTextConfig(**sizes, **_shared(model, text, sizes.get("width", 512)))


def vision_config(content: Mapping[str, Any]) -> ClipVisionConfig:
    """The config of an image tower, a ViT. Missing keys default to OpenCLIP's `CLIPVisionCfg`.

    Raises:
      ValueError: as `text_config`.
    """
    model = _section(content, "model_cfg")
    vision, where = _section(model, "vision_cfg"), f"vision_cfg in {FILE}"
    require_supported(vision, _VISION_ALLOWED, where)
    sizes = {"patch": 16} | checked(vision, _VISION, ClipVisionConfig, where)
    width = sizes.get("width", 768)
    head = checked(vision, {"heads": "head_width"}, ClipVisionConfig, where).get("heads", 64)
    if width % head:
        raise ValueError(f"width={width} in {FILE} must be a multiple of head_width={head}")
    return ClipVisionConfig(**sizes, heads=width // head, **_shared(model, vision, width))


def _shared(model: Mapping[str, Any], tower: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Features, hidden width and activation, whose keys are the same for both towers."""
    quick, ratio = model.get("quick_gelu", False), tower.get("mlp_ratio", 4.0)
    if not isinstance(quick, bool):
        raise ValueError(f"quick_gelu={brief(quick)} in {FILE} must be true or false")
    if not isinstance(ratio, int | float) or not 0 < ratio < 100:
        raise ValueError(f"mlp_ratio={brief(ratio)} in {FILE} must be a positive number")
    if "embed_dim" not in model:
        raise ValueError(f"{FILE} lacks embed_dim in model_cfg, which has {sorted(model)[:20]}")
    return {
        **checked(model, {"features": "embed_dim"}, ClipTextConfig, f"model_cfg in {FILE}"),
        "hidden": int(width * ratio),
        "activation": "quick_gelu" if quick else "gelu",
    }


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content.get(key)
    if not isinstance(section, dict):
        raise ValueError(
            f"{key}={brief(section)} in {FILE} must be a dictionary; download the file again"
        )
    return section
