"""Configs of SigLIP's towers from the config.json of Hugging Face repositories."""

from typing import Any

from cliptrans_jax.tensors.config_json import Hf, checked, require_supported, tower_section
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig

_FILE = "SigLIP's config.json"
_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "eps": "layer_norm_eps",
}
VISION_FIELDS = _FIELDS | {"image": "image_size", "patch": "patch_size"}
TEXT_FIELDS = _FIELDS | {
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "features": "projection_size",
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "vision_use_head": (True,),
}
UNUSED = ("attention_dropout",)  # dropout rates; the account mentions them
NAFLEX = "siglip2"  # the model type, and the beginning of its towers' model types


def vision_config(hf: Hf) -> SiglipVisionConfig:
    """The config of an image tower, from the config.json of a whole SigLIP or of the tower alone.

    Missing keys have Hugging Face's defaults, those of google/siglip-base-patch16-224.

    Raises:
      ValueError: naming a key with an unsupported value, such as the model type of NaFlex.
    """
    tower, where = _section(hf, "vision")
    return SiglipVisionConfig(**checked(tower, VISION_FIELDS, SiglipVisionConfig, where))


def text_config(hf: Hf) -> SiglipTextConfig:
    """The same for a text tower. Pads have id 0, as in every SigLIP 2, whatever the file says."""
    tower, where = _section(hf, "text")
    sizes = checked({"vocab_size": 32000} | tower, TEXT_FIELDS, SiglipTextConfig, where)
    return SiglipTextConfig(**{"features": sizes.get("width", 768)} | sizes)


def _section(hf: Hf, side: str) -> tuple[dict[str, Any], str]:
    """A tower's section, checked and without null keys, and its name for messages."""
    kind = hf.get("model_type")
    if isinstance(kind, str) and kind.startswith(NAFLEX):
        raise ValueError(
            f"model_type={kind!r} of {_FILE} is NaFlex, which takes pictures in their own aspect "
            "ratio and is not supported; use a SigLIP 2 for pictures of one size, such as "
            "google/siglip2-base-patch16-224"
        )
    tower, where = tower_section(hf, side, family="siglip", file=_FILE)
    given = {key: value for key, value in tower.items() if value is not None}
    require_supported(given, _ALLOWED, where)
    return given, where
