"""Weights of other runs that a phase starts from, or is helped by."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from common_jax import checkpoint
from common_jax.weights import Adapt, Allowance, Origin, WarmStart, take
from m2mkd_jax.config import Config
from m2mkd_jax.families import family_of
from m2mkd_jax.phases.networks import SECTIONS, parameter_shapes, whole_network


def take_weights(
    config: Config,
    shapes: Mapping[str, Any],
    origins: Sequence[Origin],
    *,
    leave: tuple[Allowance, ...] = (),
    fresh: tuple[Allowance, ...] = (),
    adapt: Mapping[str, Adapt] | None = None,
    frozen: bool = False,
    read: bool = True,
) -> WarmStart:
    """`common_jax.weights.take` with the allowances of config.sources and the families' ways to
    give parameters another shape.

    Args:
      config: of the run.
      shapes: shapes and shardings of the parameters, by role.
      origins: the sources.
      leave, fresh, read: see `common_jax.weights.take`.
      adapt: more ways to give parameters another shape.
      frozen: whether the parameters are not trained.

    Raises:
      ValueError: as `common_jax.weights.take`, and for frozen parameters that would start from
        scratch; see also `compare_images`.
    """
    sources = config.sources
    for source in dict.fromkeys(str(origin.source) for origin in origins):
        compare_images(config, source, frozen=frozen)
    if sources.leave:
        leave = (*leave, Allowance(sources.leave, "config.sources.leave"))
    if sources.fresh:
        fresh = (*fresh, Allowance(sources.fresh, "config.sources.fresh"))
    ways = dict(adapt or {})
    for role in shapes:
        section = getattr(config, SECTIONS[role])
        ways |= {f"{role}/{regex}": way for regex, way in family_of(section).adapt(section).items()}
    start = take(shapes, origins, leave=leave, fresh=fresh, adapt=ways, read=read)
    if frozen and start.account["fresh"]:
        name = start.account["fresh"][0]["name"]
        raise ValueError(
            f"config.sources.fresh={sources.fresh!r} names {name}, and phase={config.phase!r} does "
            "not train it: it would stay as it was drawn. Give a source that has it, or a regex of "
            "parameters that are trained"
        )
    return start


def compare_images(config: Config, source: str, *, frozen: bool) -> None:
    """Compares the images that a network was trained on with this run's.

    With another mean or std every pixel is another number than in its training. A network that
    trains further adapts, so that is a warning; a frozen one never does. Another side is a warning:
    the position table is resized.

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
                f"{message}: its inputs would be scaled otherwise. Give {flags}, or another "
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
    """True where two means or stds are the same up to rounding. Another number of channels shows in
    the shapes of the weights, and is no difference here."""
    return len(a) != len(b) or bool(np.allclose(a, b, rtol=0, atol=1e-4))


def check_source(config: Config, role: str, mesh: Mesh) -> None:
    """Checks that config.sources.ROLE, of "meta" or "teacher", holds that network; reads no
    array. Raises as `take_weights`."""
    shapes = parameter_shapes(config, whole_network(config, role), role, mesh)
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
    """config.sources.NAME with one workdir per stage, a single one taken for all; raises ValueError
    for another number."""
    sources = getattr(config.sources, name)
    if len(sources) not in (1, count):
        raise ValueError(
            f"config.sources.{name} names {len(sources)} workdirs {sources} and "
            f"phase={config.phase!r} needs "
            f"{count}, one per stage in order, or one that holds all stages"
        )
    return sources if len(sources) == count else sources * count
