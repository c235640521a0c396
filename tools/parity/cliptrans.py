"""Runners for CLIPTrans' translation model: forward pass, loss and gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from cliptrans_jax.losses import label_loss
from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models import mapper as mappers
from cliptrans_jax.models import prefix as prefixes
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.stages import STAGES, trainable
from cliptrans_jax.translators import mbart, mbart_names
from cliptrans_jax.translators.mbart import MBart, MBartConfig
from common_jax import state
from common_jax.weights import table as tables
from parity.cases import Case, Comparison, compare_lists

EXACT = (0, 0)
IGNORED = -100  # the original's label where ours are negative


def mbart_config(sizes: Mapping[str, Any]) -> MBartConfig:
    """Config of the model with a json's sizes."""
    return MBartConfig(
        vocab=sizes["vocab_size"],
        width=sizes["d_model"],
        encoder_layers=sizes["encoder_layers"],
        decoder_layers=sizes["decoder_layers"],
        encoder_heads=sizes["encoder_attention_heads"],
        decoder_heads=sizes["decoder_attention_heads"],
        encoder_hidden=sizes["encoder_ffn_dim"],
        decoder_hidden=sizes["decoder_ffn_dim"],
        positions=sizes["max_position_embeddings"],
        scale_embedding=sizes["scale_embedding"],
        pad=sizes["pad_token_id"],
        eos=sizes["eos_token_id"],
        start=sizes["decoder_start_token_id"],
    )


def translator(sizes: Mapping[str, Any], *, layout: str = "original") -> Translator:
    """The whole model with a json's sizes, and with the original's mask."""
    config = ModelConfig(
        mbart=mbart_config(sizes["mbart"]),
        mapper=MapperConfig(
            kind=sizes["mapping_network"], prefix=sizes["prefix_length"], features=sizes["clip_dim"]
        ),
        prefix=PrefixConfig(layout=layout, mask="original"),
    )
    return Translator(config)


def load(model: Translator, case: Case) -> dict[str, Any]:
    """The parameters of a case."""
    return tables.read(
        cliptrans_names.table(model.config),
        case.arrays.below("params/"),
        shapes=jax.eval_shape(model.init, jax.random.key(0)),
        file=case.name,
    )[0]


def run_mbart(case: Case) -> Iterator[Comparison]:
    """mBART alone; the original is run with a decoder mask or without."""
    arrays, tolerance = case.arrays, case.tolerance()
    config = mbart_config(case.config["config"])
    network = MBart(config, jnp.float32)
    ids = jnp.asarray(arrays["inputs/input_ids"])
    mask = jnp.asarray(arrays["inputs/attention_mask"]) > 0
    labels = jnp.asarray(arrays["inputs/labels"])
    table = mbart_names.table(config)
    decoder_ids = mbart.shift_right(labels, pad=config.pad)
    params, _ = tables.read(
        table,
        arrays.below("params/"),
        shapes=jax.eval_shape(network.init, jax.random.key(0), ids, mask, decoder_ids)["params"],
        file=case.name,
    )
    yield "shift", decoder_ids, arrays["outputs/shift_tokens_right"], *EXACT
    length = labels.shape[1]
    visible = jnp.tril(jnp.ones((1, 1, length, length), bool))
    if "inputs/decoder_attention_mask" in arrays:
        seen = jnp.asarray(arrays["inputs/decoder_attention_mask"]) > 0
        visible = prefixes.visibility(seen, count=0, rule="original")
    if "outputs/self_attn_visible" in arrays:
        want = arrays["outputs/self_attn_visible"]
        yield "visible", jnp.broadcast_to(visible, want.shape), want, *EXACT

    def forward(params):
        def network_call(module):
            states = module.encode(ids, mask)
            hidden = module.decode(module.embed(decoder_ids), states, mask, visible)
            return states, module.logits(hidden)

        states, logits = network.apply({"params": params}, method=network_call)
        total, count = label_loss(logits, labels, pad=config.pad)
        return total / count, (states, logits)

    (loss, (states, logits)), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
    yield "states", states, arrays["outputs/encoder_last_hidden_state"], *tolerance
    yield "logits", logits, arrays["outputs/logits"], *tolerance
    yield "loss", loss, arrays["outputs/loss"], *tolerance
    yield from _gradients(tables.write(table, gradient), case, tolerance)


