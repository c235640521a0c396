"""A training step in which glibc keeps freed memory, against one with glibc's defaults.

On a CPU, XLA allocates and frees a step's buffers in every step. By default, glibc returns large
ones to the kernel, which maps and clears their pages again in the next step. With the environment
variable `GLIBC_TUNABLES` that the demos set for their runs (`common_jax/commands/sweep/jobs.py`),
glibc keeps them, in pages of 2 MB where Linux has transparent huge pages. Two processes that differ
only in this variable take turns, step by step. Their losses must be equal.

    python benchmarks/kept_memory.py
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import jax
import numpy as np
import timing

from common_jax.command_line import read_config_file
from common_jax.commands.sweep.jobs import KEPT_MEMORY
from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh
from m2mkd_jax.config import Config
from m2mkd_jax.phases.pipeline import describe

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = {
    "V-MoE": "configs/m2mkd/cifar10_vmoe.py:phase=end_to_end",
    "NAC": "configs/m2mkd/cifar10_nac.py:phase=end_to_end",
}
WARM_UP = 2  # steps


def parse_flags() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step-of", choices=CASES, help=argparse.SUPPRESS)  # for child processes
    return parser.parse_args()


def serve(case: str, batch: int) -> None:
    """Takes one step per line of standard input; prints its loss and seconds."""
    config = freeze(Config, read_config_file(str(ROOT / CASES[case])))
    optim = dataclasses.replace(config.optim, batch=batch)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    task = describe(dataclasses.replace(config, optim=optim), mesh).task(steps_per_epoch=100)
    step = timing.Training(task, optim, timing.random_batch(task))
    for _ in sys.stdin:
        start = timing.clocks()
        loss = float(step())
        print(loss, *(timing.clocks() - start), flush=True)


class Peer:
    """A process that takes a step of a case when asked."""

    def __init__(self, case: str, flags: argparse.Namespace, environment: Mapping[str, str]):
        command = [sys.executable, __file__, "--step-of", case]
        command += [f"--threads={flags.threads}", f"--batch={flags.batch}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )
        self.losses: list[float] = []

    def __call__(self) -> np.ndarray:
        """Wall-clock and CPU seconds of a step."""
        with contextlib.suppress(BrokenPipeError):  # if it has exited, there is no answer below
            print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise SystemExit(f"a process ended with status {self.process.wait()}")
        loss, *seconds = map(float, answer)
        self.losses.append(loss)
        return np.asarray(seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(case: str, flags: argparse.Namespace) -> tuple[timing.Claim, timing.Times]:
    usual = {key: value for key, value in os.environ.items() if key not in KEPT_MEMORY}
    peers = {
        f"{case}, memory kept": Peer(case, flags, usual | KEPT_MEMORY),
        f"{case}, glibc's defaults": Peer(case, flags, usual),
    }
    turns = max(timing.LEAST, flags.repeats) + WARM_UP
    seconds = [[peer() for peer in peers.values()] for _ in range(turns)]
    for peer in peers.values():
        peer.close()
    ours, theirs = (peer.losses for peer in peers.values())
    assert ours == theirs, f"losses differ: {ours} and {theirs}"
    times = dict(zip(peers, np.asarray(seconds[WARM_UP:]).swapaxes(0, 1), strict=True))
    claim = timing.compare(times, *peers, claim=f"a step of the {case} on a CPU", target=None)
    return claim, times


def main() -> None:
    flags = parse_flags()
    timing.start(flags.threads)
    if flags.step_of:
        serve(flags.step_of, flags.batch)
        return
    claims, times = [], {}
    for case in CASES:
        claim, own = compare(case, flags)
        claims.append(claim)
        times |= own
    timing.report("kept_memory", claims, times=times)


if __name__ == "__main__":
    main()
