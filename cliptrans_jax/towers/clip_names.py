"""Tensor names of CLIP's ViT and text tower in files from Hugging Face and OpenAI.

A file has both towers; each table leaves out the other's tensors.
"""

from collections.abc import Callable
from typing import Any

from cliptrans_jax.towers.clip import ClipTextConfig, ClipVisionConfig
from common_jax.weights.entries import (
    Entry,
    copy,
    linear,
    norm,
    patches,
    self_attention,
    stacked_attention,
    transpose,
)
from common_jax.weights.table import Table

_OTHER_TOWER = "belongs to the other tower, which is read separately"
_LEFT_OUT = {
    r"(text|vision)_model\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
    r"logit_scale": "the temperature of CLIP's own training",
}
OPENAI_LEFT_OUT = {
    r"logit_scale": "the temperature of CLIP's own training",
    r"input_resolution|context_length|vocab_size": "a size, which is in the config",
}
OPENAI_TEXT_TOWER = {
    r"transformer\..*|ln_final\..*|text_projection": _OTHER_TOWER,
    r"token_embedding\.weight|positional_embedding": _OTHER_TOWER,
}


def vision_table(config: ClipVisionConfig) -> Table:
    """Names of `towers.clip.ClipVision` in Hugging Face's files."""
    entries = {
        "class_token": copy("vision_model.embeddings.class_embedding"),
        "positions": copy("vision_model.embeddings.position_embedding.weight"),
        "patches/kernel": patches("vision_model.embeddings.patch_embedding.weight"),
        **norm("vision_model.pre_layrnorm", "pre_norm"),  # misspelled in the files
        **blocks(config, "vision_model.encoder.layers"),
        **norm("vision_model.post_layernorm", "post_norm"),
        "projection/kernel": transpose("visual_projection.weight"),
    }
    other = {r"text_model\..*|text_projection\.weight": _OTHER_TOWER}
    return Table(entries, left_out=_LEFT_OUT | other)


def text_table(config: ClipTextConfig) -> Table:
    """Names of `towers.clip.ClipText` in Hugging Face's files."""
    entries = {
        "words": copy("text_model.embeddings.token_embedding.weight"),
        "positions": copy("text_model.embeddings.position_embedding.weight"),
        **blocks(config, "text_model.encoder.layers"),
        **norm("text_model.final_layer_norm", "final_norm"),
        "projection/kernel": transpose("text_projection.weight"),
    }
    other = {r"vision_model\..*|visual_projection\.weight": _OTHER_TOWER}
    return Table(entries, left_out=_LEFT_OUT | other)


def openai_vision_table(config: ClipVisionConfig) -> Table:
    """Names of `towers.clip.ClipVision` in OpenAI's files."""
    entries = {
        "class_token": copy("visual.class_embedding"),
        "positions": copy("visual.positional_embedding"),
        "patches/kernel": patches("visual.conv1.weight"),
        **norm("visual.ln_pre", "pre_norm"),
        **_blocks(config, "visual.transformer.resblocks", _openai_block),
        **norm("visual.ln_post", "post_norm"),
        "projection/kernel": copy("visual.proj"),  # stored (in, out)
    }
    return Table(entries, left_out=OPENAI_LEFT_OUT | OPENAI_TEXT_TOWER)


def openai_text_table(config: ClipTextConfig) -> Table:
    """Names of `towers.clip.ClipText` in OpenAI's files."""
    entries = {
        "words": copy("token_embedding.weight"),
        "positions": copy("positional_embedding"),
        **_blocks(config, "transformer.resblocks", _openai_block),
        **norm("ln_final", "final_norm"),
        "projection/kernel": copy("text_projection"),  # stored (in, out)
    }
    return Table(entries, left_out=OPENAI_LEFT_OUT | {r"visual\..*": _OTHER_TOWER})


def blocks(config: Any, source: str) -> dict[str, Entry]:
    """Entries of the `layers` blocks of a tower below `source`, as Hugging Face names them."""
    return _blocks(config, source, _block)


def _blocks(
    config: Any, source: str, of_one: Callable[[str, str, int], dict[str, Entry]]
) -> dict[str, Entry]:
    entries = {}
    for i in range(config.layers):
        entries |= of_one(f"{source}.{i}", f"layer_{i}", config.heads)
    return entries


def _block(source: str, target: str, heads: int) -> dict[str, Entry]:
    queries, keys, values, out = (
        f"{source}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")
    )
    return {
        **self_attention((queries, keys, values), out, f"{target}/attention", heads=heads),
        **norm(f"{source}.layer_norm1", f"{target}/attention_norm"),
        **norm(f"{source}.layer_norm2", f"{target}/mlp_norm"),
        **linear(f"{source}.mlp.fc1", f"{target}/mlp/up"),
        **linear(f"{source}.mlp.fc2", f"{target}/mlp/down"),
    }


def _openai_block(source: str, target: str, heads: int) -> dict[str, Entry]:
    return {
        **stacked_attention(f"{source}.attn", f"{target}/attention", heads=heads),
        **norm(f"{source}.ln_1", f"{target}/attention_norm"),
        **norm(f"{source}.ln_2", f"{target}/mlp_norm"),
        **linear(f"{source}.mlp.c_fc", f"{target}/mlp/up"),
        **linear(f"{source}.mlp.c_proj", f"{target}/mlp/down"),
    }
