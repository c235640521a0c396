"""m2mKD for a NAC on scikit-learn's digits, with renditions of the digits as the OOD test set.

    python -m m2mkd_jax.main --config=configs/m2mkd/digits_nac.py:phase=pipeline \\
        --workdir=runs/digits_nac

The mediators start from a scale-free graph. Meta model and teacher are those of digits.py, and can
be reused with `--config.sources.meta=DIR --config.sources.teacher=DIR`. The renditions have
inverted contrast, rotation, or thinner or thicker strokes. Arguments: `phase`, `module` and
`scale`, as in digits.py, and `prior` (see PRIORS).
"""

import dataclasses
from collections.abc import Iterator

import ml_collections

from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig, scale_lengths
from m2mkd_jax.config import Config, FewShotConfig, Recipe, choose_recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.ood import OodConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.regularizers import HingeConfig, RegularizersConfig

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
    "distill": recipe(30, lr=3e-3),
    "end_to_end": recipe(15, lr=3e-3),
}
# Not part of the pipeline.
FEW_SHOT = recipe(60, batch=20, warmup_epochs=5)

PRIORS = {
    "scale_free": PriorConfig("barabasi_albert", attachments=2),
    "erdos_renyi": PriorConfig("erdos_renyi", edge_probability=0.1),
    "planted": PriorConfig("planted_partition", communities=4),
    "ring": PriorConfig("ring_of_cliques", communities=4),
    "none": PriorConfig(),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    defaults = {"phase": "pipeline", "module": "all", "prior": "scale_free", "scale": 1.0}
    args = parse_args(arg, defaults)
    if args.prior not in PRIORS:
        raise ValueError(f"prior={args.prior!r} must be one of {sorted(PRIORS)}")
    vit = ViTConfig(patch=4, width=64, heads=4, mlp_ratio=2.0)
    config = Config(
        phase=args.phase,
        module=args.module,
        data=DataConfig(source="digits", image_size=8, channels=1, labels=10),
        ood=OodConfig(source="digits_r"),
        meta=dataclasses.replace(vit, depths=(1, 1, 1, 1)),
        teacher=dataclasses.replace(vit, depths=(2, 2, 2, 2)),
        model=NacConfig(
            tokenizer=TokenizerConfig(preset="atto", stages=1, width=192, stem=2, grid_width=16),
            inputs=8,
            mediators=32,
            outputs=8,
            iterations=2,
            width=48,
            code_width=48,
            signature_width=16,
            heads=4,
            head_width=16,
            prior=PRIORS[args.prior],
        ),
        regularizers=RegularizersConfig(hinge=HingeConfig(weight=0.1, hinge=0.4)),
        few_shot=FewShotConfig(ways=4, shots=5, test_shots=15),
        run=RunConfig(log_every=11, eval_every=2, checkpoint_every=20),
    )
    recipes = RECIPES if args.phase == "pipeline" else RECIPES | {"few_shot": FEW_SHOT}
    return choose_recipe(unfreeze(config), scale_lengths(recipes, args.scale))


def sweep() -> Iterator[dict[str, object]]:
    """The priors, for tools/sweep.py."""
    for prior in PRIORS:
        yield {":prior": prior}
