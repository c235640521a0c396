"""The family of V-MoEs: m2mKD students whose experts may start from a dense ViT."""

from collections.abc import Mapping

from common_jax.weights import Allowance
from m2mkd_jax.families.family import Context, Family
from m2mkd_jax.families.upcycle import upcycle
from m2mkd_jax.families.vit import HEAD, leading, leading_tokens, resize
from m2mkd_jax.models import vmoe
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.moe.config import check_moe
from m2mkd_jax.stages import Network


def build_whole(section: VMoEConfig, context: Context, drop_path: float) -> Network:
    """The whole V-MoE, with stitches between stages if `section` keeps them."""
    return vmoe.build(
        section,
        context.interface,
        stitch_width=context.meta_width if section.stitches == "kept" else None,
        dtype=context.dtype,
        drop_path=drop_path,
    )


def build_modules(section: VMoEConfig, context: Context, drop_path: float) -> Network:
    """The V-MoE cut into students, with stitches to the meta model's width."""
    return vmoe.build_students(
        section,
        context.interface,
        meta_width=context.meta_width,
        dtype=context.dtype,
        drop_path=drop_path,
    )


def left(section: VMoEConfig) -> tuple[Allowance, ...]:
    """The students' stitches, unless the whole network keeps them."""
    if section.stitches == "kept":
        return ()
    regex = r"student/stage_\d+/block_\d+/(pre|post)_stitch/.*"
    return (Allowance(regex, "config.model.stitches='dropped'"),)


def check_mesh(section: VMoEConfig, mesh_sizes: Mapping[str, int], batch: int) -> None:
    """Raises ValueError for a mixture of experts that does not fit mesh and batch."""
    if section.moe_positions():
        check_moe(section.moe, mesh_sizes, batch)


FAMILY = Family(
    config=VMoEConfig,
    roles=("model",),
    whole=build_whole,
    modules=build_modules,
    rules=vmoe.PARTITION_RULES,
    head=HEAD,
    adapt=resize,
    left=left,
    leading=leading,
    leading_tokens=leading_tokens,
    check_mesh=check_mesh,
    upcycle=upcycle,
    savers=("config.mesh.expert",),
)
