"""NAC from a ViT-Huge teacher on ImageNet, with the published settings of distill, end_to_end and
few_shot.

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_imagenet.py:phase=pipeline \\
        --config.data.path=/data/imagenet --workdir=runs/nac_imagenet

The folder holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. Batch sizes are global; the first
three phases have the settings of vmoe_base.py.

| phase | depths | batch | epochs | drop path | warm-up | peak rate | last rate |
|---|---|---|---|---|---|---|---|
| pretrain_meta | 1, ten times | 2048 | 300 | 0 | 20 | 2e-3 | 1e-5 |
| train_module | 3 or 4 | 2 x 1024 | 100 | 0.1 | 20 | 2e-3 | 1e-5 |
| assemble, clip 1 | 4, eight times 3, 4 | 1024 | 100 | 0.1 | 0 | 1e-3 | 1e-5 |
| distill | 1 | 2 x 1024 | 100 | 0.1 | 20 | 2e-3 | 1e-5 |
| end_to_end, all decays | 1, ten times | 256 | 110 | 0.1 | 25 | 6e-4 | 2e-5 |
| few_shot, 8 ways, 1 shot, SGD | | 8 | 500 | 0.1 | - | 3e-4 | 3e-4 |

Arguments: `phase`, `module` (0 is the read-in, 1 to 8 the mediators, 9 the read-out), `scale` as in
digits.py, `prior`, and `size`: `tinyimagenet` trains the students of nac_tinyimagenet.py, on the
same images and with the same meta model and teacher; it has no end_to_end, and so no pipeline.

| prior | graph of 768 mediators | regulariser |
|---|---|---|
| scale_free | barabasi_albert, 6 edges per node | hinge 0.4, weight 0.1 |
| erdos_renyi | edge probability 0.1 | hinge 0.4, weight 0.1 |
| ring | 12 cliques of 64 | hinge 0.4, weight 0.1 |
| planted | 12 communities of 64, 0.9 within, 0.2 between | 8 clusters, 0.9, 0.2; weight 1 |

Priors only matter in end_to_end, so runs with different priors can start from the same students.
With the published ImageNet-R in `/data/imagenet-r/WNID/*.jpg` as the OOD set:

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_imagenet.py:phase=pipeline,prior=planted \\
        --config.data.path=/data/imagenet --workdir=runs/nac_planted \\
        --config.ood.source=imagenet_r --config.ood.path=/data/imagenet-r

Few-shot uses enlarged CIFAR-100 images, and is not part of the pipeline:

    python -m m2mkd_jax.main --config=configs/m2mkd/nac_imagenet.py:phase=few_shot \\
        --config.data.path=/data/cifar100 --config.data.labels=100 --config.data.test_split=test \\
        --config.sources.network=runs/nac_imagenet/end_to_end --workdir=runs/nac_few_shot

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
from m2mkd_jax.models import vit
from m2mkd_jax.nac import model as nac

recipes = load_beside(__file__, "recipes")

WHOLE = recipes.train_nac(epochs=110, batch=256, min_lr=2e-5, weight_decay=0.05)
PRIORS = recipes.priors(attachments=6, communities=12)
SIZES = ("imagenet", "tinyimagenet")
ARGUMENTS = {
    "phase": "pipeline",
    "module": "all",
    "prior": "scale_free",
    "size": "imagenet",
    "scale": 1.0,
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    for name, choices in (("prior", PRIORS), ("size", SIZES)):
        if args[name] not in choices:
            raise ValueError(f"{name}={args[name]!r} must be one of {sorted(choices)}")
    teacher, image_size = vit.variant("vit_huge_patch14_224", (4, *(3,) * 8, 4))
    model, *_ = nac.preset(args.size)
    config = Config(
        phase=args.phase,
        module=args.module,
        precision="bfloat16",
        data=recipes.imagenet_folder(image_size),
        # As in the original, whose evaluation is random.
        evaluation=EvaluationConfig(noise="sampled"),
        # Its width, 1280, is that of the students' stitches; the published command's 1024 would not
        # fit.
        meta=dataclasses.replace(teacher, depths=(1,) * 10),
        teacher=teacher,
        # The published read-in student initialises the layer scale of its MLP to 1e-6, by mistake.
        model=dataclasses.replace(model, prior=PRIORS[args.prior], legacy_read_in_scale=True),
        regularizers=recipes.regularizers(args.prior),
        few_shot=FewShotConfig(ways=8, shots=1, test_shots=3, seed=1),
        run=RunConfig(log_every=100),
    )
    phases = recipes.TEACHING | ({"end_to_end": WHOLE} if args.size == "imagenet" else {})
    if args.phase == "few_shot" and args.size == "imagenet":
        # Uses another data set than the other phases, so it is not part of the pipeline.
        phases |= {"few_shot": recipes.NAC_FEW_SHOT}
    return choose_recipe(unfreeze(config), scale_lengths(phases, args.scale))


def sweep() -> Iterator[dict[str, object]]:
    """The priors, for tools/sweep.py; with phase=end_to_end all can start from the same students
    (config.sources.students)."""
    for prior in PRIORS:
        yield {":prior": prior}
