"""Runners for CLIPTrans' examples in each stage, and for its optimizer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from cliptrans_jax.config import Config
from cliptrans_jax.data.examples import (
    Examples,
    NoiseConfig,
    choose_examples,
    drop_tokens,
    keep_mask,
    pad,
)
from cliptrans_jax.losses import label_loss
from cliptrans_jax.stages import STAGES, Side
from common_jax.optim import OptimConfig, make_schedule
from common_jax.step import init_state, make_step
from parity.cases import Case, Comparison, compare_lists

EXACT = (0, 0)
PAD = 1
NO_PAD = -1  # labels in the optimizer's case are classes, and negative ones are ignored


def run_dataset(case: Case) -> Iterator[Comparison]:
    """Every stage and split: examples, dropped tokens, padding."""
    sizes, arrays = case.config["config"], case.arrays
    pair = (sizes["src_lang"], sizes["tgt_lang"])
    tokens = {language: _ragged(arrays[f"inputs/tokens/{language}"]) for language in pair}
    for one in sizes["cases"]:
        yield from _stage(case, one, pair, tokens)


def _stage(
    case: Case, one: Mapping[str, Any], pair: tuple[str, str], tokens: Mapping[str, Any]
) -> Iterator[Comparison]:
    arrays, name, options = case.arrays, one["name"], one["options"]
    config = Config(
        stage=one["stage"],
        parity=True,
        noise=NoiseConfig(
            mask_prob=one["mask_prob"],
            train=options.get("noise_train", False),
            test=options.get("noise_test", False),
        ),
        unfreeze_clip=options.get("unfreeze_clip", False),
    ).apply_parity()
    train = one["side"] == "train"
    examples = choose_examples(
        STAGES[one["stage"]],
        tokens,
        pair=pair,
        train=train,
        noise=config.noise,
        side=Side(config.test_side) if config.test_side and not train else None,
        all_languages=options.get("use_all_langs", False),
    )
    yield f"{name} length", len(examples), one["length"], *EXACT
    yield compare_lists(f"{name} texts", _references(examples), one["raw"])
    yield f"{name} draws", len(examples) if examples.drops else 0, one["n_draws"], *EXACT

    sources, keep = list(examples.source), [np.ones(len(x), bool) for x in examples.source]
    if examples.drops:
        draws = arrays[f"inputs/draws/{name}"]
        rows = [row[: len(ids)] for row, ids in zip(draws, sources, strict=True)]
        keep = [keep_mask(row, one["mask_prob"]) for row in rows]
        sources = [
            drop_tokens(ids, row, one["mask_prob"]) for ids, row in zip(sources, rows, strict=True)
        ]
    prefix = f"outputs/{name}/mbart/"
    ids = pad(sources, max(map(len, sources)), pad_id=PAD)
    yield f"{name} source", ids, arrays[f"{prefix}input_ids"], *EXACT
    lengths = np.array([len(x) for x in sources])
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    yield f"{name} mask", mask, arrays[f"{prefix}attention_mask"], *EXACT
    labels = pad(examples.target, max(map(len, examples.target)), pad_id=PAD)
    yield f"{name} labels", labels, arrays[f"{prefix}labels"], *EXACT
    # The mask over the caption's remaining tokens, which the original collates but never uses.
    want = arrays[f"{prefix}mask_decoder_input_ids"]
    padded = np.ones(want.shape, bool)
    if STAGES[one["stage"]].captioning:
        for row, mask in zip(padded, keep, strict=True):
            row[: len(mask)] = mask
    yield f"{name} kept", padded, want, *EXACT
    yield from _clip(case, one, pair, examples)


def _clip(
    case: Case, one: Mapping[str, Any], pair: tuple[str, str], examples: Examples
) -> Iterator[Comparison]:
    arrays, name = case.arrays, one["name"]
    if one["options"].get("unfreeze_clip"):
        tokens = _ragged(arrays[f"inputs/clip_tokens/{pair[0]}"])
        ids = pad(tokens, max(map(len, tokens)), pad_id=PAD)
        yield f"{name} clip", ids, arrays[f"outputs/{name}/clip/input_ids"], *EXACT
        want = arrays[f"outputs/{name}/clip/attention_mask"]
        yield f"{name} clip mask", ids != PAD, want, *EXACT
        return
    texts = {language: arrays[f"inputs/text_embs/{language}"] for language in pair}
    features = examples.features(arrays["inputs/image_embs"], texts)
    yield f"{name} clip", features, arrays[f"outputs/{name}/clip"], *EXACT


def run_optimizer(case: Case) -> Iterator[Comparison]:
    """AdamW on the summed gradients of micro-batches, through our own train step."""
    sizes, arrays, tolerance = case.config["config"], case.arrays, case.tolerance()
    x, y = jnp.asarray(arrays["inputs/x"]), jnp.asarray(arrays["inputs/y"])
    count, size = sizes["update_count"], x.shape[1]
    config = Config(
        parity=True,
        optim=OptimConfig(
            lr=sizes["lr"],
            lr_per=None,
            schedule="constant",
            b1=sizes["betas"][0],
            b2=sizes["betas"][1],
            eps=sizes["eps"],
            weight_decay=sizes["weight_decay"],
            accumulate=count,
            batch=count * size,
        ),
    ).apply_parity()

    def loss(params, helpers, batch, rngs, step):
        logits = batch["x"] @ params["w"].T + params["b"]
        total, counted = label_loss(logits[:, None], batch["y"][:, None], pad=NO_PAD)
        return total / counted, {}

    def micro_losses(params, chosen):
        pairs = zip(x[chosen], y[chosen], strict=True)
        return [loss(params, {}, {"x": a, "y": b}, {}, 0)[0] for a, b in pairs]

    params = {name: jnp.asarray(arrays[f"params/{name}"]) for name in ("w", "b")}
    updates = len(x) // count
    optim = dataclasses.replace(config.optim, steps=updates)
    schedule = make_schedule(optim, updates)
    step = make_step(loss, optim, schedule, trainable=".*", log_every=1)
    state = init_state(params, optim, trainable=".*", metrics={})
    losses = []
    for update in range(updates):
        group = slice(update * count, (update + 1) * count)
        losses += micro_losses(state.params, group)
        # The step deals the rows of a batch to micro-batches in turn (row i to i mod N).
        batch = {"x": x[group].swapaxes(0, 1), "y": y[group].swapaxes(0, 1)}
        batch = {name: value.reshape(-1, *value.shape[2:]) for name, value in batch.items()}
        state, _ = step(state, {}, batch, jnp.uint32(0))
        for name in ("w", "b"):
            want = arrays[f"outputs/{name}"][update]
            yield f"{name} after {update + 1}", state.params[name], want, *tolerance
        yield f"rate {update}", schedule(update), arrays["outputs/lr"][update], *tolerance
    rest = slice(updates * count, None)
    losses += micro_losses(state.params, rest)
    yield "losses", jnp.stack(losses), arrays["outputs/losses"], *tolerance

    gradient = jax.grad(lambda params: sum(micro_losses(params, rest)))(state.params)["w"]
    yield "gradient left over", gradient, arrays["outputs/leftover_grad_w"], *tolerance
    general = dataclasses.replace(optim, schedule="polynomial", steps=10, min_lr=sizes["lr"] / 10)
    curve = make_schedule(general, updates)
    want = arrays["outputs/poly_lr_generic"]
    # The original records the learning rate after an update, which is that of the next update.
    got = [curve(step + 1) for step in range(len(want))]
    yield "polynomial", got, want, *tolerance


def _ragged(padded: np.ndarray) -> list[np.ndarray]:
    return [row[row >= 0].astype(np.int32) for row in padded]


def _references(examples: Examples) -> list[str]:
    """The reference texts of the original's metrics, named by language and row."""
    pairs = zip(examples.languages, examples.rows, strict=True)
    return [f"{target}-{row}" for (_, target), row in pairs]
