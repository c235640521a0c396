"""m2mKD for a small NAC on CIFAR-10, at sizes that two CPU cores can train.

    python -m m2mkd_jax.main --config=configs/m2mkd/cifar10_nac.py:phase=pipeline \\
        --workdir=runs/cifar10_nac --config.data.path=/data/cifar10 --config.data.per_class=500

Everything but the student is as in cifar10_vmoe.py, whose meta models and teachers can be reused:
`--config.sources.meta=DIR --config.sources.teacher=DIR`. The mediators start from a scale-free
graph.

Arguments: `phase`, `module` and `scale`, as in cifar10_vmoe.py.
"""

import ml_collections

from common_jax.command_line import load_beside
from common_jax.config import unfreeze
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.regularizers import HingeConfig, RegularizersConfig

MODEL = NacConfig(
    tokenizer=TokenizerConfig(preset="atto", stages=2, width=128, grid_width=16),
    inputs=16,
    mediators=48,
    outputs=8,
    iterations=2,
    width=96,
    code_width=96,
    signature_width=16,
    heads=4,
    head_width=24,
    prior=PriorConfig("barabasi_albert", attachments=2),
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    config = load_beside(__file__, "cifar10_vmoe").get_config(arg)
    config.model = unfreeze(MODEL)
    config.regularizers = unfreeze(RegularizersConfig(hinge=HingeConfig(weight=0.1, hinge=0.4)))
    return config
