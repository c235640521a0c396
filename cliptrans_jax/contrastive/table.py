"""The table of contrastive losses, by the value of config.clip.loss."""

import types
from collections.abc import Mapping

from cliptrans_jax.contrastive.objective import Contrastive
from cliptrans_jax.contrastive.sigmoid import SIGMOID
from cliptrans_jax.contrastive.softmax import SOFTMAX

CONTRASTIVE: Mapping[str, Contrastive] = types.MappingProxyType(
    {"softmax": SOFTMAX, "sigmoid": SIGMOID}
)
