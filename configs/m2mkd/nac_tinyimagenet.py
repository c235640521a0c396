"""NAC on Tiny-ImageNet, 64 x 64 pixels, with the published settings of end_to_end.

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_tinyimagenet.py:phase=end_to_end \\
        --config.data.path=/data/tiny-imagenet --workdir=runs/nac_tiny \\
        --config.sources.students="('runs/tiny',)"

The folder holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. Without students it trains from
scratch. The students are trained on ImageNet at 224 pixels, with the widths of this NAC (384, 6
heads, MLPs of twice the width), not those of the ImageNet NAC:

    python -m m2mkd_jax.main --workdir=runs/tiny \\
        --config=configs/m2mkd/nac_imagenet.py:phase=distill,size=tinyimagenet \\
        --config.data.path=/data/imagenet --config.sources.meta=runs/nac_imagenet/meta \\
        --config.sources.teacher=runs/nac_imagenet/teacher

The positional grid (28 x 28 in the students, 8 x 8 here) and the pooling with its classifier (1,000
labels there, 200 here) start from scratch, like the latents, seeder and bandwidths of every NAC.

| phase | batch | epochs | drop path | weight decay | warm-up | peak rate | last rate |
|---|---|---|---|---|---|---|---|
| end_to_end, all decays | 1024 | 400 | 0.1 | 0.075 | 25 | 2.4e-3 | 8e-5 |
| few_shot, 8 ways, 1 shot, SGD | 8 | 500 | 0.1 | 0 | - | 3e-4 | 3e-4 |

Few-shot is published for the ImageNet NAC only; here it has the same settings. Arguments: `phase`
(end_to_end, few_shot), `scale` as in digits.py, and `prior`.

| prior | graph of 256 mediators | regulariser |
|---|---|---|
| scale_free | barabasi_albert, 2 edges per node | hinge 0.4, weight 0.1 |
| erdos_renyi | edge probability 0.1 | hinge 0.4, weight 0.1 |
| ring | 8 cliques of 32 | hinge 0.4, weight 0.1 |
| planted | 8 communities of 32, 0.9 within, 0.2 between | 8 clusters, 0.9, 0.2; weight 1 |

With the ImageNet-R classes that Tiny-ImageNet shares, at 64 x 64 pixels, as the OOD set:

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_tinyimagenet.py:prior=ring \\
        --config.data.path=/data/tiny-imagenet --workdir=runs/nac_tiny_ring \\
        --config.ood.source=tiny_imagenet_r --config.ood.path=/data/imagenet-r

Not reproduced here yet.
"""

import dataclasses
from collections.abc import Iterator

import ml_collections

from common_jax.command_line import load_beside
from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import scale_lengths
from m2mkd_jax.config import Config, EvaluationConfig, FewShotConfig, choose_recipe
from m2mkd_jax.nac import model as nac

recipes = load_beside(__file__, "recipes")

RECIPES = {
    "end_to_end": recipes.train_nac(epochs=400, batch=1024, min_lr=8e-5, weight_decay=0.075),
    "few_shot": recipes.NAC_FEW_SHOT,
}
PRIORS = recipes.priors(attachments=2, communities=8)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"phase": "end_to_end", "prior": "scale_free", "scale": 1.0})
    if args.prior not in PRIORS:
        raise ValueError(f"prior={args.prior!r} must be one of {sorted(PRIORS)}")
    if args.phase not in RECIPES:
        raise ValueError(
            f"phase={args.phase!r} must be one of {sorted(RECIPES)}; the students are trained by "
            "nac_imagenet.py:phase=distill,size=tinyimagenet"
        )
    model, image_size, labels = nac.preset("tinyimagenet")
    config = Config(
        phase=args.phase,
        precision="bfloat16",
        data=recipes.imagenet_folder(image_size, labels=labels),
        evaluation=EvaluationConfig(noise="sampled"),
        model=dataclasses.replace(model, prior=PRIORS[args.prior], students="tinyimagenet"),
        regularizers=recipes.regularizers(args.prior),
        few_shot=FewShotConfig(ways=8, shots=1, test_shots=3, seed=1),
        run=RunConfig(log_every=100),
    )
    return choose_recipe(unfreeze(config), scale_lengths(RECIPES, args.scale))


def sweep() -> Iterator[dict[str, object]]:
    """The priors, for tools/sweep.py."""
    for prior in PRIORS:
        yield {":prior": prior}
