"""Tables of tensor names: mBART as Hugging Face publishes it, and CLIPTrans' own files."""

from cliptrans_jax import names
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.names import Entry, Table
from cliptrans_jax.translators.mbart import MBartConfig

EMBEDDING = "model.shared.weight"
# One matrix under four names.
ALIASES = {
    "model.encoder.embed_tokens.weight": EMBEDDING,
    "model.decoder.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": EMBEDDING,
}


def mbart_table(config: MBartConfig) -> Table:
    """mBART's tensors by our paths in "mbart", under the names of a published file."""
    table = {
        "embedding": names.copy(EMBEDDING),
        "logits_bias": _row("final_logits_bias"),
    }
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    heads = {"encoder": config.encoder_heads, "decoder": config.decoder_heads}
    for side, count in layers.items():
        source = f"model.{side}"
        table[f"{side}/positions/embedding"] = names.copy(f"{source}.embed_positions.weight")
        table |= names.norm(f"{source}.layernorm_embedding", f"{side}/embedding_norm")
        table |= names.norm(f"{source}.layer_norm", f"{side}/norm")
        for index in range(count):
            layer = _encoder_layer(f"{source}.layers.{index}", heads[side])
            if side == "decoder":
                layer |= _cross_attention(f"{source}.layers.{index}", heads[side])
            table |= names.below(layer, source="", target=f"{side}/layer_{index}/")
    return table


def mapper_table(config: MapperConfig) -> Table:
    """A mapping network's tensors by our paths in "mapper", without the prefix "adapter."."""
    return MAPPERS[config.kind]()


def cliptrans_table(config: ModelConfig) -> Table:
    """The whole model's, as in a CLIPTrans checkpoint without "module."."""
    table = names.below(mbart_table(config.mbart), source="mbart.", target="mbart/")
    if config.mapper.prefix:
        mapper = mapper_table(config.mapper)
        table |= names.below(mapper, source="adapter.", target="mapper/")
    return table


def cliptrans_aliases() -> dict[str, str]:
    """`ALIASES` in a CLIPTrans checkpoint."""
    return {f"mbart.{alias}": f"mbart.{name}" for alias, name in ALIASES.items()}


def _encoder_layer(source: str, heads: int) -> dict[str, Entry]:
    attention = f"{source}.self_attn"
    projections = tuple(f"{attention}.{part}_proj" for part in "qkv")
    return (
        names.self_attention(projections, f"{attention}.out_proj", "attention", heads=heads)
        | names.norm(f"{source}.self_attn_layer_norm", "attention_norm")
        | names.linear(f"{source}.fc1", "mlp/up")
        | names.linear(f"{source}.fc2", "mlp/down")
        | names.norm(f"{source}.final_layer_norm", "mlp_norm")
    )


def _cross_attention(source: str, heads: int) -> dict[str, Entry]:
    attention, target = f"{source}.encoder_attn", "cross_attention"
    pair = tuple(f"{attention}.{part}_proj" for part in "kv")
    return {
        f"{target}/query/kernel": _one(
            names.split_heads((f"{attention}.q_proj.weight",), heads), 1
        ),
        f"{target}/query/bias": _one(
            names.split_head_biases((f"{attention}.q_proj.bias",), heads), 0
        ),
        f"{target}/memory/kernel": names.split_heads(tuple(f"{p}.weight" for p in pair), heads),
        f"{target}/memory/bias": names.split_head_biases(tuple(f"{p}.bias" for p in pair), heads),
        f"{target}/out/kernel": names.join_heads(f"{attention}.out_proj.weight", heads),
        f"{target}/out/bias": names.copy(f"{attention}.out_proj.bias"),
    } | names.norm(f"{source}.encoder_attn_layer_norm", "cross_attention_norm")


def _one(entry: Entry, axis: int) -> Entry:
    """A projection of one part, without the axis of parts."""
    return Entry(
        entry.names,
        lambda x: entry.read(x).squeeze(axis),
        lambda x: entry.write(x[:, None] if axis else x[None]),
    )


def _row(name: str) -> Entry:
    """[1, V] as (V,)."""
    return Entry((name,), lambda x: x[0], lambda x: (x[None],))


def _mlp() -> Table:
    return names.linear("hidden.0", "out") | {"prelu/slope": names.copy("hidden.1.weight")}


def _hidden_mlp() -> Table:
    return (
        names.linear("hidden.0", "hidden")
        | names.linear("hidden.2", "out")
        | {"prelu/slope": names.copy("hidden.3.weight")}
    )


def _transformer() -> Table:
    layer = "transformer.layers.0"
    return (
        names.linear("projector", "project")
        | names.stacked_attention(f"{layer}.self_attn", "attention", heads=2)
        | names.norm(f"{layer}.norm1", "attention_norm")
        | names.linear(f"{layer}.linear1", "up")
        | names.linear(f"{layer}.linear2", "down")
        | names.norm(f"{layer}.norm2", "mlp_norm")
    )


MAPPERS = {"mlp": _mlp, "hidden_mlp": _hidden_mlp, "transformer": _transformer}
