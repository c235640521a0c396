"""Runners for NAC's layers, kernels, blocks, latents, tokenizers and whole networks."""

from collections.abc import Iterator

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from m2mkd_jax.losses import smoothed_cross_entropy
from m2mkd_jax.nac import kernel as kernels
from m2mkd_jax.nac.blocks import Ffn, LatentAttention, Propagator
from m2mkd_jax.nac.latents import Graph, GraphConfig, LatentConfig, Seeder
from m2mkd_jax.nac.layers import CodeLinear, add_code_noise
from m2mkd_jax.nac.network import ReadOut
from m2mkd_jax.nac.read_in import AttentiveReadIn, ProjectionReadIn, ReadInAttention
from m2mkd_jax.nac.tokenizer import Tokenizer, fit_grid
from parity.cases import Case, Comparison
from parity.nac_arguments import LATENTS, fill, inherit
from parity.nac_compare import bind, compare, compare_extended, grad_tolerance
from parity.nac_configs import (
    attention_config,
    block_config,
    kernel_config,
    linear_config,
    read_in_config,
    read_out_config,
    seeding,
    split_ffn,
    tokenizer_config,
)
from parity.nac_networks import Draws, build_network, to_device
from parity.names import read_part, write_nac, write_part
from parity.networks import to_images

KERNEL_GRADIENTS = (1e-3, 1e-3)
LOG_SAMPLES = (1e-4, 1e-4)
CODED = ("receiver_states", "receiver_codes", "sender_states")
PAIRED = (*CODED, "sender_codes", "receiver_signatures", "sender_signatures")


def run_linear(case: Case) -> Iterator[Comparison]:
    """The layers FC or WModFC."""
    params = read_part(case.arrays.below("params/"), "code_linear")
    sizes = case.config["config"]
    layer = CodeLinear(
        linear_config(sizes, params),
        sizes["in_features"],
        sizes["out_features"],
        sizes["context_features"],
        use_bias="bias" in params,
        dtype=jnp.float32,
    )
    apply = lambda p, x: {"out": layer.apply({"params": p}, x["input"], x["context"])}  # noqa: E731
    yield from compare(case, apply, params, "code_linear", ("input", "context"))


def run_modulated_linear(case: Case) -> Iterator[Comparison]:
    """ModFC in every variant listed in the json, on the same tensors."""
    arrays, sizes = case.arrays, case.config["config"]
    whole = to_device(read_part(arrays.below("params/"), "code_linear"))
    gradients = arrays.below("grads/")
    for name, variant in case.config["variants"].items():
        config = linear_config(variant, whole)
        layer = CodeLinear(
            config,
            sizes["in_features"],
            sizes["out_features"],
            sizes["context_features"],
            use_bias=variant["bias"],
            dtype=jnp.float32,
        )
        absent = () if variant["bias"] else ("bias",)
        absent += () if config.learnable_gain else ("gain",)
        params = {key: leaf for key, leaf in whole.items() if key not in absent}
        x = jnp.asarray(arrays[f"inputs/{variant.get('input', 'x')}"])
        codes = jnp.asarray(arrays[f"inputs/{variant.get('context', 'ctx')}"])
        apply = lambda p, x, codes, layer=layer: layer.apply({"params": p}, x, codes)  # noqa: E731
        out = apply(params, x, codes)
        yield f"outputs/{name}", out, arrays[f"outputs/{name}"], *case.tolerance("float32")
        if not any(key.startswith(f"{name}/") for key in gradients):
            continue
        _, vjp = jax.vjp(apply, params, x, codes)
        by_params, by_x, by_codes = vjp(jnp.asarray(arrays["inputs/cot"]))
        got = write_part(by_params, "code_linear")
        got |= {"inputs/x": by_x, "inputs/ctx": by_codes}
        for key, gradient in got.items():
            if f"{name}/{key}" in gradients:
                want = gradients[f"{name}/{key}"]
                yield f"grads/{name}/{key}", gradient, want, *grad_tolerance(case)


