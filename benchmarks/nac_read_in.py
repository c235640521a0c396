"""NAC's read-in attention, rearranged, against the plain form with keys and values per receiver.

Both are timed in turns, forward and backward, with gradients of all arguments, which are compared
first, and the temporary memory that XLA plans is printed. The rearranged form is also compiled, but
not run, at the size of `--large` (by default ImageNet's: 32 images, 192 receivers, 784 tokens), for
which the plain form would need two arrays of the printed size.

    python benchmarks/nac_read_in.py
"""

import argparse
import functools
import pathlib
import sys

import jax
import numpy as np
import timing

from m2mkd_jax.nac.read_in import pool_tokens

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import naive

ARGUMENTS = ("query", "tokens", "key_scales", "value_scales", "key_kernel", "value_kernel")
TOLERANCE = 1e-5


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--receivers", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--token-width", type=int, default=320)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument(
        "--large",
        type=int,
        nargs=3,
        default=(32, 192, 784),
        metavar=("B", "T", "S"),
        help="images, receivers and tokens to compile for without running",
    )
    return parser.parse_args()


def shapes(sizes, batch: int, receivers: int, tokens: int) -> dict[str, tuple[int, ...]]:
    width, heads, head_width = sizes.token_width, sizes.heads, sizes.head_width
    scales, kernel = (receivers, width), (width, heads, head_width)
    query, image = (batch, receivers, heads, head_width), (batch, tokens, width)
    return dict(zip(ARGUMENTS, (query, image, scales, scales, kernel, kernel), strict=True))


def compile_with_gradients(function, arguments):
    """A program for the result, and the gradients of <result, dy> with respect to all arguments."""

    def run(arguments, dy):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(dy)

    dy = jax.eval_shape(function, *arguments)
    return jax.jit(run).lower(arguments, dy).compile(), dy


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    rng = np.random.default_rng(0)
    small = shapes(sizes, sizes.batch, sizes.receivers, sizes.tokens)
    arrays = [jax.numpy.asarray(rng.normal(size=s) * 0.1, "float32") for s in small.values()]
    cases, results = {}, {}
    for name, function in (("plain", naive.pool_tokens), ("rearranged", pool_tokens)):
        compiled, dy = compile_with_gradients(function, arrays)
        cases[name] = compiled, (arrays, jax.numpy.ones(dy.shape, dy.dtype))
        results[name] = compiled(*cases[name][1])
    wrong = timing.check_results(results["rearranged"], results["plain"], TOLERANCE)
    calls = {
        name: functools.partial(compiled, *arguments)
        for name, (compiled, arguments) in cases.items()
    }
    times = timing.take_turns(calls, sizes.repeats)

    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32; shapes {small}")
    details = {"largest_relative_difference": wrong}
    for name, (compiled, _) in cases.items():
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        flops = compiled.cost_analysis()["flops"] / 1e9
        print(f"{name:12s}{flops:8.2f} GFLOP, {memory:8.1f} MiB temporary")
        details[name] = {"gflop": flops, "temporary_mib": memory}

    batch, receivers, tokens = sizes.large
    large = shapes(sizes, batch, receivers, tokens)
    abstract = [jax.ShapeDtypeStruct(shape, "float32") for shape in large.values()]
    compiled, _ = compile_with_gradients(pool_tokens, abstract)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    inner = sizes.heads * sizes.head_width
    plain = 4 * batch * receivers * tokens * inner / 1e9
    print(f"rearranged at B={batch} T={receivers} S={tokens}: {memory:.0f} MiB temporary, forward")
    print(f"and backward; the plain form's keys and values alone are 2 arrays of {plain:.1f} GB")
    details["large"] = {"sizes": list(sizes.large), "temporary_mib": memory, "plain_gb": plain}
    claim = timing.compare(times, "rearranged", "plain", claim="read-in of NAC", target=20.0)
    timing.report("nac_read_in", [claim], times=times, **details)


if __name__ == "__main__":
    main()
