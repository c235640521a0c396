"""Configs of runs small enough for tests: digits cut into 4 patches and networks of width 16."""

import dataclasses

import jax
import numpy as np
from jax import numpy as jnp
from meshes import one_device

from common_jax.checkpoint import Checkpoints
from common_jax.config import unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig
from common_jax.state import TrainState
from m2mkd_jax.config import Config, Recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.feed import Feed
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.phase import config_feed

SIZES = {"patch": 4, "width": 16, "heads": 2, "mlp_ratio": 2.0}
MOE = MoeConfig(experts=4, chosen=2, expert_init="fan_in")
NAC = NacConfig(
    tokenizer=TokenizerConfig("atto", stages=1, width=64, stem=2, grid_width=8),
    inputs=4,
    mediators=8,
    outputs=2,
    iterations=1,
    width=16,
    code_width=16,
    signature_width=8,
    heads=2,
    head_width=8,
    ffn_factor=1.0,
    prior=PriorConfig("ring_of_cliques", communities=2, steps=50),
)
OPTIM = OptimConfig(
    steps=6, batch=64, lr=1e-3, lr_per=None, schedule="warmup_cosine", warmup_epochs=0, clip=1.0
)
AUGMENT = AugmentConfig(mixup=0.2, cutmix=1.0, smoothing=0.1, padding=1)


def tiny_config(
    phase: str, *, moe: MoeConfig = MOE, optim: OptimConfig = OPTIM, stages: int = 3
) -> Config:
    """A config with few stages that logs and saves often."""
    depths = (1,) * stages
    vit = ViTConfig(depths=depths, **SIZES)
    return Config(
        phase=phase,
        meta=vit,
        teacher=dataclasses.replace(vit, depths=(2, *depths[1:])),
        model=VMoEConfig(depths=depths, moe=moe, **SIZES),
        optim=optim,
        augment=AUGMENT,
        drop_path=0.1,
        mesh=MeshConfig(data=1),
        run=RunConfig(log_every=2, compilation_cache=None),
    )


def tiny_pipeline(*, stages: int = 3) -> Config:
    """The same, with a recipe for every phase."""
    config = tiny_config("pipeline", stages=stages)
    recipe = Recipe(config.optim, config.augment, config.drop_path)
    few_shot = dataclasses.replace(
        recipe, optim=dataclasses.replace(config.optim, batch=8, steps=2)
    )
    phases = ("pretrain_meta", "train_module", "assemble", "distill", "end_to_end")
    recipes = dict.fromkeys(phases, recipe) | {"few_shot": few_shot}
    return dataclasses.replace(config, recipes=recipes)


def feed_of(config: Config, workdir) -> Feed:
    """The data of a single-phase run."""
    return config_feed(PHASES[config.phase].describe(config, one_device()), workdir)


def random_like(shapes, *, seed=0):
    """numpy arrays with a distinct number in every place."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def fill(init, *arguments):
    """Parameters with the shapes that `init(key, *arguments)` gives: normal draws, 1 for gains."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) if leaf.shape else 1.0, "f4"),
        shapes,
    )


def count_parameters(build, config) -> int:
    """Number of parameters of the network `build(config)`; since its blocks are alike, one is
    traced."""
    network = build(dataclasses.replace(config, depths=(1,)))
    (shapes,) = jax.eval_shape(network.init, jax.random.key(0)).values()
    one, block = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, shapes["block_0"])
    )
    return one + (sum(config.depths) - 1) * block


def write_averaged(workdir, params, config, *, more):
    """Makes a workdir with these parameters and an average of them that is `more`, which it
    returns."""
    average, none = jax.tree.map(lambda x: x + more, params), np.zeros((), np.int32)
    checkpoints = Checkpoints(workdir, keep=1, best=None)
    state = TrainState(np.int32(1), params, {}, average, {}, none, none)
    checkpoints.save(state, step=1, config=unfreeze(config).to_dict(), metrics=None)
    checkpoints.close()
    return jax.tree.map(np.asarray, average)