def run_kernel(case: Case) -> Iterator[Comparison]:
    """Distances, kernels and samples in every variant listed in the json."""
    arrays, gradients = case.arrays, case.arrays.below("grads/")
    for name, variant in case.config["variants"].items():
        call = variant["call"]
        shape = arrays[f"outputs/{name}"].ndim
        rows = "signatures_fulltrunc" if call.get("full_trunc") else "signatures"
        batched = name.startswith("shape_")
        parts = [rows, "types"]
        if batched:
            ranks = [int(rank) for rank in name.split("_")[1:]]
            parts = [p if rank == 2 else f"{p}_b" for p, rank in zip(parts, ranks, strict=True)]
        a, b = (jnp.asarray(arrays[f"inputs/{part}"]) for part in parts)
        config = kernel_config(variant["kernel"])
        bandwidth = jnp.asarray(arrays["params/bandwidth"])
        uniform = jnp.asarray(arrays["noise/uniform"])

        def compute(a, b, bandwidth, config=config, call=call, uniform=uniform):
            return _kernel(a, b, bandwidth, config, call, uniform)

        out, vjp = jax.vjp(compute, a, b, bandwidth)
        want = arrays[f"outputs/{name}"]
        assert out.ndim == shape, name
        sampled = call.get("train") and config.stochastic and call.get("log")
        tolerance = LOG_SAMPLES if sampled else case.tolerance("float32")
        yield from compare_extended(f"outputs/{name}", out, want, tolerance)
        keys = [key for key in gradients if key.startswith(f"{name}/")]
        if not keys:
            continue
        weights = jnp.asarray(arrays["inputs/cot2" if want.ndim == 2 else "inputs/cot3"])
        weights = jnp.where(np.isfinite(want), weights, 0.0)
        got = dict(zip(("signatures", "types", "bandwidth"), vjp(weights), strict=True))
        for key in keys:
            yield from compare_extended(
                f"grads/{key}", got[key.split("/")[1]], gradients[key], KERNEL_GRADIENTS
            )


def _kernel(a, b, bandwidth, config, call, uniform) -> jax.Array:
    if a.ndim < b.ndim:
        a = jnp.broadcast_to(a, (len(b), *a.shape))
    distance = kernels.cosine_distance(a, b)
    if call.get("dist"):
        return distance
    logs = kernels.log_kernel(distance, bandwidth, config)
    samples = config.stochastic and (call.get("train") or config.evaluation == "sample")
    if call.get("log"):
        if samples:
            logs = kernels.sample_log(logs, uniform, temperature=config.temperature)
        elif config.stochastic and config.evaluation == "threshold":
            logs = kernels.threshold_log(logs)
        if "norm" in call:
            logs = kernels.normalise_log_rows(logs, empty_row=config.empty_row)
        return logs
    affinity = kernels.exp_kernel(distance, bandwidth, config)
    if samples:
        # The original mistakes the kernel for its logarithm here.
        affinity = jnp.exp(kernels.sample_log(affinity, uniform, temperature=config.temperature))
    elif config.stochastic and config.evaluation == "threshold":
        affinity = jnp.exp(kernels.threshold_log(jnp.log(affinity)))
    if "norm" in call:
        affinity = kernels.normalise_rows(affinity, empty_row=config.empty_row)
    return affinity


def run_attention(case: Case) -> Iterator[Comparison]:
    """Latent attention under a kernel."""
    params = read_part(case.arrays.below("params/"), "attention")
    attention = LatentAttention(attention_config(case.config["config"]), jnp.float32)
    draws = Draws(case.arrays.below("noise/"))
    noise = {
        "kernel": draws.take("kernel", "uniform"),
        "drop_path": draws.take("drop_path", "uniform"),
    }

    def attend(module, x, train):
        distance = kernels.cosine_distance(x["receiver_signatures"], x["sender_signatures"])
        keys, values = module.project(x["sender_states"], x["sender_codes"], train=train)
        receivers = x["receiver_states"], x["receiver_codes"]
        return module(*receivers, keys, values, distance, train=train)

    apply = bind(case, attention, noise, attend)
    yield from compare(case, apply, params, "attention", PAIRED)


def run_read_in_attention(case: Case) -> Iterator[Comparison]:
    """Attention from latents to tokens."""
    kwargs = case.config["config"]
    params = read_part(case.arrays.below("params/"), "attention")
    block = block_config(kwargs, {"attention": params})
    scale = 1.0 if "layer_scale" in params else None
    attention = ReadInAttention(block, kwargs["input_dim"], scale, jnp.float32)
    apply = bind(case, attention, {}, lambda m, x, train: m(*(x[n] for n in CODED), train=train))
    yield from compare(case, apply, params, "attention", CODED)


