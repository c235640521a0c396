"""The ViTs of a config, and where their weights come from."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.config import under
from common_jax.mesh import Rules, match_rules, with_shardings
from common_jax.weights import Adapt, Allowance, Origin, WarmStart, take
from m2mkd_jax.config import Config
from m2mkd_jax.convert import locate
from m2mkd_jax.models import vit
from m2mkd_jax.models.positions import resizer
from m2mkd_jax.stages import Network, stage_name

# A block's MLP, and the same of all experts.
EXPERT_NAMES = {
    "mlp/up/kernel": "moe/up",
    "mlp/up/bias": "moe/up_bias",
    "mlp/down/kernel": "moe/down",
    "mlp/down/bias": "moe/down_bias",
}


def meta_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The shared meta model."""
    with under("config.meta"):
        return vit.build(config.meta, config.interface, dtype=config.dtype, drop_path=drop_path)


def teacher_network(config: Config, *, drop_path: float = 0.0) -> Network:
    """The teacher, cut into as many stages."""
    with under("config.teacher"):
        return vit.build(config.teacher, config.interface, dtype=config.dtype, drop_path=drop_path)


def wanted(
    network: Network, role: str, mesh: Mesh, rules: Rules, *, only: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Shapes and shardings of a network's parameters under `role`, of all stages or those in
    `only`."""
    params = jax.eval_shape(lambda key: {role: network.init(key, only=only)}, jax.random.key(0))
    return with_shardings(params, match_rules(rules, params, mesh))


def take_weights(
    config: Config,
    wanted: Mapping[str, Any],
    origins: list[Origin],
    *,
    leave: tuple[Allowance, ...] = (),
    fresh: tuple[Allowance, ...] = (),
    adapt: Mapping[str, Adapt] | None = None,
    frozen: bool = False,
    read: bool = True,
) -> WarmStart:
    """`common_jax.weights.take` with what the config allows for and position tables resized.

    Raises:
      ValueError: as `common_jax.weights.take`; see also `compare_images`.
    """
    sources = config.sources
    for source in dict.fromkeys(str(origin.source) for origin in origins):
        compare_images(config, source, frozen=frozen)
    if sources.leave:
        leave = (*leave, Allowance(sources.leave, "config.sources.leave"))
    if sources.fresh:
        fresh = (*fresh, Allowance(sources.fresh, "config.sources.fresh"))
    adapt = _resizers(config) | (adapt or {})
    return take(wanted, origins, leave=leave, fresh=fresh, adapt=adapt, read=read)


def _resizers(config: Config) -> dict[str, Adapt]:
    """Resizes the position table of each role's ViT."""
    networks = {
        "meta": config.meta,
        "module": config.teacher,
        "teacher": config.teacher,
        "student": config.model,
    }
    return {
        rf"{role}/.*pos_embed": resizer(network.encoder.leading_positions)
        for role, network in networks.items()
        if isinstance(network, vit.ViTConfig)
    }


def compare_images(config: Config, source: str, *, frozen: bool) -> None:
    """Compares the images that a network was trained on with this run's.

    With another mean or std every pixel is a different number from those that the network knows. A
    network that goes on training adapts, which a warning says; a frozen one never does. Another
    side is a warning: the position table is resized.

    Raises:
      FileNotFoundError: when there is no finished checkpoint.
      ValueError: for another mean or std of a network that is frozen.
    """
    made, ours = checkpoint.load_config(source).get("data"), config.data
    if not isinstance(made, Mapping):
        return
    differing = [
        name
        for name in ("mean", "std")
        if isinstance(made.get(name), list) and not same_numbers(made[name], getattr(ours, name))
    ]
    if differing:
        said = ", ".join(
            f"{name}={tuple(made[name])} (config.data.{name} is {getattr(ours, name)})"
            for name in differing
        )
        flags = " ".join(
            f"--config.data.{name}={','.join(map(str, made[name]))}" for name in differing
        )
        message = f"{source} was made for images normalised with {said}"
        if frozen:
            raise ValueError(
                f"{message}: it would see other numbers than it knows. Give {flags}, or another "
                "source; weights of others whose numbers were only assumed are converted again "
                "with the right ones as flags"
            )
        logging.warning("%s; it trains on other numbers from now on", message)
    if (side := made.get("image_size")) not in (None, ours.image_size):
        logging.warning(
            "%s was made for images of side %s, and config.data.image_size=%s: its position table "
            "is resized",
            source,
            side,
            ours.image_size,
        )


def same_numbers(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two means or stds are the same up to rounding. A different number of channels shows
    in the shapes of the weights, and is no difference here."""
    return len(a) != len(b) or bool(np.allclose(a, b, rtol=0, atol=1e-4))


def upcycle(config: Config, wanted: Mapping[str, Any]) -> WarmStart:
    """A V-MoE's start from a dense ViT, config.init.upcycle: in every block with experts each of
    them is the ViT's MLP; router and stitches start anew; all else is taken as it is.

    Where a token's gates sum to 1 (router "topk_softmax") and no pair is dropped, the V-MoE then
    computes what the ViT computes; else the experts' branch is the MLP's times that sum (sparse
    upcycling, Komatsuzaki et al. 2022). Blocks are counted through, so that the two may be cut into
    other stages.

    Raises:
      ValueError: where the source holds no whole ViT, or one of another depth; for parameters that
        do not fit, all of which are named.
    """
    source = config.init.upcycle
    shapes = checkpoint.load_shapes(source)
    roles = [role for role in ("teacher", "meta") if role in shapes]
    if not roles:
        raise ValueError(
            f"config.init.upcycle={source!r} holds {sorted(shapes)}, and needs a dense ViT: give a "
            "run of phase assemble or pretrain_meta, or a converted ViT"
        )
    dense = traverse_util.flatten_dict(shapes[roles[0]], sep="/")
    renamed = _upcycled_names(dense, config)
    flat = traverse_util.flatten_dict(wanted["student"], sep="/")
    copies = {  # what does not fit is left to be named with all else
        re.escape(f"student/{path}"): lambda x, shape: np.broadcast_to(x, shape)
        for name, path in renamed.items()
        if "/moe/" in path and path in flat and flat[path].shape[1:] == dense[name].shape
    }
    fresh = (
        Allowance(r"student/.*/moe/router/.*", "config.init.upcycle: a ViT has no router"),
        Allowance(r"student/.*/(pre|post)_stitch/.*", "config.init.upcycle: a ViT has no stitches"),
    )
    origin = Origin(source, roles[0], "student", renamed)
    return take_weights(config, wanted, [origin], fresh=fresh, adapt=copies)


def _upcycled_names(dense: Mapping[str, Any], config: Config) -> dict[str, str]:
    """Where a dense ViT's parameters stand in the V-MoE."""
    blocks = {}
    for name in dense:
        if match := re.match(r"stage_(\d+)/block_(\d+)/", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    source, depths = tuple(blocks[stage] for stage in sorted(blocks)), config.model.depths
    if sum(source) != sum(depths) or sorted(blocks) != list(range(len(blocks))):
        raise ValueError(
            f"config.init.upcycle={config.init.upcycle!r} has stages {sorted(blocks)} of {source} "
            f"blocks, {sum(source)} in all, and config.model.depths={depths} are {sum(depths)}: "
            "give a ViT that is whole and as deep"
        )
    experts, renamed = config.model.moe_positions(), {}
    for name in dense:
        stage, rest = name.split("/", 1)
        first = sum(source[: int(stage.removeprefix("stage_"))])
        if match := re.match(r"block_(\d+)/(.*)", rest):
            number, rest = first + int(match[1]), match[2]
            stage, block = locate(number, depths)
            rest = EXPERT_NAMES.get(rest, rest) if number in experts else rest
            renamed[name] = f"{stage_name(stage)}/block_{block}/{rest}"
        elif rest.startswith(("norm/", "head/", "pool/")):
            renamed[name] = f"{stage_name(len(depths) - 1)}/{rest}"
    return renamed


def check_source(config: Config, role: str, mesh: Mesh) -> None:
    """Checks that config.sources.ROLE, of "meta" or "teacher", holds that network; reads no
    array. Raises as `take_weights`."""
    network = {"meta": meta_network, "teacher": teacher_network}[role](config)
    shapes = wanted(network, role, mesh, vit.PARTITION_RULES)
    origin = Origin(require_source(config, role), role, role)
    take_weights(config, shapes, [origin], read=False, frozen=True)


def require_source(config: Config, name: str) -> str:
    """config.sources.NAME; raises ValueError where it is empty."""
    source = getattr(config.sources, name)
    if not source:
        raise ValueError(
            f"config.sources.{name} is empty; phase={config.phase!r} needs the workdir of a run "
            "that made it"
        )
    return source


def require_stage_sources(config: Config, name: str, count: int) -> tuple[str, ...]:
    """config.sources.NAME with one workdir a stage, a single one standing for all; raises
    ValueError for another number."""
    sources = getattr(config.sources, name)
    if len(sources) not in (1, count):
        raise ValueError(
            f"config.sources.{name} names {len(sources)} workdirs {sources} and "
            f"phase={config.phase!r} needs "
            f"{count}, one a stage in order, or one that holds all stages"
        )
    return sources if len(sources) == count else sources * count
