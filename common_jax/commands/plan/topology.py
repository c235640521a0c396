"""Parses --topology, and describes the devices of such a machine."""

import dataclasses
import math
import re
from typing import Any

import jax

from common_jax.commands.plan.chips import CHIPS, Chip, describe_chips
from common_jax.commands.plan.gpus import CARDS, OPTIONS, describe_cards


@dataclasses.dataclass(frozen=True)
class Topology:
    """The chips of a machine.

    Attributes:
      kind: a name in CHIPS or CARDS.
      shape: the shape of a TPU slice; for GPUs, hosts and cards per host.
      groups: number of slices or hosts, which a slower network connects.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int

    @property
    def name(self) -> str:
        """The value of --topology, with nothing left out."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """The chip's specs."""
        return (CARDS | CHIPS)[self.kind]

    @property
    def devices(self) -> int:
        """Chips in total."""
        return math.prod(self.shape) * (1 if self.kind in CARDS else self.groups)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options with which XLA can compile without the machine."""
        return OPTIONS if self.kind in CARDS else None


def read_topology(text: str, *, slices: int = 1) -> Topology:
    """Parses --topology: "v5e:16x16", a chip and the shape of one of `slices` slices; "h100:2x8", a
    card, hosts and cards per host; "h100", one card.

    Raises:
      ValueError: for an unknown chip or card, or a shape that does not suit its kind.
    """
    kind, _, sizes = text.partition(":")
    if kind in CARDS and re.fullmatch(r"[a-z0-9]+(:[1-9]\d*x[1-9]\d*)?", text):
        if slices > 1:
            raise ValueError(
                f"--slices={slices} is for TPUs; the number of hosts is in --topology={kind}:"
                "HOSTSxCARDS"
            )
        hosts, cards = map(int, (sizes or "1x1").split("x"))
        return Topology(kind, (hosts, cards), hosts)
    if kind in CHIPS and re.fullmatch(r"\w+:\d+(x\d+)+", text):
        if slices < 1:
            raise ValueError(f"--slices={slices} must be at least 1")
        return Topology(kind, tuple(map(int, sizes.split("x"))), slices)
    raise ValueError(
        f"--topology={text} must be one of {sorted(CHIPS)} and the shape of a slice, such as "
        f"v5e:16x16 or v5p:8x8x8; or one of {sorted(CARDS)} with hosts and cards per host, such as "
        "h100:1x8, where 1x1 may be left out"
    )


def describe_devices(topology: Topology) -> list[jax.Device]:
    """Described devices, one per chip.

    Raises:
      ValueError: if the compiler for them is not installed, or does not know them.
    """
    if topology.kind in CARDS:
        hosts, cards = topology.shape
        devices = describe_cards(topology.kind, hosts=hosts, cards=cards)
    else:
        devices = describe_chips(topology.name, slices=topology.groups)
    assert len(devices) == topology.devices, (len(devices), topology)
    return devices