def run_prefix(case: Case) -> Iterator[Comparison]:
    """The training pass with a mapping network, and which parameters are trained."""
    arrays, tolerance = case.arrays, case.tolerance()
    model = translator(case.config["config"])
    config = model.config
    params = load(model, case)
    source, labels = (jnp.asarray(arrays[f"inputs/{name}"]) for name in ("input_ids", "labels"))
    features = jnp.asarray(arrays["inputs/clip"]) if config.mapper.prefix else None
    mask = source != config.mbart.pad
    yield "source mask", mask, arrays["inputs/attention_mask"], *EXACT

    decoder_ids = mbart.shift_right(labels, pad=config.mbart.pad)
    yield "shift", decoder_ids, arrays["outputs/decoder_input_ids"], *EXACT
    used = prefixes.insert_ignored(labels, config.mapper.prefix)
    used = jnp.where((used < 0) | (used == config.mbart.pad), IGNORED, used)
    want = arrays["outputs/labels_used"]
    yield "labels", used, np.where(want == config.mbart.pad, IGNORED, want), *EXACT
    embeddings, visible = model.decoder_input(params, features, labels)
    want = arrays["outputs/self_attn_visible"]
    yield "visible", jnp.broadcast_to(visible, want.shape), want, *EXACT
    if config.mapper.prefix:
        vectors = model.prefix(params, features, len(labels))
        yield "prefix", vectors, arrays["outputs/prefix_embeds"], *tolerance
        yield "embeddings", embeddings, arrays["outputs/decoder_inputs_embeds"], *tolerance
        # The last slot attends to all unmasked slots before it; pads are at the end.
        seen = arrays["outputs/decoder_attention_mask"] > 0
        later = np.arange(seen.shape[1]) > max(config.mapper.prefix, prefixes.ORIGINAL_KEYS)
        yield "mask", visible[:, 0, -1, :] & later, seen & later, *EXACT
    states = model.encode(params, source)
    yield "states", states, arrays["outputs/encoder_last_hidden_state"], *tolerance

    def forward(params):
        hidden = model.decode_labels(params, features, source, labels)
        variables = {"params": params["mbart"]}
        logits = model.network.apply(variables, hidden, method=MBart.logits)
        total, count = label_loss(logits, used, pad=config.mbart.pad)
        # Training leaves out the prefix's slots, and must give the same loss.
        few = model.train_logits(params, features, source, labels)
        total_few, count_few = label_loss(few, labels, pad=config.mbart.pad)
        return total_few / count_few, (total / count, logits)

    (loss, (full, logits)), gradient = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
    yield "logits", logits, arrays["outputs/logits"], *tolerance
    yield "loss", loss, arrays["outputs/loss"], *tolerance
    yield "loss over all slots", full, arrays["outputs/loss"], *tolerance
    table = cliptrans_names.table(config)
    stage = STAGES[case.config["config"]["stage"]]
    moved = state.partition(gradient, trainable(stage, "encoder", config.architecture))[0]
    written = tables.write(table, moved)
    still = sorted(set(_own(tables.write(table, gradient))) - set(written))
    frozen = sorted(set(case.config["frozen_params"]) - set(table.aliases))
    yield compare_lists("frozen", still, frozen)
    yield compare_lists("moved", sorted(written), sorted(case.arrays.below("grads/")))
    yield from _gradients(written, case, tolerance)


def run_mapper(case: Case) -> Iterator[Comparison]:
    """A mapping network alone: output and gradients of sum(output * cotangent)."""
    arrays, tolerance, sizes = case.arrays, case.tolerance(), case.config["config"]
    config = MapperConfig(
        kind=sizes["mapping_network"], prefix=sizes["prefix_length"], features=sizes["clip_dim"]
    )
    network = mappers.build(config, sizes["mbart_dim"], jnp.float32)
    x, cotangent = (jnp.asarray(arrays[f"inputs/{name}"]) for name in ("x", "cotangent"))
    table = cliptrans_names.mapper_table(config)
    params, _ = tables.read(
        table,
        {name.removeprefix("adapter."): x for name, x in arrays.below("params/").items()},
        shapes=jax.eval_shape(lambda: network.init(jax.random.key(0), x, False))["params"],
        file=case.name,
    )
    y, pull = jax.vjp(lambda p, x: network.apply({"params": p}, x, False), params, x)
    yield "y", y, arrays["outputs/y"], *tolerance
    of_params, of_input = pull(cotangent)
    got = tables.write(table, of_params) | {"__input__": of_input}
    for name, want in arrays.below("grads/").items():
        yield f"grads/{name}", got[name.removeprefix("adapter.")], want, *tolerance


def _gradients(
    got: Mapping[str, np.ndarray], case: Case, tolerance: tuple[float, float]
) -> Iterator[Comparison]:
    """Compares all gradients in the case."""
    for name, want in case.arrays.below("grads/").items():
        yield f"grads/{name}", got[name], want, *tolerance


def _own(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names of parameters, without the logits' bias, which is a buffer in the original."""
    return [name for name in tensors if not name.endswith("final_logits_bias")]
