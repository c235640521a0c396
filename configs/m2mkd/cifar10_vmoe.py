"""m2mKD for a small V-MoE on CIFAR-10, at sizes that two CPU cores can train.

    python -m m2mkd_jax.main --config=configs/m2mkd/cifar10_vmoe.py:phase=pipeline \\
        --workdir=runs/cifar10 --config.data.path=/data/cifar10 --config.data.per_class=500

The folder holds train/CLASS/*.jpg and test/CLASS/*.jpg, or train.zip and test.zip of these. Images
are only cropped and mirrored. `config.data.per_class` selects a subset: 500 images per class are a
tenth of the set. The lengths of phases are set in updates, so runs on fewer images take as long.

Arguments: `phase` (pipeline, pretrain_meta, train_module, assemble, distill, end_to_end,
  few_shot), `module` ("all", or stage numbers such as 2 or 0+3) and `scale`, as in digits.py.
"""

import dataclasses

import ml_collections

from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig, scale_lengths
from m2mkd_jax.config import Config, FewShotConfig, Recipe, choose_recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import MoeConfig

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
EPOCH = 39  # updates per epoch with 500 images per class


def recipe(epochs: int) -> Recipe:
    return Recipe(dataclasses.replace(OPTIM, steps=epochs * EPOCH), AUGMENT)


RECIPES = {
    "pretrain_meta": recipe(10),
    "train_module": recipe(5),
    "assemble": recipe(5),
    "distill": recipe(5),
    "end_to_end": recipe(10),
}
# Not part of the pipeline.
FEW_SHOT = Recipe(dataclasses.replace(OPTIM, batch=20, epochs=60, warmup_steps=5), AUGMENT)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"phase": "pipeline", "module": "all", "scale": 1.0})
    vit = ViTConfig(patch=4, width=96, heads=3)
    config = unfreeze(
        Config(
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
            model=VMoEConfig(
                patch=4, width=96, heads=3, depths=(1, 1, 1, 1), moe=MoeConfig(experts=4, chosen=2)
            ),
            few_shot=FewShotConfig(ways=4, shots=5, test_shots=15),
            run=RunConfig(log_every=39, eval_every=5, checkpoint_every=5),
        )
    )
    recipes = RECIPES if args.phase == "pipeline" else RECIPES | {"few_shot": FEW_SHOT}
    return choose_recipe(config, scale_lengths(recipes, args.scale))
