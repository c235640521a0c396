"""One whole training step of a published NAC: its time, memory, parameters and operations.

The step is the one that training runs: augmentation apart, all noise drawn, AdamW applied, the
state donated. It is timed alternately with the forward pass alone; the ratio of medians is printed
(three, where the backward pass costs twice the forward pass). Floating-point operations are counted
from the sizes, a multiply-add as two; what XLA counts is printed beside them. The last line is
JSON.

    python benchmarks/nac_step.py --preset tinyimagenet --batch 8
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from common_jax.optim import OptimConfig, make_schedule
from common_jax.step import init_state, make_step
from m2mkd_jax import losses
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.models.nac import model
from m2mkd_jax.models.nac.tokenizer import PRESETS

STREAMS = ("code", "kernel", "drop_path", "state", "pooling")


def parse_sizes() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(model.PRESETS), default="tinyimagenet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each")
    return parser.parse_args()


def forward_flops(config: model.NacConfig, interface: Interface, batch: int) -> dict[str, int]:
    """Operations of the matrix products and convolutions of a forward pass, part by part."""
    inner = config.heads * config.head_width
    hidden, width = round(config.ffn_factor * config.width), config.width
    tokenizer, image = config.tokenizer, interface.image_size
    channels, tokens = interface.channels, tokenizer.side(image) ** 2
    latents = config.inputs + config.mediators

    def ffn(count: int) -> int:
        return 2 * count * width * hidden * (3 if config.geglu else 2)

    def attention(receivers: int, senders: int, projected: int) -> int:
        linear = 2 * width * inner * (2 * receivers + 2 * projected)
        return linear + 4 * receivers * senders * inner

    trunk, before, side = 0, channels, image
    for stage, after in enumerate(tokenizer.widths):
        step = tokenizer.stem if stage == 0 else 2
        side //= step
        trunk += 2 * side**2 * step**2 * before * after
        block = 2 * side**2 * after * (49 + 8 * after)
        trunk += PRESETS[tokenizer.preset][stage] * block
        before = after
    read = tokenizer.token_width
    parts = {
        "tokenizer": trunk,
        "read_in": 4 * config.inputs * inner * (width + read)
        + 4 * config.heads * config.inputs * tokens * read
        + ffn(config.inputs),
        "propagators": config.iterations
        * (attention(config.mediators, latents, latents) + ffn(config.mediators)),
        "read_out": attention(config.outputs, latents, latents)
        + ffn(config.outputs)
        + 2 * width * interface.labels,
    }
    return {name: batch * flops for name, flops in parts.items()}


def milliseconds(function, *arguments):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return 1e3 * (time.perf_counter() - start), result


def main() -> None:
    sizes = parse_sizes()
    config, image_size, labels = model.preset(sizes.preset)
    interface = Interface(image_size, 3, labels)
    network = model.build(config, interface, dtype=jax.numpy.dtype(sizes.dtype), drop_path=0.1)
    optim = OptimConfig(steps=1000, batch=sizes.batch)

    def forward(params, images, rngs):
        return network.apply(params["student"], images, train=True, rngs=rngs)[0]

    def loss(params, helpers, batch, rngs, step):
        del helpers, step
        logits = forward(params, batch["image"], {name: rngs[name] for name in STREAMS})
        return losses.soft_cross_entropy(logits, batch["target"]), {}

    rng = np.random.default_rng(0)
    shape = (sizes.batch, image_size, image_size, 3)
    batch = {
        "image": rng.normal(size=shape).astype("float32"),
        "target": np.eye(labels, dtype="float32")[rng.integers(labels, size=sizes.batch)],
    }
    params = {"student": jax.jit(network.init)(jax.random.key(0))}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = init_state(params, optim, trainable=".*", metrics={})
    step = make_step(loss, optim, make_schedule(optim, 100), trainable=".*", log_every=1)
    seed = np.uint32(0)

    start = time.perf_counter()
    arguments = (state, {}, batch, seed)
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    rngs = {name: jax.random.key(i) for i, name in enumerate(STREAMS)}
    evaluated = jax.tree.map(jax.numpy.copy, params)
    run_forward = jax.jit(forward).lower(evaluated, batch["image"], rngs).compile()

    times = {"step": [], "forward": []}
    for turn in range(sizes.repeats + 1):
        spent, (state, metrics) = milliseconds(compiled, state, {}, batch, seed)
        alone, _ = milliseconds(run_forward, evaluated, batch["image"], rngs)
        if turn:  # the first touches memory for the first time
            times["step"].append(spent)
            times["forward"].append(alone)
    assert np.isfinite(float(metrics["loss"])), metrics

    parts = forward_flops(config, interface, sizes.batch)
    flops, memory = 3 * sum(parts.values()), compiled.memory_analysis()
    middle = statistics.median(times["step"])
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {sizes.dtype}")
    for name, count in parts.items():
        print(f"  {name:12s}{count / 1e9:8.2f} GFLOP forward")
    print(f"step {middle:.0f} ms, {flops / middle / 1e6:.0f} GFLOP/s; compiled in {seconds:.0f} s")
    ratio = middle / statistics.median(times["forward"])
    print(f"step / forward: {ratio:.2f}")
    mib = 2**20
    report = {
        "preset": sizes.preset,
        "batch": sizes.batch,
        "ms": middle,
        "ms_all": times["step"],
        "step_over_forward": ratio,
        "parameters": parameters,
        "gflop_analytic": flops / 1e9,
        "gflop_xla": compiled.cost_analysis()["flops"] / 1e9,
        "peak_memory_mib": memory.peak_memory_in_bytes / mib,
        "temporary_mib": memory.temp_size_in_bytes / mib,
        "arguments_mib": memory.argument_size_in_bytes / mib,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
