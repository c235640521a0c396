"""Shared parts of the benchmarks: timing in turns, reports, and the training step of a run.

A benchmark prints a readable report and, as its last line, JSON:

    {"benchmark": NAME, "claims": [CLAIM, ...], "seconds": {CASE: MEDIAN}, details}

where CLAIM has

- `claim` and `peer`, in words;
- `ratio` of the peer's wall-clock time to ours, the median over turns (above 1, ours is faster);
- `low` and `high`, the minimum and maximum of that ratio;
- `processor`, the median ratio in CPU time, which depends less on other work on the machine, or
  null;
- `repeats`, the number of turns;
- `target`, the expected ratio, or null;
- `threads`, only if they are not those of --threads.
"""

import argparse
import ctypes
import json
import os
import resource
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from common_jax.mesh import MeshConfig, Rules, make_mesh, start_backend
from common_jax.optim import OptimConfig
from common_jax.step import Loss
from common_jax.task import Task, abstract_state, create_program, step_program

Times = dict[str, np.ndarray]  # case -> [turns, 2]: wall-clock seconds and CPU seconds
Claim = dict[str, Any]

LEAST = 5  # minimum number of turns
# Parameters of glibc's mallopt, by number in malloc.h -> (value that keeps memory, default):
# M_MMAP_MAX (large buffers come from the heap), M_TRIM_THRESHOLD (the heap never shrinks),
# M_ARENA_MAX (all threads share one heap).
MEMORY = {-4: (0, 65536), -1: (-1, 128 * 1024), -8: (1, 0)}


