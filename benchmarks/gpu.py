"""Measures one NVIDIA GPU: ceilings, layers and training steps, with peers in torch.

Each case runs in its own process with a time limit, in the order of `CASES`, until the budget is
spent. FOLDER/results.json is rewritten after every case, and FOLDER/CASE.log has the output of a
case. A peer that is not installed is named and skipped. So is a case that fails or gets no time.

    python benchmarks/gpu.py --out FOLDER
    python benchmarks/gpu.py --out FOLDER --budget 900 --only ceiling moe_layer nac

With --tiny, all cases run on a CPU at small sizes: GPU kernels are interpreted, XLA replaces cuDNN,
and the times mean nothing.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent
LEAST = 20  # seconds that must be left to start another case
MARK = "RESULT "  # prefix of the lines in a case's output that hold a result as JSON


class Case(NamedTuple):
    """The file that has the case, and its time limit in seconds."""

    file: str
    seconds: int


# Most informative first, in case the budget runs out.
CASES = {
    "ceiling": Case("gpu_layers", 45),
    "moe_layer": Case("gpu_layers", 90),
    "attention": Case("gpu_layers", 90),
    "vmoe_triton": Case("gpu_steps", 90),
    "vitl": Case("gpu_steps", 100),
    "label_loss": Case("gpu_layers", 60),
    "mbart": Case("gpu_steps", 90),
    "nac": Case("gpu_steps", 200),
    "nac_cudnn": Case("gpu_steps", 200),
    "decode": Case("gpu_steps", 100),
    "moe_kernels": Case("gpu_layers", 90),
    "vmoe_capacity": Case("gpu_steps", 90),
    "moe_torch": Case("gpu_peers", 40),
    "vitl_torch": Case("gpu_peers", 60),
    "mbart_torch": Case("gpu_peers", 50),
    "decode_torch": Case("gpu_peers", 60),
    "vmoe_dropless": Case("gpu_steps", 90),
}

PROBE = """
import json, jax
device = jax.devices()[0]
print(json.dumps({"card": device.device_kind, "jax": jax.__version__}))
"""

Result = dict[str, Any]


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = ROOT / "build" / "gpu"
    parser.add_argument("--out", type=pathlib.Path, default=folder, help="folder for the results")
    parser.add_argument("--budget", type=float, default=440, help="total seconds for all cases")
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
        help=", ".join(CASES),
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU")
    return parser.parse_args()


def environment(*, tiny: bool) -> dict[str, str]:
    """Environment variables of a case's process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # No preallocation, so that `peak_gb` is what a step needs.
    changes = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    changes["PYTHONPATH"] = os.pathsep.join(paths)
    if tiny:
        changes |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | changes


def probe(variables: dict[str, str], *, tiny: bool) -> Result:
    """The card and the JAX version, from a separate process, which frees the card when it exits.

    Raises:
      SystemExit: there is no NVIDIA GPU, unless `tiny`.
    """
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: JAX does not start: {last_line(done.stderr)}")
    machine = json.loads(done.stdout.splitlines()[-1])
    if not tiny and "NVIDIA" not in machine["card"]:
        raise SystemExit(
            f"error: JAX finds no NVIDIA GPU; its device is {machine['card']!r}. Install "
            "jax[cuda12] or jax[cuda13] on a machine with a GPU, or add --tiny to try all cases "
            "at small sizes on a CPU"
        )
    return {"case": "machine", "tiny": tiny} | machine


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def run(
    name: str, log: pathlib.Path, variables: dict[str, str], *, tiny: bool, limit: float
) -> list[Result]:
    """The results of a case; if it failed, the last one is the error."""
    command = [sys.executable, str(FOLDER / f"{CASES[name].file}.py"), name]
    problem = ""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [*command, "--tiny"] if tiny else command,
                env=variables, stdout=file, stderr=subprocess.STDOUT, timeout=limit,
            )  # fmt: skip
            if done.returncode:
                problem = f"ended with status {done.returncode}: "
        except subprocess.TimeoutExpired:
            problem = f"took more than {limit:.0f} seconds, last output: "
    # Read from the file, so that nothing is lost if the process was killed.
    text = log.read_text(errors="replace")
    results = [json.loads(x.removeprefix(MARK)) for x in text.splitlines() if x.startswith(MARK)]
    if problem:
        results.append({"case": name, "error": problem + last_line(text)[:300], "failed": True})
    return [result | {"of": name} for result in results]


def line(result: Result) -> str:
    """A result as a line to print."""
    left_out = ("case", "of", "failed")
    values = {key: x for key, x in result.items() if key not in left_out and x not in ("", None)}
    parts = [f"{key} {describe(value)}" for key, value in values.items()]
    return f"{result['case']:38s}" + ", ".join(parts)


def describe(value: Any) -> str:
    """A value as text; floats, also in lists, have four significant digits."""
    if isinstance(value, list):
        return f"[{' '.join(map(describe, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    flags = parse_flags()
    deadline = time.monotonic() + flags.budget
    variables = environment(tiny=flags.tiny)
    results = [probe(variables, tiny=flags.tiny)]
    flags.out.mkdir(parents=True, exist_ok=True)
    print(line(results[0]), flush=True)
    for name in (name for name in CASES if name in flags.only):
        start = time.monotonic()
        left = deadline - start
        if left < LEAST:
            more = [{"case": name, "error": f"no time left of --budget {flags.budget:.0f}"}]
        else:
            # The limits are for a GPU, so they do not apply on a CPU.
            limit = left if flags.tiny else min(CASES[name].seconds, left)
            log = flags.out / f"{name}.log"
            more = run(name, log, variables, tiny=flags.tiny, limit=limit)
        print(f"\n{name}, {time.monotonic() - start:.0f} s", *map(line, more), sep="\n", flush=True)
        results += more
        (flags.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    missing = [result["case"] for result in results if "error" in result]
    print(f"\nwrote {flags.out / 'results.json'}; not measured: {', '.join(missing) or 'nothing'}")
    if any("failed" in result for result in results):
        raise SystemExit("a case failed")


if __name__ == "__main__":
    main()
