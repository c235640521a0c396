"""Tensor names of mBART as Hugging Face publishes it."""

from cliptrans_jax.translators import transformer_names
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.weights.entries import Entry
from common_jax.weights.table import Table


def table(config: MBartConfig) -> Table:
    """Maps our paths below "mbart/" to the tensor names of an mBART."""
    # A tensor [1, V].
    bias = Entry(("final_logits_bias",), lambda x: x[0], lambda x: (x[None],), fill=0.0)
    shared = transformer_names.table(config)
    return Table(shared.entries | {"logits_bias": bias}, shared.aliases)