def parser(doc: str, *, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with --repeats and --threads."""
    flags = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--repeats", type=int, default=repeats, help=f"turns, at least {LEAST}")
    flags.add_argument("--threads", type=int, default=2, help="threads for all timed code")
    return flags


def start(threads: int, *, keep_memory: bool = False) -> None:
    """Prepares the process for timing. Call it before XLA starts its threads, one per core.

    Args:
      threads: number of cores that the process may use.
      keep_memory: whether glibc keeps freed memory on a CPU, for all cases. XLA allocates and frees
        all buffers in every step, and getting a gigabyte of pages each time takes a fifth of the
        step. Only runs of the demos and of tools/compare_m2mkd.py do this (`jobs.KEPT_MEMORY`),
        since other processes may need the memory.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if keep_memory:
        _keep_memory()


def _keep_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, (keep, _) in MEMORY.items():
        mallopt(parameter, keep)
    # A thread keeps its first heap, and the first query of devices starts all of XLA's threads. So
    # the parameters are set before that query, and reset if there is an accelerator.
    if start_backend() != "cpu":
        for parameter, (_, usual) in MEMORY.items():
            mallopt(parameter, usual)


def import_torch(threads: int) -> tuple[Any, Any]:
    """Imports torch, limited to `threads`, and transformers.

    Raises:
      SystemExit: if they are not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error}: pip install torch 'transformers>=5.23'") from error
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    return torch, transformers


def seconds_of(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Wall-clock and CPU seconds until the result is ready."""
    start = clocks()
    jax.block_until_ready(function(*arguments))
    return clocks() - start


def clocks() -> np.ndarray:
    """Wall-clock time and CPU time in seconds; the latter includes children that this process has
    waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = time.process_time() + ended.ru_utime + ended.ru_stime
    return np.asarray([time.perf_counter(), processors])


def take_turns(cases: Mapping[str, Callable[[], Any]], repeats: int) -> Times:
    """Times all cases in turns after a warm-up, so that a busy machine slows all of them alike."""
    for case in cases.values():
        jax.block_until_ready(case())
    times = {name: [] for name in cases}
    for _ in range(max(LEAST, repeats)):
        for name, case in cases.items():
            times[name].append(seconds_of(case))
    return {name: np.stack(turns) for name, turns in times.items()}


def compare(times: Times, ours: str, peer: str, *, claim: str, target: float | None) -> Claim:
    """A claim about the ratio of the peer's time to ours, turn by turn."""
    ratios, processor = (times[peer] / times[ours]).T
    return {
        "claim": claim,
        "peer": peer,
        "ratio": float(np.median(ratios)),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
        "processor": float(np.median(processor)),
        "repeats": len(ratios),
        "target": target,
    }


def describe(seconds: np.ndarray) -> str:
    """Median and range of the wall-clock time in milliseconds."""
    clock = 1e3 * seconds[:, 0]
    return f"{np.median(clock):9.1f} ms  ({clock.min():.1f} to {clock.max():.1f})"


def report(
    benchmark: str, claims: list[Claim], *, times: Times | None = None, **details: Any
) -> None:
    """Prints times and claims, and the line of JSON, which also has `details`."""
    times = times or {}
    width = max(map(len, times), default=0) + 2
    for name, seconds in times.items():
        print(f"{name:{width}s}{describe(seconds)}")
    for claim in claims:
        target = "" if claim["target"] is None else f", target {claim['target']}"
        processor = "" if claim["processor"] is None else f"{claim['processor']:.2f}"
        print(
            f"{claim['claim']}: {claim['peer']} / ours {claim['ratio']:.2f} "
            f"({claim['low']:.2f} to {claim['high']:.2f}, {claim['repeats']} turns{target})"
            f"{processor and f'; in CPU time {processor}'}"
        )
    seconds = {name: float(np.median(turns[:, 0])) for name, turns in times.items()}
    print(json.dumps({"benchmark": benchmark, "claims": claims, "seconds": seconds} | details))


def make_task(
    loss: Loss,
    init: Callable[[jax.Array], Mapping[str, Any]],
    rules: Rules,
    batch: Mapping[str, np.ndarray],
    *,
    streams: tuple[str, ...] = (),
) -> Task:
    """A task that trains all parameters from `init` on batches like `batch`."""
    return Task(
        phase="benchmark",
        init=init,
        rules=rules,
        trainable=".*",
        loss=loss,
        streams=streams,
        batch={key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in batch.items()},
        steps_per_epoch=100,
    )


def random_batch(task: Task) -> dict[str, np.ndarray]:
    """Random inputs and labels of a step: integers below 10."""
    rng = np.random.default_rng(0)
    return {
        part: rng.integers(10, size=shape.shape).astype(shape.dtype)
        for part, shape in task.batch.items()
    }


class Training:
    """A run's training step on one device, compiled as the loop does it.

    Args:
      task: the task to train.
      optim: the optimizer's settings.
      batch: the step's batch, as numpy arrays.
      helpers: the parameters that `task.helpers` describes.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        batch: Mapping[str, np.ndarray],
        helpers: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.batch, self.seed = jax.device_put(dict(batch)), np.uint32(0)
        self.helpers = dict(helpers)
        with jax.set_mesh(self.mesh):
            abstract = abstract_state(task, optim, self.mesh)
            self.state = create_program(task, optim, abstract)(np.uint32(0), {})
            step = step_program(task, optim, abstract, log_every=1)
            start = time.perf_counter()
            self.compiled = step.lower(self.state, self.helpers, self.batch, self.seed).compile()
            self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> jax.Array:
        """Takes one step; returns the loss before it."""
        self.state, metrics = self.compiled(self.state, self.helpers, self.batch, self.seed)
        return metrics["loss"]


def torch_step(
    torch: Any, optim: OptimConfig, loss: Callable, parameters: list, *batch: Any
) -> Callable[[], float]:
    """A torch training step on loss(*batch), with fused AdamW that decays all parameters."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=optim.lr,
        betas=(optim.b1, optim.b2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(*batch)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def check_losses(cases: Mapping[str, Callable[[], Any]], tolerance: float) -> float:
    """Runs three steps of each case; returns the largest difference between the losses of the first
    case and the others, and fails if it is above `tolerance`."""
    losses = {name: np.asarray([float(case()) for _ in range(3)]) for name, case in cases.items()}
    width = max(map(len, losses)) + 2
    for name, values in losses.items():
        print(f"{name:{width}s}losses " + ", ".join(f"{value:.6f}" for value in values))
    first, *others = losses.values()
    wrong = float(np.max([abs(first - values) for values in others]))  # NaN if a loss is
    assert wrong < tolerance, f"losses differ by {wrong}"
    return wrong


def check_results(ours: Any, theirs: Any, tolerance: float) -> float:
    """Compares two trees of arrays; returns the largest difference, each relative to the largest
    value of its array in `theirs`, and fails unless it is below `tolerance`."""

    def difference(found: Any, wanted: Any) -> float:
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        assert found.shape == wanted.shape, f"shapes differ: {found.shape} and {wanted.shape}"
        gap = abs(found - wanted).max()
        return float(gap and gap / abs(wanted).max())  # both may be zero

    wrong = jax.tree.map(difference, ours, theirs)
    worst = float(np.max(jax.tree.leaves(wrong)))  # NaN if a result has one
    print(f"largest relative difference of results: {worst:.1e}")
    assert worst < tolerance, f"results differ by {wrong}"
    return worst
