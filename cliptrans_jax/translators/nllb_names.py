"""Tensor names of NLLB-200 and M2M-100 as Hugging Face publishes them."""

import dataclasses

from cliptrans_jax.translators import transformer_names
from cliptrans_jax.translators.nllb import NllbConfig
from common_jax.weights.table import Table

LEFT_OUT = {r"model\.(encoder|decoder)\.embed_positions\.weights": "sinusoids, which are computed"}


def table(config: NllbConfig) -> Table:
    """Maps our paths below "nllb/" to the tensor names of an NLLB."""
    return dataclasses.replace(transformer_names.table(config), left_out=LEFT_OUT)
