"""The table of translators, by the name of their section in `config.model`."""

import types
from collections.abc import Mapping

from cliptrans_jax.translators import mbart, nllb
from cliptrans_jax.translators.translator import Architecture

TRANSLATORS: Mapping[str, Architecture] = types.MappingProxyType(
    {"mbart": mbart.ARCHITECTURE, "nllb": nllb.ARCHITECTURE}
)
