"""Tensor names of CLIPTrans' own checkpoints: mBART and a mapping network."""

from collections.abc import Callable, Mapping

from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.translators import mbart_names
from common_jax.weights.entries import Entry, copy, linear, norm, stacked_attention
from common_jax.weights.table import Table

LEFT_OUT = {r"clip\..*": 'of the text tower, which is read separately (kind="mclip", "clip_text")'}


def table(config: ModelConfig) -> Table:
    """Tensor names of the whole model, as in a checkpoint without "module.".

    Raises:
      ValueError: for a translator other than mBART.
    """
    if config.translator != "mbart":
        raise ValueError(
            f"model.translator={config.translator!r}: CLIPTrans' own checkpoints contain an mBART; "
            "use the folder of a run"
        )
    mbart = mbart_names.table(config.mbart).below(source="mbart.", target="mbart/")
    mapper = mapper_table(config.mapper).below(source="adapter.", target="mapper/")
    return Table(mbart.entries | mapper.entries, mbart.aliases, LEFT_OUT)


def mapper_table(config: MapperConfig) -> Table:
    """Maps our paths below "mapper/" to tensor names below "adapter.".

    Raises:
      ValueError: for a mapping network without names.
    """
    if config.prefix and config.kind not in MAPPERS:
        raise ValueError(
            f"mapper.kind={config.kind!r} cannot be exported: it has no names in MAPPERS of "
            f"cliptrans_jax/models/cliptrans_names.py, only {', '.join(MAPPERS)} have"
        )
    return Table(MAPPERS[config.kind]() if config.prefix else {})


def _mlp() -> dict[str, Entry]:
    return linear("hidden.0", "out") | {"prelu/slope": copy("hidden.1.weight")}


def _hidden_mlp() -> dict[str, Entry]:
    # Numbered as the parts of a torch.nn.Sequential; number 1, a ReLU, has no parameters.
    return (
        linear("hidden.0", "hidden")
        | linear("hidden.2", "out")
        | {"prelu/slope": copy("hidden.3.weight")}
    )


def _transformer() -> dict[str, Entry]:
    layer = "transformer.layers.0"
    return (
        linear("projector", "project")
        | stacked_attention(f"{layer}.self_attn", "attention", heads=2)
        | norm(f"{layer}.norm1", "attention_norm")
        | linear(f"{layer}.linear1", "up")
        | linear(f"{layer}.linear2", "down")
        | norm(f"{layer}.norm2", "mlp_norm")
    )


MAPPERS: Mapping[str, Callable[[], dict[str, Entry]]] = {
    "mlp": _mlp,
    "hidden_mlp": _hidden_mlp,
    "transformer": _transformer,
}
