"""Weights from other runs, which a phase starts from or uses frozen."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from common_jax import checkpoint
from common_jax.weights import Adapt, Allowance, Origin, Planned, WarmStart, take
from common_jax.workdir import freeze_stored
from m2mkd_jax.config import Config
from m2mkd_jax.families import family_of
from m2mkd_jax.phases.networks import SECTIONS

# Fields that only choose how a network is computed, which each run may set for itself.
COMPUTATION = ("attention", "remat", "scan_layers")
# Fields that loaded weights need not agree on: names and shapes of parameters show them, or they
# set initial values, which loading replaces, or they only act in training.
SHOWN = ("kind", "depths", "moe_blocks", "mlp_ratio", "positions")
INITIAL = ("layer_scale", "expert_init", "prior", "students", "read_in_scale")
TRAINING = ("balance", "noise_std", "code_noise", "learn_codes", "learn_signatures")
NOT_COMPARED = {*COMPUTATION, *SHOWN, *INITIAL, *TRAINING, "legacy_read_in_scale"}


def take_weights(
    config: Config,
    shapes: Mapping[str, Any],
    origins: Sequence[Origin],
    *,
    leave: tuple[Allowance, ...] = (),
    fresh: tuple[Allowance, ...] = (),
    adapt: Mapping[str, Adapt] | None = None,
    frozen: bool = False,
    average: bool = False,
    read: bool = True,
    planned: Planned | None = None,
) -> WarmStart:
    """`common_jax.weights.take` with the allowances in config.sources and the families' functions
    for reshaping parameters.

    Args:
      config: the run's config.
      shapes: shapes and shardings of the parameters, by role.
      origins: where each part of the parameters comes from.
      leave, fresh, read: see `common_jax.weights.take`.
      planned: the same; if given, nothing is read.
      adapt: further functions for reshaping parameters.
      frozen: whether the parameters stay frozen.
      average: whether to load the averages that were evaluated, if there are any, as for frozen
        parameters: what keeps training otherwise starts from the parameters themselves.

    Raises:
      ValueError: like `common_jax.weights.take`, and if frozen parameters would start from scratch,
        see `refuse_fresh`; see also `compare_images` and `compare_sections`.
    """
    sources = config.sources
    if frozen:
        refuse_fresh(config, shapes)
    # Planned sources will be made with this config's sections.
    existing = [origin for origin in origins if str(origin.source) not in (planned or {})]
    # Each source once, though a run of several modules has an origin for every stage.
    for source in dict.fromkeys(str(origin.source) for origin in existing):
        compare_images(config, source, frozen=frozen)
        if frozen:
            checkpoint.warn_if_unfinished(source)
    # The regexes may be meant for the trained network alone, so a frozen one that they do not match
    # causes no warning.
    if sources.leave:
        leave = (*leave, Allowance(sources.leave, "config.sources.leave", not frozen))
    if sources.fresh:
        fresh = (*fresh, Allowance(sources.fresh, "config.sources.fresh", not frozen))
    ways = dict(adapt or {})
    for role in shapes:
        section = getattr(config, SECTIONS[role])
        ways |= {f"{role}/{regex}": way for regex, way in family_of(section).adapt(section).items()}
    # Strict, unlike most loading in the original, which ignores missing and unknown names.
    read = read and planned is None
    start = take(
        shapes,
        origins,
        leave=leave,
        fresh=fresh,
        adapt=ways,
        average=average or frozen,
        read=read,
        planned=planned,
    )
    compare_sections(config, existing, frozen=frozen)
    return start


def refuse_fresh(config: Config, shapes: Mapping[str, Any], *, trained: str = "") -> None:
    """Raises ValueError if config.sources.fresh matches a parameter that the phase loads but does
    not train.

    Args:
      config: the run's config.
      shapes: the parameters that it loads, a nested dict.
      trained: regex of the paths of those that it trains.
    """
    regex, paths = config.sources.fresh, sorted(traverse_util.flatten_dict(shapes, sep="/"))
    fixed = (path for path in paths if not re.fullmatch(trained, path))
    found = [path for path in fixed if regex and re.fullmatch(regex, path)]
    if found:
        raise ValueError(
            f"config.sources.fresh={regex!r} matches {found[0]}, but phase={config.phase!r} "
            "does not train it: it would keep its random initial value. Give a source that has it, "
            "or a regex that matches only trained parameters"
        )


def compare_sections(config: Config, origins: Sequence[Origin], *, frozen: bool) -> None:
    """Compares the config sections of loaded networks with this run's, for fields that no shape of
    a parameter shows, such as `pool`.

    A network that keeps training adapts, so a difference is a warning; a frozen one cannot.

    Raises:
      ValueError: if the network is frozen and a field differs.
    """
    pairs = {(str(x.source), x.subtree.split("/")[0], x.target.split("/")[0]) for x in origins}
    for source, role, target in sorted(pairs):
        saved, section = checkpoint.load_config(source), SECTIONS[target]
        if SECTIONS[role] not in saved:
            continue
        made = getattr(freeze_stored(Config, saved, source), SECTIONS[role])
        differing = differing_fields(made, getattr(config, section))
        if not differing:
            continue
        said = ", ".join(
            f"{name}={theirs!r} (config.{section}.{name} is {ours!r})"
            for name, (theirs, ours) in differing.items()
        )
        if frozen:
            flags = " ".join(f"--config.{section}.{x}={y[0]}" for x, y in differing.items())
            raise ValueError(
                f"{source} was trained with {said}: with other values the same weights compute "
                f"something else. Give {flags}, or another source"
            )
        logging.warning("%s was trained with %s; it continues with the latter", source, said)


def differing_fields(made: Any, own: Any) -> dict[str, tuple[Any, Any]]:
    """Fields of two sections, by path such as "moe.chosen", whose values differ: theirs and ours.
    Fields that only one has, and those of NOT_COMPARED, are left out."""
    differing = {}
    for field in dataclasses.fields(made):
        name = field.name
        # The families may differ: a V-MoE that starts from a ViT has fields that the ViT lacks.
        if name in NOT_COMPARED or not hasattr(own, name):
            continue
        theirs, ours = getattr(made, name), getattr(own, name)
        if dataclasses.is_dataclass(theirs) and dataclasses.is_dataclass(ours):
            below = differing_fields(theirs, ours)
            differing |= {f"{name}.{path}": values for path, values in below.items()}
        elif theirs != ours:
            differing[name] = (theirs, ours)
    return differing


def compare_images(config: Config, source: str, *, frozen: bool) -> None:
    """Compares the images that a network was trained on with this run's.

    If mean or std differs, the network gets inputs on another scale than in its training. A network
    that keeps training adapts, so this is a warning; a frozen one cannot. A different image side
    is only a warning, since the position table is resized.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: if the network is frozen and its mean or std differs.
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
                f"{message}: its inputs would be scaled differently. Give {flags}, or another "
                "source; if these are converted weights and the values were only assumed, convert "
                "them again with the right ones as flags"
            )
        logging.warning("%s; from now on it trains on images normalised differently", message)
    if (side := made.get("image_size")) not in (None, ours.image_size):
        logging.warning(
            "%s was made for images of side %s, but config.data.image_size=%s: its position table "
            "is resized",
            source,
            side,
            ours.image_size,
        )


def same_numbers(a: Sequence[float], b: Sequence[float]) -> bool:
    """True if two means or stds are the same up to rounding. A different number of channels counts
    as equal here, because the shapes of the weights reveal it anyway."""
    return len(a) != len(b) or bool(np.allclose(a, b, rtol=0, atol=1e-4))


def require_source(config: Config, name: str) -> str:
    """config.sources.NAME; raises ValueError if it is empty."""
    source = getattr(config.sources, name)
    if not source:
        raise ValueError(
            f"config.sources.{name} is empty, but phase={config.phase!r} needs the workdir of a "
            "run that trained it"
        )
    return source


def require_stage_sources(config: Config, name: str, count: int) -> tuple[str, ...]:
    """config.sources.NAME as one workdir per stage; a single workdir serves all stages. Raises
    ValueError for any other number."""
    sources = getattr(config.sources, name)
    if len(sources) not in (1, count):
        raise ValueError(
            f"config.sources.{name} names {len(sources)} workdirs {sources}, but "
            f"phase={config.phase!r} needs "
            f"{count}, one per stage in order, or one that holds all stages"
        )
    return sources if len(sources) == count else sources * count
