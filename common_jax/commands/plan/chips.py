"""Published specs of TPU chips, and described (compile-only) devices of a slice."""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import os

import jax
from jax.experimental import topologies

from common_jax.commands.plan.hlo import LIBTPU


@dataclasses.dataclass(frozen=True)
class Chip:
    """The specs of one chip, a TPU or a GPU.

    Attributes:
      flops: bfloat16 operations per second; a multiply-add is two.
      hbm: bytes of memory.
      hbm_bandwidth: bytes per second between memory and cores.
      links: bytes per second that the chip can send within its group, over all of its links, while
        receiving as many.
      layout: libtpu's name for the setting in which a chip is one device.
      network: name of these links.
      unit: what people call the chip.
      group: name of the group of chips that these links connect: a slice of TPUs, a host of GPUs.
      flops32: float32 operations per second at JAX's default precision; None: same as `flops`.
      launch: seconds between the starts of two consecutive kernels; 0: not counted.
      wait: seconds per iteration of a loop whose length the host reads; 0: not counted.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    links: float
    layout: str = "default"
    network: str = "ici"
    unit: str = "chip"
    group: str = "slice"
    flops32: float | None = None
    launch: float = 0.0
    wait: float = 0.0


# From https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p-training and v6e: peak compute, HBM
# capacity and bandwidth, and half of the bidirectional ICI bandwidth. The v4 page gives only the
# all-reduce bandwidth of a pod of 4,096 chips, 1.1 PB/s, which is divided by their number; the same
# gives the published figures of v5e (51.2 TB/s over 256) and v6e (102.4 TB/s over 256).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 268e9, layout="megacore"),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9),
}


def check_libtpu() -> None:
    """Warns if libtpu is not the version that `plan.hlo` was written for; raises ValueError if it
    is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, which holds the compiler for TPUs, is not installed: pip install "
            f"libtpu=={LIBTPU}, or this package with its extra 'pods'"
        )
    warn_of_version(
        "libtpu",
        LIBTPU,
        doubtful="collectives, traffic and the roofline",
        remedy=f"pip install libtpu=={LIBTPU}, or run tests/test_hlo.py",
    )


def warn_of_version(package: str, read: str, *, doubtful: str, remedy: str) -> None:
    """Warns if a compiler's package is not the version whose programs `plan.hlo` reads."""
    installed = importlib.metadata.version(package)
    if installed != read:
        logging.warning(
            "%s %s is installed, and the analysis of compiled programs was written for %s: %s may "
            "be wrong. %s to see whether the text of programs is still the same",
            package,
            installed,
            read,
            doubtful,
            remedy,
        )


def describe_chips(topology: str, *, slices: int) -> list[jax.Device]:
    """Described devices, one per chip of `slices` slices of `topology`, such as "v5e:16x16".

    Raises:
      ValueError: without libtpu, or for a shape that it does not know.
    """
    check_libtpu()
    # Keep libtpu from looking for a TPU here, and from locking out other processes that use it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options = {"num_slices": slices} if slices > 1 else {}
    layout = CHIPS[topology.partition(":")[0]].layout
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name=layout, **options
        ).devices
    except RuntimeError as error:
        raise ValueError(
            f"--topology={topology} with --slices={slices} is unknown to libtpu: {error}"
        ) from error
    return list(devices)
