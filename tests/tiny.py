"""Configs of runs small enough for tests: digits cut into 4 patches, networks of width 16."""

import dataclasses

from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig
from m2mkd_jax.config import Config, Recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.models.moe import MoeConfig
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig

SIZES = {"patch": 4, "width": 16, "heads": 2, "mlp_ratio": 2.0}
MOE = MoeConfig(experts=4, chosen=2, expert_init="fan_in")
OPTIM = OptimConfig(
    steps=6, batch=64, lr=1e-3, lr_per=None, schedule="warmup_cosine", warmup_epochs=0, clip=1.0
)
AUGMENT = AugmentConfig(mixup=0.2, cutmix=1.0, smoothing=0.1, padding=1)


def tiny_config(phase: str, *, moe: MoeConfig = MOE, optim: OptimConfig = OPTIM) -> Config:
    """A run of three stages that logs and saves often."""
    vit = ViTConfig(depths=(1, 1, 1), **SIZES)
    return Config(
        phase=phase,
        meta=vit,
        teacher=dataclasses.replace(vit, depths=(2, 1, 1)),
        model=VMoEConfig(depths=(1, 1, 1), moe=moe, **SIZES),
        optim=optim,
        augment=AUGMENT,
        drop_path=0.1,
        mesh=MeshConfig(data=1),
        run=RunConfig(log_every=2, compilation_cache=None),
    )


def tiny_pipeline() -> Config:
    """The same with a recipe for every phase."""
    config = tiny_config("pipeline")
    recipe = Recipe(config.optim, config.augment, config.drop_path)
    few_shot = dataclasses.replace(
        recipe, optim=dataclasses.replace(config.optim, batch=8, steps=2)
    )
    phases = ("pretrain_meta", "train_module", "assemble", "distill", "end_to_end")
    recipes = dict.fromkeys(phases, recipe) | {"few_shot": few_shot}
    return dataclasses.replace(config, recipes=recipes)
