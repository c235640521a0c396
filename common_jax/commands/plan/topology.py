"""Machines by their names on the command line, and their described devices."""

import dataclasses
import math
import re
from typing import Any

import jax

from common_jax.commands.plan.chips import CHIPS, Chip, describe_chips
from common_jax.commands.plan.gpus import CARDS, OPTIONS, describe_cards


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of a machine.

    Attributes:
      kind: a name in CHIPS or CARDS.
      shape: of a slice of TPUs; hosts and cards on each, of GPUs.
      groups: slices or hosts, over which a slower network goes.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int

    @property
    def name(self) -> str:
        """As --topology has it, with nothing left out."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """Its chip's figures."""
        return (CARDS | CHIPS)[self.kind]

    @property
    def devices(self) -> int:
        """Chips in total."""
        return math.prod(self.shape) * (1 if self.kind in CARDS else self.groups)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What XLA needs to compile without the machine."""
        return OPTIONS if self.kind in CARDS else None


def read_topology(text: str, *, slices: int = 1) -> Topology:
    """The machine of --topology: "v5e:16x16", a chip and the shape of one of `slices` slices;
    "h100:2x8", a card, hosts and cards per host; "h100", one card.

    Raises:
      ValueError: for a chip or card that is in no table, or a shape that is none of its kind.
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
        f"--topology={text} must be a chip of {sorted(CHIPS)} and the shape of a slice, such as "
        f"v5e:16x16 or v5p:8x8x8; or a card of {sorted(CARDS)} with hosts and cards per host, such "
        "as h100:1x8, where one card may leave out 1x1"
    )


def describe_devices(topology: Topology) -> list[jax.Device]:
    """Described devices, one per chip.

    Raises:
      ValueError: without the compiler for them, or if it does not know them.
    """
    if topology.kind in CARDS:
        hosts, cards = topology.shape
        devices = describe_cards(topology.kind, hosts=hosts, cards=cards)
    else:
        devices = describe_chips(topology.name, slices=topology.groups)
    assert len(devices) == topology.devices, (len(devices), topology)
    return devices