def run_read_in(case: Case) -> Iterator[Comparison]:
    """A whole read-in, by attention or projection."""
    kwargs = case.config["config"]
    params = read_part(case.arrays.below("params/"), "read_in")
    config = read_in_config(inherit(kwargs, kwargs), params)
    if config.kind == "projection":
        module = ProjectionReadIn(config.block, kwargs["input_dim"], jnp.float32)
    else:
        module = AttentiveReadIn(config.block, kwargs["input_dim"], config.scale, jnp.float32)
    noise = Draws(case.arrays.below("noise/")).read_in()
    apply = bind(case, module, noise, lambda m, x, train: m(*(x[n] for n in CODED), train=train))
    yield from compare(case, apply, params, "read_in", CODED)


def run_ffn(case: Case) -> Iterator[Comparison]:
    """The code-conditioned MLP."""
    params = read_part(case.arrays.below("params/"), "ffn")
    block = block_config(case.config["config"], {"ffn": params})
    noise = {"drop_path": Draws(case.arrays.below("noise/")).take("drop_path", "uniform")}
    apply = bind(
        case, Ffn(block, jnp.float32), noise, lambda m, x, t: m(x["states"], x["codes"], train=t)
    )
    yield from compare(case, apply, params, "ffn", ("states", "codes"))


def run_propagator(case: Case) -> Iterator[Comparison]:
    """Attention and MLP with noise on the codes."""
    params = read_part(case.arrays.below("params/"), "propagator")
    block = block_config(case.config["config"], params)
    yield from _run_messages(case, Propagator(block, jnp.float32), params, "propagator", None)


def run_read_out(case: Case) -> Iterator[Comparison]:
    """Attention, MLP and the optional head of the output latents."""
    kwargs = case.config["config"]
    params = read_part(case.arrays.below("params/"), "read_out")
    config = read_out_config(kwargs, None)
    # A case records the output of all latents; our stage returns only the first.
    module = ReadOut(config, kwargs["output_dim"], jnp.float32)
    yield from _run_messages(case, module, params, "read_out", config)


def _run_messages(case: Case, module, params, part: str, read_out) -> Iterator[Comparison]:
    def send(module, x, train):
        distance = kernels.cosine_distance(x["receiver_signatures"], x["sender_signatures"])
        messages = (x["sender_states"],), x["sender_codes"], distance
        receivers = x["receiver_states"], x["receiver_codes"]
        if read_out is None:
            return module(*receivers, *messages, train=train)
        states = module.block(*receivers, *messages, train=train)
        if read_out.head is None:
            return states
        return module.code_head(states, x["receiver_codes"], train=train)

    noise = Draws(case.arrays.below("noise/")).propagator()
    yield from compare(case, bind(case, module, noise, send), params, part, PAIRED)


def run_seeder(case: Case) -> Iterator[Comparison]:
    """Initial states from codes."""
    kwargs, arrays = case.config["config"], case.arrays
    params = read_part(arrays.below("params/"), "seeder")
    sets = (LatentConfig(len(arrays["inputs/codes"])),) * 3
    sizes = {"signature_width": 1, "code_width": kwargs["code_dim"], "width": kwargs["state_dim"]}
    graph = GraphConfig(*sets, **sizes, seeding=seeding(kwargs, {}))
    draws = Draws(arrays.below("noise/"))
    noise = {"codes": draws.take("code_noiser", "uniform"), "states": draws.take("root", "normal")}

    def seed(module, x, train):
        scale = kwargs.get("code_noise_scale") or 0.0
        mean, deviation = module(add_code_noise(module, "codes", x["codes"], scale, train=train))
        states = jnp.broadcast_to(mean, (case.config["batch_size"], *mean.shape))
        return states if deviation is None else states + deviation * noise["states"]

    yield from compare(
        case, bind(case, Seeder(graph, jnp.float32), noise, seed), params, "seeder", ("codes",)
    )


