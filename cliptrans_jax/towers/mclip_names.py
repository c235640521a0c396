"""Tensor names of M-CLIP's text tower in its own files (CLIPTrans, M-CLIP)."""

from cliptrans_jax.towers.mclip import MClipConfig
from common_jax.weights.entries import copy, linear, norm, self_attention
from common_jax.weights.table import Table

LEFT_OUT = {
    r"transformer\.embeddings\.position_ids": "a buffer that counts 0, 1, 2, ...",
    r"transformer\.pooler\.dense\.(weight|bias)": "a pooler, which M-CLIP does not use",
}


def table(config: MClipConfig) -> Table:
    """Names of `towers.mclip.MClip`."""
    source = "transformer.embeddings"
    entries = {
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
        entries |= self_attention(
            (queries, keys, values),
            f"{source}.attention.output.dense",
            f"{target}/attention",
            heads=config.heads,
        )
        entries |= norm(f"{source}.attention.output.LayerNorm", f"{target}/attention_norm")
        entries |= linear(f"{source}.intermediate.dense", f"{target}/mlp/up")
        entries |= linear(f"{source}.output.dense", f"{target}/mlp/down")
        entries |= norm(f"{source}.output.LayerNorm", f"{target}/mlp_norm")
    return Table(entries, left_out=LEFT_OUT)
