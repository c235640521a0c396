"""The phases of m2mKD: one entry each in `PHASES`, in pipeline order."""

import types
from collections.abc import Mapping

from m2mkd_jax.phases import assemble, distill, end_to_end, few_shot, pretrain_meta, train_module
from m2mkd_jax.phases.phase import Phase

PHASES: Mapping[str, Phase] = types.MappingProxyType(
    {
        "pretrain_meta": pretrain_meta.PHASE,
        "train_module": train_module.PHASE,
        "assemble": assemble.PHASE,
        "distill": distill.PHASE,
        "end_to_end": end_to_end.PHASE,
        "few_shot": few_shot.PHASE,
    }
)
