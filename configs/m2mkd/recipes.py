"""Settings of the published runs that several configs share. A config file loads them with:

recipes = load_beside(__file__, "recipes")
"""

import dataclasses

from common_jax.optim import OptimConfig
from m2mkd_jax.config import Recipe
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.sources import DataConfig
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.regularizers import BlocksConfig, HingeConfig, RegularizersConfig

AUGMENT = AugmentConfig(
    repeats=3, flip=True, randaugment=True, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1
)
# Few-shot has no repeated augmentation.
PLAIN = dataclasses.replace(AUGMENT, repeats=1)

# The peak learning rate of all of these is 5e-4 * batch / 512.
SHORT = OptimConfig(epochs=100, batch=2048, accumulate=2)
FINE_TUNE = Recipe(OptimConfig(epochs=100, batch=1024, warmup_epochs=0, clip=1.0), AUGMENT, 0.1)
TEACHING = {
    "pretrain_meta": Recipe(OptimConfig(epochs=300, batch=2048), AUGMENT, 0.0),
    # The original gives its optimizer a bare stage here, so that class token and positions get
    # weight decay too.
    "train_module": Recipe(dataclasses.replace(SHORT, no_decay=""), AUGMENT, 0.1),
    "assemble": FINE_TUNE,
    "distill": Recipe(SHORT, AUGMENT, 0.1),
}
# One image of each of eight classes: a batch is the whole training set. As published, the rate is
# neither scaled nor scheduled.
NAC_FEW_SHOT = Recipe(
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
)

HINGE = RegularizersConfig(hinge=HingeConfig(weight=0.1, hinge=0.4))
# Eight clusters whatever the number of communities in the prior, as published.
BLOCKS = RegularizersConfig(
    blocks=BlocksConfig(weight=1.0, clusters=8, within=0.9, between=0.2, latents="mediator")
)


def train_nac(*, epochs: int, batch: int, min_lr: float, weight_decay: float) -> Recipe:
    """The recipe of a whole NAC."""
    optim = OptimConfig(
        epochs=epochs,
        batch=batch,
        lr=1.2e-3,
        # NAC has a trainer of its own, whose schedule is not late, and which decays norms and
        # biases too.
        schedule="epoch_cosine_unlagged",
        warmup_epochs=25,
        min_lr=min_lr,
        weight_decay=weight_decay,
        decay_all=True,
    )
    return Recipe(optim, AUGMENT, 0.1)


def imagenet_folder(image_size: int, *, labels: int = 1000) -> DataConfig:
    """A folder `train/CLASS/*.JPEG`, `val/CLASS/*.JPEG`, with the usual ImageNet normalisation."""
    return DataConfig(
        source="folder",
        image_size=image_size,
        channels=3,
        labels=labels,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        test_split="val",
        workers=16,
    )


def priors(*, attachments: int, communities: int) -> dict[str, PriorConfig]:
    """The graph priors, by their names in the configs."""
    return {
        "scale_free": PriorConfig("barabasi_albert", attachments=attachments),
        "erdos_renyi": PriorConfig("erdos_renyi", edge_probability=0.1),
        "planted": PriorConfig("planted_partition", communities=communities, p_in=0.9, p_out=0.2),
        "ring": PriorConfig("ring_of_cliques", communities=communities),
    }


def regularizers(prior: str) -> RegularizersConfig:
    """The regulariser that goes with a prior."""
    return BLOCKS if prior == "planted" else HINGE
