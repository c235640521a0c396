"""Runners for CLIPTrans' frozen encoders."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from cliptrans_jax.towers import clip, clip_names, mclip, mclip_names
from common_jax.weights import table as tables
from parity.cases import Case, Comparison, compare_trees

# Feature in a case -> (ids, mask) that it is computed from; None: no mask, or all ones.
MCLIP_VARIANTS = {
    "text_features": ("input_ids", "attention_mask"),
    "text_features_holes": ("input_ids", "attention_mask_holes"),
    "text_features_allones": ("input_ids", None),
    "text_features_innerpad": ("input_ids_innerpad", "attention_mask"),
}
CLIP_TEXT_VARIANTS = {
    "text_features": ("input_ids", "attention_mask"),
    "text_features_nomask": ("input_ids", None),
    "text_features_eospad": ("input_ids_eospad", None),
}


def run_mclip(case: Case) -> Iterator[Comparison]:
    """M-CLIP's text tower: hidden states, features under every mask, position ids."""
    sizes, inputs = case.config["config"], case.arrays.below("inputs/")
    config = mclip.MClipConfig(
        vocab=sizes["vocab_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        hidden=sizes["intermediate_size"],
        positions=sizes["max_position_embeddings"],
        types=sizes["type_vocab_size"],
        eps=sizes["layer_norm_eps"],
        pad=sizes["pad_token_id"],
        features=sizes["num_dims"],
    )
    network = mclip.MClip(config, jnp.float32)
    table = mclip_names.table(config)
    example = jnp.zeros((1, 1), jnp.int32)
    params, comparisons = _read(case, network, table, example, example)
    yield from comparisons

    want, results = case.arrays.below("outputs/"), {}
    for name, (ids, mask) in MCLIP_VARIANTS.items():
        if name in want:
            ids = jnp.asarray(inputs[ids])
            mask = jnp.ones_like(ids) if mask is None else jnp.asarray(inputs[mask])
            results[name], hidden = _apply(network, params, ids, mask)
            if name == "text_features":
                results["last_hidden_state"] = hidden["last_hidden"][0]
    exact = {name for name in want if name.startswith("position_ids")}
    places = {
        name: mclip.position_ids(jnp.asarray(inputs[name.replace("position", "input")]), config.pad)
        for name in exact
    }
    yield from compare_trees(
        "outputs/", results, {n: want[n] for n in want.keys() - exact}, case.tolerance()
    )
    yield from compare_trees("outputs/", places, {n: want[n] for n in exact}, (0, 0))


def run_clip_image(case: Case) -> Iterator[Comparison]:
    """CLIP's image tower: outputs of the first norm and of the blocks, class token, features."""
    sizes = case.config["config"]
    config = clip.ClipVisionConfig(
        image=sizes["vision"]["image_size"],
        patch=sizes["vision"]["patch"],
        **_clip_sizes(sizes, "vision"),
    )
    network = clip.ClipVision(config, jnp.float32)
    table = clip_names.vision_table(config)
    images = jnp.asarray(case.arrays["inputs/pixel_values"].transpose(0, 2, 3, 1))
    params, comparisons = _read(case, network, table, images)
    yield from comparisons

    features, hidden = _apply(network, params, images)
    results = {
        "image_features": features,
        "pooler_output": hidden["pooled"][0],
        "last_hidden_state": hidden["last_hidden"][0],
        "after_pre_layernorm": hidden["embedded"][0],
    }
    yield from compare_trees("outputs/", results, case.arrays.below("outputs/"), case.tolerance())


def run_clip_text(case: Case) -> Iterator[Comparison]:
    """CLIP's text tower: hidden states except at pads, position of the end token, features."""
    sizes, inputs = case.config["config"], case.arrays.below("inputs/")
    config = clip.ClipTextConfig(
        vocab=sizes["text"]["vocab_size"],
        positions=sizes["text"]["max_positions"],
        **_clip_sizes(sizes, "text"),
    )
    network = clip.ClipText(config, jnp.float32)
    table = clip_names.text_table(config)
    example = jnp.zeros((1, 1), jnp.int32)
    params, comparisons = _read(case, network, table, example, None)
    yield from comparisons

    want, results = case.arrays.below("outputs/"), {}
    for name, (ids, mask) in CLIP_TEXT_VARIANTS.items():
        if name in want:
            mask = mask if mask is None else jnp.asarray(inputs[mask])
            results[name], hidden = _apply(network, params, jnp.asarray(inputs[ids]), mask)
            if name == "text_features":
                results["last_hidden_state"] = hidden["last_hidden"][0]
    if "last_hidden_state" in want:
        visible = inputs["attention_mask"] != 0  # the original's states at pads are arbitrary
        for states in (results, want):
            states["last_hidden_state"] = np.asarray(states["last_hidden_state"])[visible]
    if "eos_positions" in want:
        ends = clip.end_position(jnp.asarray(inputs["input_ids"]))
        yield "outputs/eos_positions", ends, want.pop("eos_positions"), 0, 0
    yield from compare_trees("outputs/", results, want, case.tolerance())


def _clip_sizes(sizes: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """The arguments that both towers' configs share."""
    return {
        "width": sizes[tower]["hidden"],
        "layers": sizes[tower]["layers"],
        "heads": sizes[tower]["heads"],
        "hidden": sizes[tower]["ffn"],
        "eps": sizes["layer_norm_eps"],
        "features": sizes["projection_dim"],
        "activation": re.match(r"\w+", sizes["act"]).group(),
    }


def _read(
    case: Case, network: nn.Module, table: tables.Table, *example: Any
) -> tuple[dict[str, Any], list[Comparison]]:
    """The case's parameters, and comparisons for a round trip to the original's names."""
    tensors = case.arrays.below("params/")
    shapes = jax.eval_shape(network.init, jax.random.key(0), *example)["params"]
    params, account = tables.read(table, tensors, shapes=shapes, file=case.name)
    used = {name: tensors[name] for name, _, _ in account.taken}
    written = tables.write(table, params)
    return params, list(compare_trees("params/", written, used, (0, 0)))


def _apply(network: nn.Module, params: Any, *inputs: Any) -> tuple[jax.Array, dict[str, Any]]:
    features, recorded = network.apply({"params": params}, *inputs, mutable=["intermediates"])
    return features, recorded["intermediates"]
