"""m2mKD of a small NAC on CIFAR-10, at sizes that two CPU cores can train.

    python -m m2mkd_jax.main --config=configs/m2mkd/cifar10_nac.py:phase=pipeline \\
        --workdir=runs/cifar10_nac --config.data.path=/data/cifar10 --config.data.per_class=500

Data, augmentation, meta model and teacher are those of cifar10_vmoe.py: trained ones are taken over
by `--config.sources.meta=DIR --config.sources.teacher=DIR`. The mediators start from a scale-free
graph.

Arguments: `phase` and `module`, as in cifar10_vmoe.py.
"""

import dataclasses

import ml_collections

from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig
from m2mkd_jax.config import Config, FewShotConfig, Recipe, choose_recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.models.nac.graphs import PriorConfig
from m2mkd_jax.models.nac.model import NacConfig
from m2mkd_jax.models.nac.tokenizer import TokenizerConfig
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.regularizers import HingeConfig, RegularizersConfig

AUGMENT = AugmentConfig(padding=4, flip=True)
OPTIM = OptimConfig(
    batch=128,
    lr=2e-3,
    lr_per=None,
    schedule="warmup_cosine",
    warmup_steps=39,
    warmup_lr=0.0,
    min_lr=1e-5,
    clip=1.0,
)
EPOCH = 39  # updates in an epoch of 500 images a class


def recipe(epochs: int, **optim) -> Recipe:
    return Recipe(dataclasses.replace(OPTIM, steps=epochs * EPOCH, **optim), AUGMENT)


RECIPES = {
    "pretrain_meta": recipe(10),
    "train_module": recipe(5),
    "assemble": recipe(5),
    "distill": recipe(5),
    "end_to_end": recipe(10),
}
# By itself, not in the pipeline.
FEW_SHOT = Recipe(dataclasses.replace(OPTIM, batch=20, epochs=60, warmup_steps=5), AUGMENT)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"phase": "pipeline", "module": "all"})
    vit = ViTConfig(patch=4, width=96, heads=3)
    config = Config(
        phase=args.phase,
        module=args.module,
        data=DataConfig(
            source="folder",
            image_size=32,
            channels=3,
            labels=10,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        meta=dataclasses.replace(vit, depths=(1, 1, 1, 1)),
        teacher=dataclasses.replace(vit, depths=(2, 2, 2, 2)),
        model=NacConfig(
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
        ),
        regularizers=RegularizersConfig(hinge=HingeConfig(weight=0.1, hinge=0.4)),
        few_shot=FewShotConfig(ways=4, shots=5, test_shots=15),
        run=RunConfig(log_every=39, eval_every=5, checkpoint_every=5),
    )
    recipes = RECIPES if args.phase == "pipeline" else RECIPES | {"few_shot": FEW_SHOT}
    return choose_recipe(unfreeze(config), recipes)
