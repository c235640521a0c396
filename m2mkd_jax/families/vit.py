"""The family of ViTs: meta models and teachers."""

from typing import Any

from common_jax.weights import Adapt
from m2mkd_jax.families.family import Context, Family
from m2mkd_jax.models import encoder, vit
from m2mkd_jax.models.positions import resizer
from m2mkd_jax.stages import Network

HEAD = r"\w+/stage_\d+/head/.*"


def build(section: vit.ViTConfig, context: Context, drop_path: float) -> Network:
    """The whole ViT; its stages are its modules."""
    return vit.build(section, context.interface, dtype=context.dtype, drop_path=drop_path)


def tokens(section: vit.ViTConfig, interface: encoder.Interface) -> int:
    """Tokens between two stages."""
    return encoder.tokens(section.encoder, interface)


def leading(section: vit.ViTConfig) -> dict[str, Any]:
    """Fields that say which tokens come before the patches."""
    return {"class_token": section.class_token, "registers": section.registers}


def leading_tokens(section: vit.ViTConfig) -> int:
    """Tokens before those of the patches."""
    return section.encoder.leading


def resize(section: vit.ViTConfig) -> dict[str, Adapt]:
    """Position tables, resized to the number of an image's patches."""
    return {r".*/pos_embed": resizer(section.encoder.leading_positions)}


FAMILY = Family(
    config=vit.ViTConfig,
    roles=("meta", "teacher"),
    whole=build,
    modules=build,
    rules=vit.PARTITION_RULES,
    head=HEAD,
    adapt=resize,
    tokens=tokens,
    leading=leading,
    leading_tokens=leading_tokens,
)
