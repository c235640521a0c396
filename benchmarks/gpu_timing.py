"""Shared parts of the cases of `gpu.py`: timing, comparison, and the lines that a case prints.

A result is printed as soon as it is known:

    case         its name
    ms           median milliseconds per call; low, high: minimum and maximum
    tflops, mfu  useful TFLOP/s, and their share of the card's published peak
    compile_s    seconds to compile
    errors       of values and gradients, each relative to the norm of its reference
    temp_gb      memory of temporaries; peak_gb: of the whole process
    error        why there is no measurement
"""

import argparse
import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from gpu import MARK
from jax import numpy as jnp

from common_jax.commands.plan.gpus import CARDS

MOST_SECONDS = 2.0  # limit on calls dispatched before blocking


def run_case(cases: Mapping[str, Callable[[bool], None]]) -> None:
    """Runs the command line of a file of cases: the name of a case, and --tiny."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=cases)
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    cases[flags.case](flags.tiny)


def say(case: str, **values: Any) -> None:
    """Reports a result of a case."""
    print(MARK + json.dumps({"case": case} | values), flush=True)


@contextlib.contextmanager
def named(case: str) -> Iterator[None]:
    """Reports an exception as the `error` of a case, so that the others still run."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        say(case, error=f"{type(error).__name__}: {first}"[:300])


def chained(
    function: Callable[[], Any],
    *,
    count: int = 10,
    repeats: int = 3,
    sync: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, float]:
    """Milliseconds per call when up to `count` calls are dispatched before blocking: device time,
    without gaps in which the device waits for the host.

    Args:
      function: makes one call.
      count: maximum number of calls to dispatch.
      repeats: number of measurements.
      sync: blocks until a result is ready.
    """
    sync(function())
    start = time.perf_counter()
    sync(function())
    count = max(1, min(count, int(MOST_SECONDS / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            result = function()
        sync(result)
        times.append(1e3 * (time.perf_counter() - start) / count)
    return {"ms": statistics.median(times), "low": min(times), "high": max(times)}


def peak(kind: str) -> float | None:
    """A card's published peak FLOP/s in bfloat16; None for an unknown card."""
    return next((card.flops for name, card in CARDS.items() if name.upper() in kind), None)


def rate(times: Mapping[str, float], flops: float, kind: str = "") -> dict[str, float | None]:
    """Useful TFLOP/s, and MFU; the card's `kind` is that of JAX's device by default."""
    per_second = 1e3 * flops / times["ms"]
    most = peak(kind or jax.devices()[0].device_kind)
    return {"tflops": per_second / 1e12, "mfu": most and per_second / most}


@jax.jit
def distances(got: Any, right: Any) -> list[jax.Array]:
    """norm(got - right) / norm(right), leaf by leaf; NaN if `got` has one."""
    leaves = (map(jnp.float32, jax.tree.leaves(tree)) for tree in (got, right))
    pairs = zip(*leaves, strict=True)
    return [jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)) for a, b in pairs]


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """(dy, *arguments) -> y, and the gradients of sum(y * dy) with respect to all arguments."""

    def run(dy: jax.Array, *arguments: Any) -> tuple:
        y, back = jax.vjp(function, *arguments)
        return y, *back(dy.astype(y.dtype))

    return run


def precisely(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), all arrays of floats, in float32 with full-precision products."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*jax.tree.map(jnp.float32, arguments))


def measure(
    case: str,
    function: Callable[..., Any],
    *arguments: Any,
    flops: float,
    right: Any = None,
    note: str = "",
) -> Any:
    """Compiles, runs and times function(*arguments), and compares the result with `right`.

    Returns:
      The result; None after a failure, which is reported.
    """
    result = None
    with named(case):
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        compile_seconds = time.perf_counter() - start
        result = program(*arguments)
        errors = None if right is None else [float(x) for x in distances(result, right)]
        times = chained(lambda: program(*arguments))
        say(
            case,
            **times,
            **rate(times, flops),
            compile_s=compile_seconds,
            errors=errors,
            temp_gb=program.memory_analysis().temp_size_in_bytes / 1e9,
            note=note,
        )
    return result
