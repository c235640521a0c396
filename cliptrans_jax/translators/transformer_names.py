"""Tensor names that mBART, M2M-100 and NLLB-200 share, as Hugging Face publishes them."""

from cliptrans_jax.translators.transformer import TransformerConfig
from common_jax.weights import entries
from common_jax.weights.entries import Entry
from common_jax.weights.table import Table

EMBEDDING = "model.shared.weight"
# One matrix under four names; all but the first may be missing.
ALIASES = {
    "model.encoder.embed_tokens.weight": EMBEDDING,
    "model.decoder.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": EMBEDDING,
}


def table(config: TransformerConfig) -> Table:
    """Maps our paths below a `Transformer`'s subtree to tensor names."""
    table_entries = {"embedding": entries.copy(EMBEDDING)}
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    heads = {"encoder": config.encoder_heads, "decoder": config.decoder_heads}
    for side, count in layers.items():
        source = f"model.{side}"
        if config.learned_positions:
            positions = entries.copy(f"{source}.embed_positions.weight")
            table_entries[f"{side}/positions/embedding"] = positions
        if config.embedding_norm:
            norm = entries.norm(f"{source}.layernorm_embedding", f"{side}/embedding_norm")
            table_entries |= norm
        table_entries |= entries.norm(f"{source}.layer_norm", f"{side}/norm")
        for index in range(count):
            layer = _encoder_layer(f"{source}.layers.{index}", heads[side])
            if side == "decoder":
                layer |= _cross_attention(f"{source}.layers.{index}", heads[side])
            table_entries |= entries.below(layer, source="", target=f"{side}/layer_{index}/")
    return Table(table_entries, ALIASES)


def _encoder_layer(source: str, heads: int) -> dict[str, Entry]:
    attention = f"{source}.self_attn"
    projections = tuple(f"{attention}.{part}_proj" for part in "qkv")
    return (
        entries.self_attention(projections, f"{attention}.out_proj", "attention", heads=heads)
        | entries.norm(f"{source}.self_attn_layer_norm", "attention_norm")
        | entries.linear(f"{source}.fc1", "mlp/up")
        | entries.linear(f"{source}.fc2", "mlp/down")
        | entries.norm(f"{source}.final_layer_norm", "mlp_norm")  # before the MLP, despite its name
    )


def _cross_attention(source: str, heads: int) -> dict[str, Entry]:
    attention, target = f"{source}.encoder_attn", "cross_attention"
    pair = tuple(f"{attention}.{part}_proj" for part in "kv")
    return {
        f"{target}/query/kernel": entries.single_heads(f"{attention}.q_proj.weight", heads),
        f"{target}/query/bias": entries.single_heads(f"{attention}.q_proj.bias", heads),
        f"{target}/memory/kernel": entries.split_heads(tuple(f"{p}.weight" for p in pair), heads),
        f"{target}/memory/bias": entries.split_heads(tuple(f"{p}.bias" for p in pair), heads),
        f"{target}/out/kernel": entries.join_heads(f"{attention}.out_proj.weight", heads),
        f"{target}/out/bias": entries.copy(f"{attention}.out_proj.bias"),
    } | entries.norm(f"{source}.encoder_attn_layer_norm", "cross_attention_norm")
