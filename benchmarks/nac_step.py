"""A training step of a published NAC: time, memory, parameters and operations.

The step is that of training without augmentation: with all noise, AdamW and a donated state. It is
timed in turns with a step that uses the plain read-in of tests/naive.py, with keys and values for
every receiver. Operations are counted from the sizes, a multiply-add as two, and by XLA.

    python benchmarks/nac_step.py --preset tinyimagenet --batch 8
"""

import argparse
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
import timing

from common_jax.optim import OptimConfig
from m2mkd_jax import losses
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model, read_in
from m2mkd_jax.nac.tokenizer import PRESETS

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import naive

TOLERANCE = 1e-3
STREAMS = ("code", "kernel", "drop_path", "state", "pooling")


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--preset", choices=sorted(model.PRESETS), default="tinyimagenet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def forward_flops(config: model.NacConfig, interface: Interface, batch: int) -> dict[str, int]:
    """Operations of the matrix products and convolutions in a forward pass, by part."""
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


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    config, image_size, labels = model.preset(sizes.preset)
    interface = Interface(image_size, 3, labels)
    network = model.build(config, interface, dtype=jax.numpy.dtype(sizes.dtype), drop_path=0.1)
    optim = OptimConfig(steps=1000, schedule="constant", lr=1e-5, lr_per=None)

    def loss(params, helpers, batch, rngs, step):
        del helpers, step
        logits, _ = network.apply(params["student"], batch["image"], train=True, rngs=rngs)
        return losses.soft_cross_entropy(logits, batch["target"]), {}

    rng = np.random.default_rng(0)
    shape = (sizes.batch, image_size, image_size, 3)
    batch = {
        "image": rng.normal(size=shape).astype("float32"),
        "target": np.eye(labels, dtype="float32")[rng.integers(labels, size=sizes.batch)],
    }

    def compile_step() -> timing.Training:
        init = lambda key: {"student": network.init(key)}  # noqa: E731
        return timing.Training(
            timing.make_task(loss, init, model.PARTITION_RULES, batch, streams=STREAMS),
            optim,
            batch,
        )

    ours = compile_step()
    with mock.patch.object(read_in, "pool_tokens", naive.pool_tokens):
        plain = compile_step()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
    cases = {"rearranged read-in": ours, "plain read-in": plain}
    wrong = timing.check_losses(cases, TOLERANCE)
    times = timing.take_turns(cases, sizes.repeats)

    parts = forward_flops(config, interface, sizes.batch)
    flops, middle = 3 * sum(parts.values()), float(np.median(times["rearranged read-in"][:, 0]))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {sizes.dtype}")
    for name, count in parts.items():
        print(f"  {name:12s}{count / 1e9:8.2f} GFLOP forward")
    print(f"{flops / middle / 1e9:.0f} GFLOP/s; compiled in {ours.compile_seconds:.0f} s")
    details = {"preset": sizes.preset, "batch": sizes.batch, "parameters": parameters}
    for name, case in cases.items():
        memory = case.compiled.memory_analysis()
        details[name] = {
            "gflop_xla": case.compiled.cost_analysis()["flops"] / 1e9,
            "peak_memory_mib": memory.peak_memory_in_bytes / 2**20,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "arguments_mib": memory.argument_size_in_bytes / 2**20,
        }
        print(f"{name}: {details[name]['temporary_mib']:.0f} MiB temporary")
    claim = timing.compare(
        times, "rearranged read-in", "plain read-in", claim="training step of NAC", target=1.0
    )
    details |= {"gflop_analytic": flops / 1e9, "largest_difference_of_losses": wrong}
    timing.report("nac_step", [claim], times=times, **details)


if __name__ == "__main__":
    main()
