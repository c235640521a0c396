"""The kernels that a host starts for a compiled program, and how often it waits for one."""

import dataclasses

from common_jax.commands.plan.hlo import Program
from common_jax.commands.plan.traffic import FREE, stages


@dataclasses.dataclass(frozen=True)
class Launches:
    """Of a run of a program.

    Attributes:
      kernels: kernels and copies that are started, and calls of libraries, each of which starts at
        least one.
      waits: turns of loops and choices of branches that the host makes from a number that it reads
        from the card, for which it waits until everything before is done.
    """

    kernels: int
    waits: int


def count_launches(program: Program) -> Launches:
    """The launches of a program, with loops as in `Program.runs`."""
    kernels = waits = 0
    known = {
        instruction.called["condition"][0]
        for name in stages(program)
        for instruction in program.computations[name].values()
        if instruction.kind == "while" and program.trips(instruction) is not None
    }
    for name in stages(program):
        if name in known:  # the host counts the turns itself, and computes no condition
            continue
        for one in program.computations[name].values():
            times = program.runs[name]
            if one.kind == "while" and program.trips(one) is None:
                waits += times * program.turns(one)
            elif one.kind == "conditional":
                waits += times
            elif one.kind not in FREE and not one.kind.endswith(("-done", "-update")):
                kernels += times
    return Launches(kernels, waits)
