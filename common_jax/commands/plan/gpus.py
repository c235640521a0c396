"""Published specs of GPUs, and described (compile-only) devices of hosts that have them."""

import functools
import importlib.resources
import importlib.util

import jax
from jax.experimental import topologies

from common_jax.commands.plan.chips import Chip, warn_of_version
from common_jax.commands.plan.hlo import CUDA
from common_jax.nn.attention import CUDA_PLUGINS

# Seconds that a queued kernel takes to start, whatever it does.
LAUNCH = 2e-6
# Seconds per iteration of a loop whose length the host reads, measured on one H200: docs/gpu.md.
WAIT = 17.6e-6

_gpu = functools.partial(
    Chip, network="nvlink", unit="card", group="host", launch=LAUNCH, wait=WAIT
)
# Peak of dense products in bfloat16 and TF32, and half of NVLink's bidirectional bandwidth, from
# the data sheets of the SXM cards at nvidia.com. Memory and its bandwidth as in `cards/`, which has
# what the driver reports.
CARDS = {
    "a100": _gpu(312e12, 85100068864, 2039.04e9, 300e9, flops32=156e12),
    "h100": _gpu(989e12, 84942979072, 3352.32e9, 450e9, flops32=494e12),
    "h200": _gpu(989e12, 151397597184, 4800e9, 450e9, flops32=494e12),
    "b200": _gpu(2250e12, 191514411008, 7672.32e9, 900e9, flops32=1125e12),
}
# Without a card, products cannot be autotuned, which Triton's require and cuBLAS's do not.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def description(card: str) -> str:
    """The card's properties, as the text of a GpuTargetConfigProto."""
    files = importlib.resources.files("common_jax.commands.plan")
    return (files / "cards" / f"{card}.txtpb").read_text()


def check_cuda() -> None:
    """Warns if XLA's compiler for CUDA is not the version that `plan.hlo` was written for; raises
    ValueError if it is not installed."""
    found = [name for name in CUDA_PLUGINS if importlib.util.find_spec(name)]
    if not found:
        raise ValueError(
            "JAX's plugin for CUDA, which holds the compiler for GPUs, is not installed: pip "
            f"install 'jax[cuda12]=={CUDA}' (5.5 GB), or this package with its extra 'gpu-plan'"
        )
    warn_of_version(
        found[0].replace("_", "-"),
        CUDA,
        doubtful="collectives, traffic and launches",
        remedy="Run tests/test_gpu_plan.py",
    )


def describe_cards(card: str, *, hosts: int, cards: int) -> list[jax.Device]:
    """Described devices of `hosts` hosts with `cards` cards each, for compilation only.

    Raises:
      ValueError: without JAX's plugin for CUDA, or if it cannot compile for the card.
    """
    check_cuda()
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=description(card),
            topology=f"1x{hosts}x{cards}",  # slices x hosts x cards
        ).devices
    except RuntimeError as error:
        raise ValueError(
            f"--topology={card}:{hosts}x{cards} is refused by the installed XLA: {error}"
        ) from error
    return list(found)
