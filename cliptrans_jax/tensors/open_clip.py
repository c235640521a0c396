"""What OpenCLIP says about a model, in the open_clip_config.json beside its weights."""

import reprlib
from collections.abc import Mapping
from typing import Any

from cliptrans_jax.convert_towers import checked
from cliptrans_jax.models.clip import ClipTextConfig

FILE = "open_clip_config.json"
_FIELDS = {
    "vocab": "vocab_size",
    "positions": "context_length",
    "width": "width",
    "layers": "layers",
    "heads": "heads",
}
# What else changes a text tower, and the values that can be computed.
_ALLOWED: Mapping[str, tuple] = {
    "ls_init_value": (None,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    "hf_model_name": (None, ""),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}),
}


def text_config(content: Mapping[str, Any]) -> ClipTextConfig:
    """Sizes of a text tower; what is left out is as in OpenCLIP's `CLIPTextCfg`, and a model
    without `quick_gelu` has the GELU.

    Raises:
      ValueError: naming the key and the value that is missing, of another type, or that the tower
        cannot be computed with.
    """
    model = _section(content, "model_cfg")
    text = _section(model, "text_cfg")
    for key, values in _ALLOWED.items():
        if key in text and text[key] not in values:
            raise ValueError(
                f"{key}={reprlib.repr(text[key])} of text_cfg in {FILE} is not supported: it must "
                f"be {values[0]!r}; take another model"
            )
    quick, ratio = model.get("quick_gelu", False), text.get("mlp_ratio", 4.0)
    if not isinstance(quick, bool):
        raise ValueError(f"quick_gelu={reprlib.repr(quick)} in {FILE} must be true or false")
    if not isinstance(ratio, int | float) or not 0 < ratio < 100:
        raise ValueError(f"mlp_ratio={reprlib.repr(ratio)} in {FILE} must be a positive number")
    if "embed_dim" not in model:
        raise ValueError(f"{FILE} lacks embed_dim in model_cfg, which has {sorted(model)[:20]}")
    features = checked(model, {"features": "embed_dim"}, ClipTextConfig, "OpenCLIP")
    sizes = checked(text, _FIELDS, ClipTextConfig, "OpenCLIP")
    width = sizes.get("width", ClipTextConfig().width)
    return ClipTextConfig(
        **sizes,
        **features,
        hidden=int(width * ratio),
        activation="quick_gelu" if quick else "gelu",
    )


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content.get(key)
    if not isinstance(section, dict):
        raise ValueError(
            f"{key}={reprlib.repr(section)} in {FILE} must be a dictionary; download the file again"
        )
    return section
