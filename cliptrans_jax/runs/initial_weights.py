"""The initial weights of the stages that train a translator."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from flax import traverse_util

from cliptrans_jax import pretrained
from cliptrans_jax.config import Config
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.models.prefix import ORIGINAL_KEYS
from cliptrans_jax.stages import FREEZES, STAGES
from common_jax import checkpoint
from common_jax.state import merge
from common_jax.weights import Allowance, Origin, WarmStart, size_of, take, warn_of_no_match
from common_jax.workdir import check_input, freeze_stored

# Fields of a translator's sizes that shapes show or, for sinusoidal positions, only set a limit.
SHOWN = (
    *("vocab", "width", "encoder_layers", "decoder_layers", "encoder_hidden", "decoder_hidden"),
    "positions",
)
PUBLISHED = "a folder or a file of weights, or config.sources.fetch=True for a name on the hub"
Shapes = Mapping[str, Any]  # ShapeDtypeStructs with shardings, in a nested dict


def make_warm_start(
    config: Config, tower: TextTower | None
) -> Callable[[Shapes], WarmStart] | None:
    """Makes a function that loads a stage's initial weights: from another run, a released
    checkpoint or a published translator, and from a text tower if the stage trains it. None to
    train from scratch."""
    sources = config.sources
    if not (sources.model or sources.translator or tower is not None):
        return None
    return functools.partial(_warm_start, config, tower)


def _warm_start(config: Config, tower: TextTower | None, shapes: Shapes) -> WarmStart:
    sources, parts = config.sources, []
    of_model = _shapes_of_model(sources.model, tower, shapes)
    if sources.model:
        take_model = _take_run if is_run(sources.model) else _take_released
        parts.append(take_model(config, of_model))
    elif sources.translator:
        parts.append(_take_translator(config, of_model))
    if tower is not None and "clip" not in of_model:
        parts.append(_take_tower(tower, shapes["clip"]))
    return _join(parts, shapes)


def check_start(config: Config, tower: TextTower | None, shapes: Shapes) -> None:
    """Checks the sources of a stage's weights without reading arrays.

    Args:
      tower: the text tower, if it is trained.
      shapes: shapes of all parameters.

    Raises:
      FileNotFoundError: if a folder or file is missing.
      ValueError: if a run's parameters do not fit; see also `check_fresh`.
    """
    check_fresh(config, shapes)
    sources = config.sources
    if sources.model and is_run(sources.model):
        _take_run(config, _shapes_of_model(sources.model, tower, shapes), read=False)
    else:
        check_weights(config)


def check_fresh(config: Config, shapes: Shapes) -> None:
    """Raises ValueError if config.sources.fresh matches a parameter that a captioning stage
    freezes."""
    fresh, architecture = config.sources.fresh, config.model.architecture
    parts = FREEZES[config.freeze] if STAGES[config.stage].captioning else ()
    if not (fresh and parts):
        return
    below = "|".join(getattr(architecture, part) for part in parts)
    for path in traverse_util.flatten_dict(shapes, sep="/"):
        if re.fullmatch(fresh, path) and re.fullmatch(f"{architecture.subtree}/({below})", path):
            raise ValueError(
                f"config.sources.fresh={fresh!r} matches {path}, but config.freeze="
                f"{config.freeze!r} does not train it: it would keep its random initial value. "
                "Give a regex that matches only trained parameters, or config.freeze=nothing"
            )


def _shapes_of_model(source: str, tower: TextTower | None, shapes: Shapes) -> dict[str, Any]:
    """The shapes that the source of the model has: all, but those of a text tower only if it is a
    run that trained it."""
    from_run = bool(source) and is_run(source)
    trained = tower is not None and from_run and "clip" in checkpoint.load_shapes(source)
    return {name: tree for name, tree in shapes.items() if name != "clip" or trained}


def _take_run(config: Config, shapes: Shapes, *, read: bool = True) -> WarmStart:
    sources = config.sources
    fresh = (Allowance(sources.fresh, "config.sources.fresh", True),) if sources.fresh else ()
    leave = (Allowance(sources.leave, "config.sources.leave", True),) if sources.leave else ()
    subtrees = checkpoint.load_shapes(sources.model)
    origins = [Origin(sources.model, name, name) for name in subtrees]
    start = take(shapes, origins, fresh=fresh, leave=leave, read=read)
    compare_models(config, sources.model, fixed=_frozen_fields(config), warn=read)
    return start


def compare_models(
    config: Config, source: epath.PathLike, *, fixed: Callable[[str], bool], warn: bool = True
) -> None:
    """Compares the config.model of a run with this run's, for fields that no shape shows.

    A network that keeps training adapts, so a difference only gives a warning. So does one of the
    prefix, whose layout may be changed for decoding.

    Args:
      config: this run's, after `Config.apply_parity`.
      source: the other run.
      fixed: field of the translator's sizes -> whether the network cannot adapt to another value.
      warn: whether to log warnings.

    Raises:
      ValueError: if a fixed field differs.
    """
    ours, step = config.model, checkpoint.find_step(source)
    made = freeze_stored(Config, checkpoint.load_config(step), step).apply_parity().model
    if made.translator != ours.translator:
        return
    names = ours.architecture.differing_sizes(ours.sizes, made.sizes)
    names = [name for name in names if name not in SHOWN]
    pairs = {
        f"{ours.key}.{name}": (getattr(made.sizes, name), getattr(ours.sizes, name))
        for name in names
    }
    if wrong := [f"{ours.key}.{name}" for name in names if fixed(name)]:
        flags = " ".join(f"--{key}={pairs[key][0]}" for key in wrong)
        raise ValueError(
            f"config.sources.model={config.sources.model!r} was trained with "
            f"{_differences(pairs, wrong)}: with other values the same weights compute something "
            f"else. Give {flags}, or another source"
        )
    # A conversion, at step 0, says nothing of the prefix.
    if ours.mapper.prefix and made.mapper.prefix and step.name != "0":
        # The two masks agree for this length.
        fields = ("layout",) if ours.mapper.prefix == ORIGINAL_KEYS else ("layout", "mask")
        both = {x: (getattr(made.prefix, x), getattr(ours.prefix, x)) for x in fields}
        pairs |= {f"config.model.prefix.{x}": two for x, two in both.items() if two[0] != two[1]}
    if pairs and warn:
        said = _differences(pairs, pairs)
        logging.warning("%s was trained with %s; this run uses its own values", source, said)


def _differences(pairs: Mapping[str, tuple[Any, Any]], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={pairs[key][0]!r} (here {pairs[key][1]!r})" for key in keys)


def _frozen_fields(config: Config) -> Callable[[str], bool]:
    """For `compare_models`: the fields that a frozen encoder depends on."""
    frozen = STAGES[config.stage].captioning and FREEZES[config.freeze]
    others = ("decoder_heads", "eos", "start")
    return lambda name: bool(frozen) and name not in others


def _take_released(config: Config, shapes: Shapes) -> WarmStart:
    sources = config.sources
    # With sizes from the config: these checkpoints have none.
    published = pretrained.load(
        sources.model, kind="cliptrans", config=config.model, weights=sources.weights
    )
    return _published(published, published.params, shapes, fresh=sources.fresh)


def _take_translator(config: Config, shapes: Shapes) -> WarmStart:
    sources, architecture = config.sources, config.model.architecture
    published = pretrained.load(
        sources.translator, kind=architecture.kind, fetch=sources.fetch, weights=sources.weights
    )
    _require_sizes(config, published.config)
    name = architecture.subtree
    params, of_translator = {name: published.params}, {name: shapes[name]}
    return _published(published, params, of_translator, fresh=sources.fresh)


def _take_tower(tower: TextTower, shapes: Shapes) -> WarmStart:
    params = pretrained.place(tower.params, shapes)
    account = [{"source": "text tower", "as": "clip"} | size_of(params)]
    return WarmStart({"clip": params}, {"taken": account})


def _join(parts: Sequence[WarmStart], shapes: Shapes) -> WarmStart:
    """All parts with one account, in which `fresh` also has what is in none of them."""
    params = merge(*(part.params for part in parts))
    account = {
        key: [entry for part in parts for entry in part.account.get(key, ())]
        for key in ("taken", "adapted", "left", "fresh", "notes", "assumed")
    }
    listed = {entry["name"] for entry in account["fresh"]}
    # For example the mapping network of a first stage, which starts from a published translator.
    every, loaded = (set(traverse_util.flatten_dict(tree, sep="/")) for tree in (shapes, params))
    account["fresh"] += [
        {"name": name, "reason": "in none of the sources"}
        for name in sorted(every - loaded - listed)
    ]
    return WarmStart(params, account)


def _published(
    published: Any, params: Mapping[str, Any], shapes: Shapes, *, fresh: str
) -> WarmStart:
    params, shapes = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    left_out = sorted(path for path in shapes if fresh and re.fullmatch(fresh, path))
    # Left out of both trees, since `place` is strict: each must have all parameters of the other.
    if fresh:
        warn_of_no_match(Allowance(fresh, "config.sources.fresh", True), shapes)
    for path in left_out:
        params.pop(path, None)
        del shapes[path]
    arrays = traverse_util.unflatten_dict(pretrained.place(params, shapes), sep="/")
    account = {
        "fresh": [{"name": path, "reason": "config.sources.fresh"} for path in left_out],
        "taken": [{"source": published.source, "as": published.kind} | size_of(arrays)],
        "left": [{"name": name, "reason": why} for name, why in published.account.dropped],
        "notes": [*published.account.notes],
        "assumed": [{"field": name, "value": value} for name, value in published.account.assumed],
    }
    return WarmStart(arrays, account)


def _require_sizes(config: Config, file_sizes: Any) -> None:
    model = config.model
    differing = [
        f"{model.key}.{name}={getattr(model.sizes, name)!r}, and the file has "
        f"{getattr(file_sizes, name)!r}"
        for name in model.architecture.differing_sizes(model.sizes, file_sizes)
    ]
    if differing:
        raise ValueError(
            f"config.sources.mbart={config.sources.translator!r} is not the config's model: "
            + "; ".join(differing)
            + ". Set these fields to the file's values; a vocabulary may be larger than the "
            "tokenizer's"
        )


def has_published_translator(config: Config) -> bool:
    """True if the translator's weights are published ones, alone or in a released checkpoint."""
    sources = config.sources
    return bool(sources.mbart or (sources.model and not is_run(sources.model)))


def is_run(source: str) -> bool:
    """True if `source` is a workdir or a step in one, not a released file."""
    try:
        checkpoint.find_step(source)
    except FileNotFoundError:
        return False
    return True


def check_weights(config: Config) -> None:
    """Raises FileNotFoundError if config.sources.model or .mbart is set but missing."""
    source = config.sources.model
    path = epath.Path(source)
    # A file NAME.pth may be split into NAME_1.pth, NAME_2.pth, ...
    if not source or not path.with_name(f"{path.stem}_1{path.suffix}").is_file():
        check_input("config.sources.model", source, "a workdir, or a released checkpoint")
    check_published(config, "mbart")


def check_published(config: Config, name: str) -> None:
    """Raises FileNotFoundError if the path in config.sources.`name` is missing; a name to fetch
    from the hub needs no path."""
    if not config.sources.fetch:
        check_input(f"config.sources.{name}", getattr(config.sources, name), PUBLISHED)
