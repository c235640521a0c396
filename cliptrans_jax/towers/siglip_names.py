"""Tensor names of SigLIP's towers in Hugging Face's files.

A file has both towers; each table leaves out the other's tensors.
"""

from cliptrans_jax.towers.clip_names import blocks
from cliptrans_jax.towers.siglip import SiglipTextConfig, SiglipVisionConfig
from common_jax.weights.entries import copy, linear, norm, patches, stacked_attention
from common_jax.weights.table import Table

_OTHER_TOWER = "belongs to the other tower, which is read separately"
_LEFT_OUT = {
    r"(text|vision)_model\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
    r"logit_scale|logit_bias": "temperature and bias of SigLIP's own training",
}


def vision_table(config: SiglipVisionConfig) -> Table:
    """Names of `towers.siglip.SiglipVision`."""
    head = "vision_model.head"
    entries = {
        "positions": copy("vision_model.embeddings.position_embedding.weight"),
        "patches/kernel": patches("vision_model.embeddings.patch_embedding.weight"),
        "patches/bias": copy("vision_model.embeddings.patch_embedding.bias"),
        **blocks(config, "vision_model.encoder.layers"),
        **norm("vision_model.post_layernorm", "final_norm"),
        "pool/probe": copy(f"{head}.probe"),
        **stacked_attention(f"{head}.attention", "pool/attention", heads=config.heads),
        **norm(f"{head}.layernorm", "pool/norm"),
        **linear(f"{head}.mlp.fc1", "pool/mlp/up"),
        **linear(f"{head}.mlp.fc2", "pool/mlp/down"),
    }
    return Table(entries, left_out=_LEFT_OUT | {r"text_model\..*": _OTHER_TOWER})


def text_table(config: SiglipTextConfig) -> Table:
    """Names of `towers.siglip.SiglipText`."""
    entries = {
        "words": copy("text_model.embeddings.token_embedding.weight"),
        "positions": copy("text_model.embeddings.position_embedding.weight"),
        **blocks(config, "text_model.encoder.layers"),
        **norm("text_model.final_layer_norm", "final_norm"),
        **linear("text_model.head", "projection"),
    }
    return Table(entries, left_out=_LEFT_OUT | {r"vision_model\..*": _OTHER_TOWER})
