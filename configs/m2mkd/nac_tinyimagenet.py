"""NAC on Tiny-ImageNet, 64 x 64 pixels, with the published settings of end_to_end.

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_tinyimagenet.py:phase=end_to_end \\
        --config.data.path=/data/tiny-imagenet --workdir=runs/nac_tiny \\
        --config.sources.students="('runs/tiny',)"

The folder holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. Without students it trains from
scratch. They are taught on ImageNet at 224 pixels and must have this NAC's widths (384, 6 heads,
MLPs of twice the width), not the ImageNet NAC's:

    python -m m2mkd_jax.main --workdir=runs/tiny \\
        --config=configs/m2mkd/nac_imagenet.py:phase=distill,size=tinyimagenet \\
        --config.data.path=/data/imagenet --config.sources.meta=runs/nac_imagenet/meta \\
        --config.sources.teacher=runs/nac_imagenet/teacher

The positional grid (28 x 28 in the students, 8 x 8 here) and the pooling with its classifier (1,000
labels there, 200 here) start anew, as latents, seeder and bandwidths always do.

| phase | batch | epochs | drop path | weight decay | warm-up | peak rate | last rate |
|---|---|---|---|---|---|---|---|
| end_to_end, all decays | 1024 | 400 | 0.1 | 0.075 | 25 | 2.4e-3 | 8e-5 |
| few_shot, 8 ways, 1 shot, SGD | 8 | 500 | 0.1 | 0 | - | 3e-4 | 3e-4 |

Few-shot is published for the ImageNet NAC alone; here it has the same settings. Arguments: `phase`
(end_to_end, few_shot) and `prior`.

| prior | graph of 256 mediators | regulariser |
|---|---|---|
| scale_free | barabasi_albert, 2 edges a node | hinge 0.4, weight 0.1 |
| erdos_renyi | edge probability 0.1 | hinge 0.4, weight 0.1 |
| ring | 8 cliques of 32 | hinge 0.4, weight 0.1 |
| planted | 8 communities of 32, 0.9 within, 0.2 between | 8 clusters, 0.9, 0.2; weight 1 |

With the classes of ImageNet-R that Tiny-ImageNet has too, at 64 x 64 pixels, as OOD set:

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_tinyimagenet.py:prior=ring \\
        --config.data.path=/data/tiny-imagenet --workdir=runs/nac_tiny_ring \\
        --config.ood.source=tiny_imagenet_r --config.ood.path=/data/imagenet-r

Not reproduced here yet.
"""

import dataclasses
from collections.abc import Iterator

import ml_collections

from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig
from m2mkd_jax.config import Config, EvaluationConfig, FewShotConfig, Recipe, choose_recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.nac import model as nac
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.regularizers import BlocksConfig, HingeConfig, RegularizersConfig

AUGMENT = AugmentConfig(
    repeats=3, flip=True, randaugment=True, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
)
# Few-shot repeats no image.
PLAIN = dataclasses.replace(AUGMENT, repeats=1)
RECIPES = {
    "end_to_end": Recipe(
        OptimConfig(
            epochs=400,
            batch=1024,
            lr=1.2e-3,
            schedule="epoch_cosine_unlagged",
            warmup_epochs=25,
            min_lr=8e-5,
            weight_decay=0.075,
            decay_all=True,
        ),
        AUGMENT,
        0.1,
    ),
    "few_shot": Recipe(
        OptimConfig(
            epochs=500,
            batch=8,
            lr=3e-4,
            lr_per=None,
            schedule="constant",
            optimizer="sgd",
            weight_decay=0.0,
        ),
        PLAIN,
        0.1,
    ),
}

PRIORS = {
    "scale_free": PriorConfig("barabasi_albert", attachments=2),
    "erdos_renyi": PriorConfig("erdos_renyi", edge_probability=0.1),
    "planted": PriorConfig("planted_partition", communities=8, p_in=0.9, p_out=0.2),
    "ring": PriorConfig("ring_of_cliques", communities=8),
}
HINGE = RegularizersConfig(hinge=HingeConfig(weight=0.1, hinge=0.4))
BLOCKS = RegularizersConfig(
    blocks=BlocksConfig(weight=1.0, clusters=8, within=0.9, between=0.2, latents="mediator")
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"phase": "end_to_end", "prior": "scale_free"})
    if args.prior not in PRIORS:
        raise ValueError(f"prior={args.prior!r} must be one of {sorted(PRIORS)}")
    if args.phase not in RECIPES:
        raise ValueError(
            f"phase={args.phase!r} must be one of {sorted(RECIPES)}; the students are taught by "
            "nac_imagenet.py:phase=distill,size=tinyimagenet"
        )
    model, image_size, labels = nac.preset("tinyimagenet")
    config = Config(
        phase=args.phase,
        precision="bfloat16",
        data=DataConfig(
            source="folder",
            image_size=image_size,
            channels=3,
            labels=labels,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            test_split="val",
            workers=16,
        ),
        evaluation=EvaluationConfig(noise="sampled"),
        model=dataclasses.replace(model, prior=PRIORS[args.prior], students="tinyimagenet"),
        regularizers=BLOCKS if args.prior == "planted" else HINGE,
        few_shot=FewShotConfig(ways=8, shots=1, test_shots=3, seed=1),
        run=RunConfig(log_every=100),
    )
    return choose_recipe(unfreeze(config), RECIPES)


def sweep() -> Iterator[dict[str, object]]:
    """The priors, for tools/sweep.py."""
    for prior in PRIORS:
        yield {":prior": prior}
