"""Published figures of TPU chips, and the described devices of a slice."""

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
    """The figures of one chip, a TPU or a GPU.

    Attributes:
      flops: operations per second in bfloat16; a multiply-add is two.
      hbm: bytes of memory.
      hbm_bandwidth: bytes per second between that memory and the cores.
      links: bytes per second that it can send within its group over all of its links, and receive
        at the same time.
      layout: libtpu's name of the setting in which a chip is one device.
      network: the name of those links.
      unit: its name, for people.
      group: the name of the chips that those links connect: a slice of TPUs, a host of GPUs.
      flops32: operations per second on float32 at JAX's default precision; None: as `flops`.
      launch: seconds from the start of a kernel to the start of the next; 0: not counted.
      wait: seconds per turn of a loop whose length the host reads; 0: not counted.
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


# From https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p-training and v6e: peak compute, capacity
# and bandwidth of HBM, half of the bidirectional bandwidth of ICI. The page of v4 has only the
# bandwidth of all-reduce over a pod of 4,096 chips, 1.1 PB/s; the same division gives the figures
# of v5e (51.2 TB/s over 256) and v6e (102.4 TB/s over 256).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 268e9, layout="megacore"),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9),
}


def check_libtpu() -> None:
    """Warns if libtpu is not of the version that `plan.hlo` was written for; raises ValueError if
    it is not installed."""
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
    """Warns if a compiler's package is not of the version whose programs `plan.hlo` reads."""
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
    # libtpu must not look for a TPU here, and another process may use it at the same time.
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
