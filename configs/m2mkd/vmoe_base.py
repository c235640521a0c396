"""V-MoE-Base from a ViT-Large teacher on ImageNet, with the published settings of every phase.

    python -m m2mkd_jax.main --config=configs/m2mkd/vmoe_base.py:phase=pipeline \\
        --config.data.path=/data/imagenet --workdir=gs://bucket/vmoe_base

The folder holds `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`. Arguments: `phase`, `module` and
`scale`, as in digits.py, `size` of the student (base or large), and `chips`. Peak learning rate =
5e-4 * batch / 512; batch sizes are global.

With `chips`, the number of chips in a pod, experts are sharded over devices and tokens dispatched
with a capacity factor of 1.25 (all-to-all): (token, expert) pairs beyond the capacity are dropped,
which the published settings never do. By default (chips=1) the settings are the published ones, on
any mesh. Use the same number for tools/compile_for_pod.py:

    python -m m2mkd_jax.main --config=configs/m2mkd/vmoe_base.py:phase=end_to_end,chips=256 \\
        --config.data.path=/data/imagenet --workdir=gs://bucket/vmoe_base_pod

| phase | depths | batch | epochs | drop path | clip | warm-up | peak rate |
|---|---|---|---|---|---|---|---|
| pretrain_meta | 1 1 1 1 | 2048 | 300 | 0 | - | 20 | 2e-3 |
| train_module | 6 | 2 x 1024 | 100 | 0.1 | - | 20 | 2e-3 |
| assemble | 6 6 6 6 | 1024 | 100 | 0.1 | 1 | 0 | 1e-3 |
| distill, 8 experts in each block | 3 (large: 6) | 2 x 1024 | 100 | 0.1 | - | 20 | 2e-3 |
| end_to_end | 3 3 3 3 (large: 6 6 6 6) | 1024 | 100 | 0.1 | 1 | 0 | 1e-3 |
| few_shot, 8 ways, 5 shots | | 40 | 100 | 0.1 | - | 20 | 2e-3, not scaled |

Paper: V-MoE-Base gains 3.5 points on ImageNet over end-to-end training from scratch. Not
  reproduced here yet.
"""

import dataclasses
import math

import ml_collections

from common_jax.command_line import load_beside
from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig, scale_lengths
from m2mkd_jax.config import Config, FewShotConfig, Recipe, choose_recipe
from m2mkd_jax.models import vit, vmoe

recipes = load_beside(__file__, "recipes")

RECIPES = recipes.TEACHING | {"end_to_end": recipes.FINE_TUNE}
# Uses another data set than the other phases, so it is not part of the pipeline.
# A batch is all 40 training images of an episode, so an epoch is one update.
FEW_SHOT = Recipe(
    OptimConfig(epochs=100, batch=40, lr=2e-3, lr_per=None), recipes.PLAIN, drop_path=0.1
)

GROUPS = 256
STUDENTS = {"base": ("vmoe_base", (3, 3, 3, 3)), "large": ("vmoe_large", (6, 6, 6, 6))}

ARGUMENTS = {"phase": "pipeline", "module": "all", "size": "base", "chips": 1, "scale": 1.0}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    if args.size not in STUDENTS:
        raise ValueError(f"size={args.size!r} must be one of {sorted(STUDENTS)}")
    if args.chips < 1:
        raise ValueError(f"chips={args.chips} must be at least 1")
    teacher, image_size = vit.variant("vit_large_patch16_224", (6, 6, 6, 6))
    student, _ = vmoe.variant(*STUDENTS[args.size])
    mesh = MeshConfig()
    if args.chips > 1 and args.phase != "few_shot":
        # As many devices as can share the experts evenly; `data` takes the rest.
        mesh = MeshConfig(expert=math.gcd(args.chips, student.moe.experts))
        # The same groups, and so the same results, on every pod that can shard them.
        groups = GROUPS if GROUPS % args.chips == 0 else args.chips
        moe = dataclasses.replace(student.moe, dispatch="capacity", groups=groups)
        student = dataclasses.replace(student, moe=moe)
    config = Config(
        phase=args.phase,
        module=args.module,
        precision="bfloat16",
        data=recipes.imagenet_folder(image_size),
        meta=dataclasses.replace(teacher, depths=(1, 1, 1, 1)),
        teacher=teacher,
        model=student,
        few_shot=FewShotConfig(ways=8, shots=5, test_shots=15, seed=1),
        mesh=mesh,
        run=RunConfig(log_every=100),
    )
    few_shot = {} if args.phase == "pipeline" else {"few_shot": FEW_SHOT}
    return choose_recipe(unfreeze(config), scale_lengths(RECIPES | few_shot, args.scale))
