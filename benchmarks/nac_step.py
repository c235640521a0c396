"""A training step of a published NAC: time, memory, parameters and FLOPs.

The step is a training step without augmentation: with all noise, AdamW and a donated state. It is
timed in turns with a step that uses the plain read-in of tests/naive.py, with keys and values for
every receiver. FLOPs are counted from the sizes, with a multiply-add as two, and by XLA.

If torch is installed, two torch steps (`nac_torch.py`) are timed too, in eager mode with fused
AdamW. "torch" computes what the original does, with the plain read-in, and "torch, rearranged" the
same sums as ours, so that the gains from the algebra and from the compiler can be told apart. These
and another step of ours, "ours, noise given", have the same weights, images and random draws. The
draws are made once in advance, so all noise is added but drawing it is not timed. The losses of the
first three steps are compared first. All of these are in float32.

    pip install torch
    python benchmarks/nac_step.py --preset tinyimagenet --batch 8
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping
from unittest import mock

import jax
import nac_torch
import numpy as np
import timing
from flax import traverse_util

from common_jax.optim import OptimConfig
from common_jax.weights import table as tables
from m2mkd_jax import losses
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model, names, read_in
from m2mkd_jax.nac.tokenizer import PRESETS

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import naive

# Weight decay on all parameters, as published.
OPTIM = OptimConfig(steps=1000, schedule="constant", lr=1e-4, lr_per=None, decay_all=True)
DROP_PATH = 0.1
TOLERANCE, TORCH_TOLERANCE = 1e-3, 1e-4
STREAMS = ("code", "kernel", "drop_path", "state", "pooling")
OURS, PLAIN, GIVEN = "rearranged read-in", "plain read-in", "ours, noise given"
CLAIM = "training step of NAC"


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--preset", choices=sorted(model.PRESETS), default="tinyimagenet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def forward_flops(config: model.NacConfig, interface: Interface, batch: int) -> dict[str, int]:
    """FLOPs of the matrix products and convolutions in a forward pass, by part.

    A step has either "read_in" or "plain_read_in". The part "codes" is the scales and initial
    states, which are computed from the codes once for all examples.
    """
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

    def scales(receivers: int, senders: int, sent: int) -> int:
        own = receivers * (2 * width + inner + hidden)
        return 2 * config.code_width * (own + 2 * senders * sent)

    trunk, before, side = 0, channels, image
    for stage, after in enumerate(tokenizer.widths):
        step = tokenizer.stem if stage == 0 else 2
        side //= step
        trunk += 2 * side**2 * step**2 * before * after
        block = 2 * side**2 * after * (49 + 8 * after)
        trunk += PRESETS[tokenizer.preset][stage] * block
        before = after
    read, outer = tokenizer.token_width, 4 * config.inputs * inner * width + ffn(config.inputs)
    parts = {
        "tokenizer": trunk,
        "read_in": outer
        + 4 * config.inputs * inner * read
        + 4 * config.heads * config.inputs * tokens * read,
        "plain_read_in": outer + 4 * config.inputs * tokens * inner * (read + 1),
        "propagators": config.iterations
        * (attention(config.mediators, latents, latents) + ffn(config.mediators)),
        "read_out": attention(config.outputs, latents, latents)
        + ffn(config.outputs)
        + 2 * width * interface.labels,
    }
    codes = scales(config.inputs, config.inputs, read)
    codes += config.iterations * scales(config.mediators, latents, width)
    codes += scales(config.outputs, latents, width)
    codes += 4 * (latents + config.outputs) * config.code_width * width
    return {name: batch * flops for name, flops in parts.items()} | {"codes": codes}


def make_noise(config: model.NacConfig, batch: int) -> dict[str, np.ndarray]:
    """All random draws of a step, keyed by the paths at which `nac.layers.draw` looks them up."""
    rng, codes = np.random.default_rng(1), config.code_width
    sets = {"input": config.inputs, "mediator": config.mediators, "output": config.outputs}
    senders = config.inputs + config.mediators
    uniform = {f"graph/{name}_codes": (count, codes) for name, count in sets.items()}
    uniform["stage_0/read_in/receiver_codes"] = config.inputs, codes
    for i in range(1, config.iterations + 2):
        last = i > config.iterations
        receivers = config.outputs if last else config.mediators
        uniform[f"stage_{i}/receiver_codes"] = receivers, codes
        uniform[f"stage_{i}/sender_codes"] = senders, codes
        if not last:
            uniform[f"stage_{i}/attention/kernel"] = batch, receivers, senders
            uniform[f"stage_{i}/attention/drop_path"] = batch, 1, 1
            uniform[f"stage_{i}/ffn/drop_path"] = batch, 1, 1
    noise = {path: rng.random(shape, "float32") for path, shape in uniform.items()}
    for name, count in sets.items():
        noise[f"graph/{name}_states"] = rng.normal(size=(batch, count, config.width))
    path = f"stage_{config.iterations + 1}/pooling/gumbel"
    noise[path] = rng.gumbel(size=(batch, config.outputs))
    return {path: x.astype("float32") for path, x in noise.items()}


def make_peers(
    sizes: argparse.Namespace,
    config: model.NacConfig,
    weights: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    noise: Mapping[str, np.ndarray],
) -> dict[str, Callable[[], float]]:
    """Torch steps by name; if there are none, prints why."""
    if sizes.dtype != "float32":
        print(f"skipping torch: its steps are in float32, and ours in {sizes.dtype}")
        return {}
    try:
        import torch
    except ImportError as error:
        print(f"skipping torch: {error}")
        return {}
    torch.set_num_threads(sizes.threads)
    print(f"torch {torch.__version__}")
    given = {path: torch.tensor(x) for path, x in noise.items()}
    arrays = [torch.tensor(batch[name]) for name in ("image", "target")]
    peers = {}
    for name, rearranged in {"torch": False, "torch, rearranged": True}.items():
        loss, parameters = nac_torch.make_loss(
            torch, config, weights, drop_path=DROP_PATH, rearranged=rearranged
        )
        peers[name] = timing.torch_step(torch, OPTIM, loss, parameters, *arrays, given)
    return peers


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    config, image_size, labels = model.preset(sizes.preset)
    interface = Interface(image_size, 3, labels)
    network = model.build(
        config, interface, dtype=jax.numpy.dtype(sizes.dtype), drop_path=DROP_PATH
    )

    def loss(params, noise, batch, rngs, step):
        del step
        images = batch["image"]
        logits, _ = network.apply(params["student"], images, train=True, rngs=rngs, noise=noise)
        return losses.soft_cross_entropy(logits, batch["target"]), {}

    rng = np.random.default_rng(0)
    shape = (sizes.batch, image_size, image_size, 3)
    batch = {
        "image": rng.normal(size=shape).astype("float32"),
        "target": np.eye(labels, dtype="float32")[rng.integers(labels, size=sizes.batch)],
    }

    def compile_step(noise: Mapping) -> timing.Training:
        """The step with this noise; noise that is missing is drawn."""
        init = lambda key: {"student": network.init(key)}  # noqa: E731
        task = timing.make_task(loss, init, model.PARTITION_RULES, batch, streams=STREAMS)
        task = dataclasses.replace(task, helpers=noise)
        return timing.Training(task, OPTIM, batch, noise)

    ours = compile_step({})
    with mock.patch.object(read_in, "pool_tokens", naive.pool_tokens):
        plain = compile_step({})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
    programs = {OURS: ours, PLAIN: plain}

    noise = make_noise(config, sizes.batch)
    weights = tables.write(names.network_table(config), ours.state.params["student"])
    peers = make_peers(sizes, config, weights, batch, noise)
    wrong = {PLAIN: timing.check_losses(programs, TOLERANCE)}
    cases = programs | peers
    if peers:
        given = jax.device_put(traverse_util.unflatten_dict(noise, sep="/"))
        cases[GIVEN] = compile_step(given)
        wrong["torch"] = timing.check_losses({GIVEN: cases[GIVEN]} | peers, TORCH_TOLERANCE)
    times = timing.take_turns(cases, sizes.repeats)

    parts = forward_flops(config, interface, sizes.batch)
    total, middle = 3 * sum(parts.values()), float(np.median(times[OURS][:, 0]))
    flops = {OURS: total - 3 * parts["plain_read_in"], PLAIN: total - 3 * parts["read_in"]}
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {sizes.dtype}")
    for name, count in parts.items():
        print(f"  {name:14s}{count / 1e9:8.2f} GFLOP forward")
    speed = flops[OURS] / middle / 1e9
    print(f"{speed:.0f} GFLOP/s; compiled in {ours.compile_seconds:.0f} s")
    details = {"preset": sizes.preset, "batch": sizes.batch, "parameters": parameters}
    for name, case in programs.items():
        memory = case.compiled.memory_analysis()
        details[name] = {
            "gflop_analytic": flops[name] / 1e9,
            "gflop_xla": case.compiled.cost_analysis()["flops"] / 1e9,
            "peak_memory_mib": memory.peak_memory_in_bytes / 2**20,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "arguments_mib": memory.argument_size_in_bytes / 2**20,
        }
        temporary = details[name]["temporary_mib"]
        print(f"{name}: {flops[name] / 1e9:.1f} GFLOP, {temporary:.0f} MiB temporary")
    claims = [timing.compare(times, OURS, PLAIN, claim=CLAIM, target=1.0)]
    claims += [timing.compare(times, GIVEN, peer, claim=CLAIM, target=1.0) for peer in peers]
    timing.report("nac_step", claims, times=times, largest_difference_of_losses=wrong, **details)


if __name__ == "__main__":
    main()