def run_latents(case: Case) -> Iterator[Comparison]:
    """Signatures, codes, one layer's codes, learned states."""
    options = fill("latents", case.config["config"], LATENTS)
    arrays = case.arrays.below("params/")
    state = {name.removeprefix("latents."): array for name, array in arrays.items()}
    params = to_device(read_part(state, "latents"))
    learned = options["learnable_initial_states"]
    sets = (LatentConfig(options["num_latents"], layers=options["num_layers"]),) * 3
    config = GraphConfig(
        *sets,
        width=options["state_dim"] if learned else options["code_dim"],
        signature_width=options["signature_dim"],
        code_width=options["code_dim"],
        seeding="learned" if learned else "code",
    )
    tree = {"params": dict.fromkeys(("input", "mediator", "output"), params)}
    layer = case.config["layer_idx"]
    for name, want in case.arrays.below("outputs/").items():
        batch = len(want) if name.startswith("initial_states") else 1
        latents = Graph(config, jnp.float32).apply(tree, batch)["mediator"]
        got = {"signatures": latents.signatures, "codes": latents.codes}
        got["code_layer"] = latents.layer_codes(0 if layer is None else layer)
        yield f"outputs/{name}", got.get(name, latents.states), want, 0, 0


def run_tokenizer(case: Case) -> Iterator[Comparison]:
    """Tokens, the features before the grid, and gradients."""
    kwargs, image = case.config["config"], case.arrays["inputs/image"]
    params = read_part(case.arrays.below("params/"), "tokenizer")
    config = tokenizer_config(kwargs, width=kwargs["repr_dim"])
    module = Tokenizer(config, image.shape[-1], jnp.float32)
    side, width = config.side(image.shape[-1]), config.widths[-1]

    def run(params, inputs):
        tokens = module.apply({"params": params}, jnp.moveaxis(inputs["image"], 1, -1))
        features = tokens[..., :width].reshape(len(image), side, side, width)
        return {"tokens": tokens, "features_bchw": jnp.moveaxis(features, -1, 1)}

    yield from compare(case, run, params, "tokenizer", ("image",))
    sides = [image.shape[-1], image.shape[-1] // 4]
    sides += [sides[1] // 2**s for s in range(1, config.stages)]
    yield "spatial", sides, case.config["spatial"], 0, 0
    yield "output_dim", config.token_width, case.config["output_dim"], 0, 0


def run_positional_grid(case: Case) -> Iterator[Comparison]:
    """The positional grid unchanged, as in the original, and averaged down to other sizes."""
    grid = jnp.moveaxis(jnp.asarray(case.arrays["params/pg.grid"]), 0, -1)
    for name, want in case.arrays.below("outputs/").items():
        size = want.shape[2:] if name.startswith("intended") else grid.shape[:2]
        fitted = fit_grid(grid, tuple(size), resize="adaptive")
        got = jnp.broadcast_to(jnp.moveaxis(fitted, -1, 0), want.shape)
        yield f"outputs/{name}", got, want, *case.tolerance("float32")


def run_network(case: Case) -> Iterator[Comparison]:
    """A whole NAC: tokens, states, logits, and all gradients of the cross entropy."""
    arrays, config = case.arrays, case.config["config"]
    images = to_images(arrays["inputs/image"])
    network, params, sharing = build_network(config, arrays.below("params/"), images.shape[1])
    noise = to_device(Draws(arrays.below("noise/")).network(network))
    train = case.config["mode"] == "train"

    def loss(params, images):
        logits, recorded = network.apply(
            params, images, train=train, noise=noise, record=("states", "intermediates")
        )
        target = jnp.asarray(arrays["inputs/target"])
        return smoothed_cross_entropy(logits, target, 0.0), (logits, recorded)

    with nn.intercept_methods(split_ffn):
        if case.config["has_grads"]:
            differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (_, (logits, recorded)), (by_params, by_images) = differentiate(params, images)
        else:
            _, (logits, recorded) = jax.jit(loss)(params, images)
    last = f"stage_{len(network) - 1}"
    results = {
        "tokens": recorded["stage_0"]["intermediates"]["tokens"][0],
        "input_states": recorded["states"]["input"],
        "mediator_states": recorded["states"]["mediator"],
        "output_states": recorded[last]["intermediates"]["output_states"][0],
        "logits": logits,
    }
    for name, want in arrays.below("outputs/").items():
        yield f"outputs/{name}", results[name], want, *case.tolerance("float32")
    if case.config["has_grads"]:
        got = write_nac(by_params, sharing)
        got["inputs/image"] = jnp.moveaxis(by_images, -1, 1)
        for name, want in arrays.below("grads/").items():
            yield f"grads/{name}", got[name], want, *grad_tolerance(case)
