"""How long saving a checkpoint blocks a run: an asynchronous save against a synchronous one.

Ours is `Checkpoints.save` as the training loop calls it, which returns once the arrays are copied.
The peer is the same save followed by `wait`, which returns once it is on disk. No earlier save is
pending. The state holds random parameters and AdamW's moments, about --large or --small MB in all.
Restoring is timed too, and so is writing as many bytes to one file with fsync. A saved state is
first compared with the restored one.

    python benchmarks/checkpoint.py --folder /where/runs/are/kept
"""

import argparse
import os
import pathlib
import tempfile

import jax
import numpy as np
import timing

from common_jax.checkpoint import Checkpoints
from common_jax.mesh import MeshConfig, make_mesh, replicated, with_shardings
from common_jax.optim import OptimConfig
from common_jax.state import TrainState
from common_jax.step import init_state

LAYERS = 12
CONFIG = {"optim": {"lr": 1e-3}}


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--large", type=int, default=200, help="size of the large state in MB")
    parser.add_argument("--small", type=int, default=5, help="size of the small state in MB")
    parser.add_argument("--folder", help="a folder on the disk to write to")
    return parser.parse_args()


def make_state(megabytes: int) -> TrainState:
    """Parameters in a dozen layers, with AdamW's two moments."""
    side = round((megabytes * 1e6 / 4 / 3 / LAYERS) ** 0.5)
    rng = np.random.default_rng(0)
    params = {
        f"block_{i}": {"kernel": rng.normal(size=(side, side)).astype("float32")}
        for i in range(LAYERS)
    }
    return init_state(jax.device_put(params), OptimConfig(), trainable=".*", metrics={})


def measure(state: TrainState, name: str, folder: pathlib.Path, repeats: int) -> timing.Times:
    """Times an asynchronous save, a synchronous one, restoring, and writing as many bytes to a
    plain file."""
    whole = replicated(make_mesh(MeshConfig(), jax.devices()[:1]))
    abstract = with_shardings(state, jax.tree.map(lambda _: whole, state))
    checkpoints = Checkpoints(folder / name, keep=1, best=None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    data, steps = os.urandom(size), iter(range(10_000))

    def save() -> None:
        checkpoints.save(state, step=next(steps), config=CONFIG, metrics=None)

    def save_and_wait() -> None:
        save()
        checkpoints.wait()

    def write() -> None:
        with open(folder / "plain", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    save_and_wait()
    restored = checkpoints.restore_latest(abstract)
    for found, wanted in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        assert np.array_equal(found, wanted), "a state was not restored as it was saved"

    times = {f"{kind}, {name}": [] for kind in ("save", "save and wait", "restore", "plain file")}
    cases = (save, save_and_wait, lambda: checkpoints.restore_latest(abstract), write)
    for turn in range(max(timing.LEAST, repeats) + 1):
        for kind, case in zip(times, cases, strict=True):
            seconds = timing.seconds_of(case)
            checkpoints.wait()
            if turn:  # the first turn is a warm-up
                times[kind].append(seconds)
    checkpoints.close()
    return {kind: np.stack(turns) for kind, turns in times.items()}


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads)
    times, claims, megabytes = {}, [], {}
    with tempfile.TemporaryDirectory(dir=sizes.folder) as folder:
        for name, target in (("large", sizes.large), ("small", sizes.small)):
            state = make_state(target)
            megabytes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
            own_times = measure(state, name, pathlib.Path(folder), sizes.repeats)
            claim = timing.compare(
                own_times,
                f"save, {name}",
                f"save and wait, {name}",
                claim=f"stall of a save, {megabytes[name]:.0f} MB",
                target=None,
            )
            times, claims = times | own_times, [*claims, claim]
    timing.report("checkpoint", claims, times=times, megabytes=megabytes)


if __name__ == "__main__":
    main()
