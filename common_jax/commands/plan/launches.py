"""How many kernels the host launches for a compiled program, and how often it waits for one."""

import dataclasses

from common_jax.commands.plan.hlo import Program
from common_jax.commands.plan.traffic import FREE, stages


@dataclasses.dataclass(frozen=True)
class Launches:
    """Launches and waits in one run of a program.

    Attributes:
      kernels: launched kernels and copies, and library calls, each of which launches at least one.
      waits: loop iterations and branches that the host decides from a number that it reads from the
        card, which makes it wait until everything before is done.
    """

    kernels: int
    waits: int


def count_launches(program: Program) -> Launches:
    """Counts the launches of a program, with loops counted as in `Program.runs`."""
    kernels = waits = 0
    known = {
        instruction.called["condition"][0]
        for name in stages(program)
        for instruction in program.computations[name].values()
        if instruction.kind == "while" and program.trips(instruction) is not None
    }
    for name in stages(program):
        if name in known:  # the host counts iterations itself, without computing the condition
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
