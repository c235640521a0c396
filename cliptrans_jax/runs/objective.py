"""Loss and warm start for the stages that train a translator."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax import numpy as jnp

from cliptrans_jax import pretrained
from cliptrans_jax.config import Config
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.evaluators.translation import Encode
from cliptrans_jax.losses import states_loss
from cliptrans_jax.models.chunks import CHUNK
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.runs.run_data import check_weights, is_run
from common_jax import checkpoint
from common_jax.state import merge
from common_jax.step import Loss
from common_jax.weights import Allowance, Origin, WarmStart, size_of, take, warn_of_no_match


def make_encode(tower: TextTower | None) -> Encode:
    """encode(params, batch, dropout=None) -> the features in the batch or, with a text tower, those
    that it computes from the batch's tokens; its parameters are under "clip" in `params`."""

    def encode(
        params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array | None = None
    ) -> jax.Array | None:
        if "clip_tokens" not in batch:
            return batch.get("features")
        assert tower is not None
        return tower.apply(params["clip"], batch["clip_tokens"], dropout=dropout)

    return encode


def make_loss(
    translator: Translator, tower: TextTower | None, *, label_smoothing: float, chunk: int = CHUNK
) -> Loss:
    """The mean label loss over a micro-batch's tokens (CLIPTrans loss). A text tower in the helpers
    is frozen and runs without dropout."""
    pad, encode = translator.config.sizes.pad, make_encode(tower)

    def loss(params, helpers, batch, rngs, step):
        dropout = rngs["dropout"]
        key = jax.random.fold_in(dropout, 3) if "clip" in params else None
        features = encode({**helpers, **params}, batch, key)
        source, labels = batch["source"], batch["labels"]
        states = translator.label_states(params, features, source, labels, dropout=dropout)
        total, count = states_loss(
            translator.readout(params),
            states,
            labels,
            pad=pad,
            smoothing=label_smoothing,
            chunk=chunk,
        )
        return total / jnp.maximum(count, 1), {}

    return loss


def make_warm_start(
    config: Config, tower: TextTower | None
) -> Callable[[Mapping[str, Any]], WarmStart] | None:
    """Makes a function that loads a stage's initial weights: from another run, a released
    checkpoint or a published translator, and from a text tower if the stage trains it. None to
    train from scratch."""
    sources, architecture = config.sources, config.model.architecture
    if not (sources.model or sources.translator or tower is not None):
        return None

    def warm_start(shapes: Mapping[str, Any]) -> WarmStart:
        parts = []
        rest = {name: tree for name, tree in shapes.items() if name != "clip"}
        if sources.model and is_run(sources.model):
            rest = _of_run(sources.model, tower, shapes)
            parts.append(_take_run(config, rest))
        elif sources.model:
            published = pretrained.load(
                sources.model, kind="cliptrans", config=config.model, weights=sources.weights
            )
            parts.append(_published(published, published.params, rest, fresh=sources.fresh))
        elif sources.translator:
            published = pretrained.load(
                sources.translator,
                kind=architecture.kind,
                fetch=sources.fetch,
                weights=sources.weights,
            )
            _require_sizes(config, published.config)
            name = architecture.subtree
            params, shapes_of = {name: published.params}, {name: rest[name]}
            parts.append(_published(published, params, shapes_of, fresh=sources.fresh))
        if tower is not None and "clip" not in rest:
            params = pretrained.place(tower.params, shapes["clip"])
            account = [{"source": "text tower", "as": "clip"} | size_of(params)]
            parts.append(WarmStart({"clip": params}, {"taken": account}))
        params = merge(*(part.params for part in parts))
        account = {
            key: [entry for part in parts for entry in part.account.get(key, ())]
            for key in ("taken", "adapted", "left", "fresh", "notes", "assumed")
        }
        listed = {entry["name"] for entry in account["fresh"]}
        flat = (set(traverse_util.flatten_dict(tree, sep="/")) for tree in (shapes, params))
        rest = sorted(set.difference(*flat) - listed)
        account["fresh"] += [{"name": name, "reason": "in none of the sources"} for name in rest]
        return WarmStart(params, account)

    return warm_start


def check_start(config: Config, tower: TextTower | None, shapes: Mapping[str, Any]) -> None:
    """Checks the sources of a stage's weights without reading arrays.

    Args:
      tower: the text tower, if it is trained.
      shapes: shapes of all parameters.

    Raises:
      FileNotFoundError: if a folder or file is missing.
      ValueError: if a run's parameters do not fit.
    """
    sources = config.sources
    if sources.model and is_run(sources.model):
        _take_run(config, _of_run(sources.model, tower, shapes), read=False)
    else:
        check_weights(config)


def _of_run(source: str, tower: TextTower | None, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes that are loaded from a run; the text tower's only if that run trained it."""
    trained = tower is not None and "clip" in checkpoint.load_shapes(source)
    return {name: tree for name, tree in shapes.items() if name != "clip" or trained}


def _take_run(config: Config, shapes: Mapping[str, Any], *, read: bool = True) -> WarmStart:
    sources = config.sources
    fresh = (Allowance(sources.fresh, "config.sources.fresh", True),) if sources.fresh else ()
    leave = (Allowance(sources.leave, "config.sources.leave", True),) if sources.leave else ()
    subtrees = checkpoint.load_shapes(sources.model)
    origins = [Origin(sources.model, name, name) for name in subtrees]
    return take(shapes, origins, fresh=fresh, leave=leave, read=read)


def _published(
    published: Any, params: Mapping[str, Any], shapes: Mapping[str, Any], *, fresh: str
) -> WarmStart:
    params, shapes = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, shapes))
    left_out = sorted(path for path in shapes if fresh and re.fullmatch(fresh, path))
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
