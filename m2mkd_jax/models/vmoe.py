"""V-MoE, whole or cut into students: a ViT in which some MLPs are mixtures of experts."""

import dataclasses
import itertools
import re
import types
from typing import Annotated

from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from common_jax.config import FieldError
from common_jax.ranges import one_of, shown
from m2mkd_jax.models import encoder, vit
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.stages import Network


@dataclasses.dataclass(frozen=True)
class VMoEConfig(vit.ViTConfig):
    """Architecture of a V-MoE.

    Attributes:
      kind: "vmoe".
      moe: the mixture of experts, the same in every block that has one.
      moe_blocks: blocks with experts: "all", "every_2" (the second of every two), "last_2" (the
        last two), "none", or block numbers in the whole network such as "1,3".
      stitches: "dropped" when the modules are assembled, as published, or "kept" between stages.
    """

    kind: Annotated[str, one_of("vmoe")] = "vmoe"
    moe: MoeConfig = MoeConfig()
    moe_blocks: str = "all"
    stitches: Annotated[str, one_of("dropped", "kept")] = "dropped"

    def __post_init__(self):
        super().__post_init__()
        self.moe_positions()

    def moe_positions(self) -> frozenset[int]:
        """The numbers of the blocks with experts; raises FieldError for an invalid `moe_blocks`."""
        return moe_positions(self.moe_blocks, sum(self.depths))


VARIANTS = types.MappingProxyType(
    {
        "vmoe_base": (224, 12, {"width": 768, "heads": 12}),
        "vmoe_large": (224, 24, {"width": 1024, "heads": 16}),
        # Unlike ViT-Huge, V-MoE-Huge has a qkv bias and a norm epsilon of 1e-6.
        "vmoe_huge": (224, 32, {"width": 1280, "heads": 16, "patch": 14}),
    }
)


def variant(name: str, depths: tuple[int, ...] | None = None) -> tuple[VMoEConfig, int]:
    """The config of a published V-MoE and its image side, like `vit.variant`."""
    image_size, depth, sizes = vit.choose(VARIANTS, name)
    return VMoEConfig(depths=depths or (depth,), **sizes), image_size


def build(
    config: VMoEConfig,
    interface: encoder.Interface,
    *,
    stitch_width: int | None,
    dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
) -> Network:
    """The whole V-MoE of `config`.

    `stitch_width` is the width of the tokens between stages; None drops the stitches. Stochastic
    depth ramps up to `drop_path` at the last block.
    """
    stages = _stage_blocks(config, stitch_width)
    return encoder.ramp_drop_path(
        encoder.build(config.encoder, interface, stages, dtype), drop_path
    )


def build_students(
    config: VMoEConfig,
    interface: encoder.Interface,
    *,
    meta_width: int,
    dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
) -> Network:
    """The V-MoE cut into students: stage k is student k, with stitches to and from `meta_width`.

    The students are trained separately: the first takes images, the others take tokens of the meta
    model; all but the last output tokens for the meta model. Stochastic depth ramps up from 0
    within each student.
    """
    students = build(config, interface, stitch_width=meta_width, dtype=dtype)
    # Each as a network of its own, as in the original, where a student knows of no other.
    ramped = (encoder.ramp_drop_path(Network((stage,)), drop_path) for stage in students.stages)
    return Network(tuple(network.stages[0] for network in ramped))


def moe_positions(blocks: str, depth: int) -> frozenset[int]:
    """The block numbers that `VMoEConfig.moe_blocks` names in a network of `depth` blocks.

    Raises:
      FieldError: for invalid text or a number outside 0..depth-1.
    """
    if blocks in ("all", "none"):
        return frozenset(range(depth) if blocks == "all" else ())
    if match := re.fullmatch(r"(every|last)_([1-9][0-9]{0,8})", blocks):
        return frozenset(_PLACEMENTS[match[1]](depth, int(match[2])))
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", blocks):
        raise FieldError(
            f"moe_blocks={shown(blocks)} must be 'all', 'none', 'every_N' or 'last_N' with N of at "
            "least 1, or block numbers such as '1,3'"
        )
    positions = frozenset(int(number) for number in blocks.split(","))
    if not positions <= set(range(depth)):
        raise FieldError(f"moe_blocks={shown(blocks)} names blocks outside 0..{depth - 1}")
    return positions


_PLACEMENTS = {
    "every": lambda depth, count: range(count - 1, depth, count),
    "last": lambda depth, count: range(max(depth - count, 0), depth),
}


def _stage_blocks(
    config: VMoEConfig, stitch_width: int | None
) -> list[tuple[encoder.BlockConfig, ...]]:
    # Blocks are numbered through all stages, so `moe_blocks` means the same however they are cut.
    experts, blocks = config.moe_positions(), itertools.count()
    stages = [
        tuple(
            encoder.BlockConfig(moe=config.moe if next(blocks) in experts else None)
            for _ in range(depth)
        )
        for depth in config.depths
    ]
    return encoder.with_stitches(stages, stitch_width)


# Experts are sharded over the expert axis, and each expert's matrices over fsdp along the width.
# Router parameters are small, and every device needs all of them for its own tokens.
PARTITION_RULES = (
    (r"/moe/up$", P("expert", "fsdp")),
    (r"/moe/down$", P("expert", None, "fsdp")),
    (r"/moe/(up_bias|down_bias)$", P("expert")),
    (r"/moe/router/", P()),
    *vit.PARTITION_RULES,
)
