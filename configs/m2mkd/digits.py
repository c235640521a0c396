"""m2mKD on scikit-learn's digits: 1,437 training and 360 test images of 8 x 8, nothing to download.

    python -m m2mkd_jax.main --config=configs/m2mkd/digits.py:phase=pipeline --workdir=runs/digits

Arguments: `phase` (pipeline, pretrain_meta, train_module, assemble, distill, end_to_end, few_shot),
  `module` ("all", or stage numbers such as 2 or 0+3), and `scale`, which multiplies the length of
  every phase: `scale=0.1` for a quick try.
"""

import dataclasses
from collections.abc import Iterator

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

AUGMENT = AugmentConfig(rotate=10.0, scale=0.1, shift=0.7, smoothing=0.1)
OPTIM = OptimConfig(
    batch=64,
    lr=2e-3,
    lr_per=None,
    schedule="warmup_cosine",
    warmup_epochs=2,
    warmup_lr=0.0,
    min_lr=1e-5,
    clip=1.0,
)


def recipe(epochs: int, **optim) -> Recipe:
    return Recipe(dataclasses.replace(OPTIM, epochs=epochs, **optim), AUGMENT)


RECIPES = {
    "pretrain_meta": recipe(20),
    "train_module": recipe(10),
    "assemble": recipe(20, lr=1e-3),
    "distill": recipe(10),
    "end_to_end": recipe(20, lr=1e-3),
    # The batch is a whole episode, 4 ways x 5 shots.
    "few_shot": recipe(60, batch=20, warmup_epochs=5),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"phase": "pipeline", "module": "all", "scale": 1.0})
    vit = ViTConfig(patch=4, width=64, heads=4, mlp_ratio=2.0)
    config = unfreeze(
        Config(
            phase=args.phase,
            module=args.module,
            data=DataConfig(source="digits", image_size=8, channels=1, labels=10),
            meta=dataclasses.replace(vit, depths=(1, 1, 1, 1)),
            teacher=dataclasses.replace(vit, depths=(2, 2, 2, 2)),
            model=VMoEConfig(
                patch=4,
                width=48,
                heads=4,
                mlp_ratio=2.0,
                depths=(1, 1, 1, 1),
                moe=MoeConfig(experts=4, chosen=2, expert_init="fan_in"),
            ),
            few_shot=FewShotConfig(ways=4, shots=5, test_shots=15),
            run=RunConfig(log_every=11, eval_every=2, checkpoint_every=20),
        )
    )
    return choose_recipe(config, scale_lengths(RECIPES, args.scale))


def sweep() -> Iterator[dict[str, object]]:
    """Weights of the distillation, for tools/sweep.py; at 0 modules learn from labels only."""
    for alpha in (0.0, 0.3, 0.5, 0.7, 0.9):
        yield {"distill.alpha": alpha}
