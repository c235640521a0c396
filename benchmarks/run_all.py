"""Runs every benchmark in order and writes docs/performance.md; `make bench` calls it.

Each runs in its own process; its last line is the JSON described in `timing.py`. Results are stored
in --results, so that --only repeats some of them and the page shows all. Without the results of the
others, --only is refused: their rows would vanish from the page. A benchmark that fails keeps its
earlier result; if it has none, the page is left as it is.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only vit_step mbart_step
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

from common_jax.signals import ends_quietly

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
NOTES = ROOT / "benchmarks" / "notes.md"
WIDTH = 110
LIMIT = 900  # seconds per benchmark

# In the order of the page: the file's name, and flags that limit its time on two cores.
BENCHMARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("all_pairs", ("--repeats", "5", "--steps", "44")),
    ("vit_step", ()),
    ("moe_layer", ()),
    ("vmoe_block", ()),
    ("vmoe_torch", ("--threads", "1")),
    ("nac_read_in", ()),
    ("nac_step", ("--batch", "2", "--threads", "1")),
    ("kept_memory", ("--threads", "1")),
    ("mbart_step", ()),
    ("decode", ("--sentences", "64")),
    ("mclip_features", ()),
    ("cold_start", ()),
    ("checkpoint", ()),
    ("input_pipeline", ("--images", "1024")),
    ("corpus", ("--repeats", "7")),
    ("translation_feed", ("--threads", "1")),
)


class Sentence(NamedTuple):
    """Part of the reason for a missed target.

    Attributes:
      text: the sentence.
      processor: the lowest and highest ratio in CPU time with which it agrees; with another, or if
        that was not measured, it is left out.
    """

    text: str
    processor: tuple[float, float] | None = None

    def agrees(self, claim: dict[str, Any]) -> bool:
        if self.processor is None:
            return True
        low, high = self.processor
        return claim["processor"] is not None and low <= claim["processor"] <= high


VIT = (
    Sentence(
        "In CPU time, the ratio is above 1. With two threads, XLA keeps the second one busy during "
        "less of the step than torch does.",
        processor=(1.005, math.inf),  # 1.01 or more on the page
    ),
)
# Why a claim misses its target, by benchmark, claim and peer; printed only if it misses.
REASONS: dict[tuple[str, str, str], tuple[Sentence, ...]] = {
    ("vit_step", "training step of a dense ViT", "torch"): VIT,
    ("vit_step", "training step of a dense ViT", "torch.compile"): VIT,
    ("vit_step", "training step of a dense ViT", "transformers"): VIT,
    ("decode", "beam search of mBART", "CTranslate2"): (
        Sentence("Both take the same CPU time.", processor=(0.97, 1.03)),
        Sentence(
            "Our products take 636 GFLOP where 463 would be enough: sources are padded to 64 "
            "tokens, of which the encoder computes 48, while the longest has 34; and a finished "
            "example is computed until half of its batch is finished."
        ),
    ),
    ("mclip_features", "text features of M-CLIP, sentences sorted", "transformers, sorted"): (
        Sentence(
            "We pad to a multiple of 8 tokens, torch to the longest sentence, which saves 2 % of "
            "the computation here."
        ),
    ),
    ("corpus", "ids of sentences, bpe", "encode_batch, bpe"): (
        Sentence(
            "Both call the same library, which takes nine tenths of the time; ours then puts the "
            "ids into an array, checks and frames them."
        ),
    ),
}

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "pillow")

HEADER = """# Performance

This page is written by `make bench`, which runs [run_all.py](../benchmarks/run_all.py).
`run_all.py --only` runs some benchmarks again and replaces their rows; it needs the results of the
others, which a complete run leaves in `build/bench`. The notes at the end come from
[notes.md](../benchmarks/notes.md).

Each row is a claim of one benchmark: the peer's time divided by ours, as the median over the
repeats of one run, with the smallest and the largest in brackets. Above 1, we are faster. The next
column is the same ratio in CPU time; other work on the machine affects it less. Ratios that are
left out were not measured. With several threads, torch's threads wait for each other by spinning:
if other work takes a core from one of them, the others burn CPU time, and the ratios favour us.
Ratios with one thread are valid on a busy machine too. "Load" is the one-minute load average before
the benchmark started. Below, brackets name the benchmarks that were measured with another processor
or version.
"""
COLUMNS = (
    "claim",
    "peer",
    "peer / ours",
    "by CPU time",
    "repeats",
    "threads",
    "load",
    "target",
    "met",
    "benchmark",
)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, _ in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="of benchmark and peers, if BENCHMARKS has none",
    )
    parser.add_argument("--results", default=ROOT / "build" / "bench", type=pathlib.Path)
    return parser.parse_args()


class Failure(Exception):
    """A benchmark failed or took too long."""


def run(name: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """Results of a benchmark.

    Raises:
      Failure: it gave none.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *flags]
    load, start = round(os.getloadavg()[0], 1), time.perf_counter()
    print(f"{name} {' '.join(flags)}", flush=True)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Failure(f"{name} took more than {LIMIT} seconds") from None
    finally:
        if process.returncode is None:  # with what it has started, which would disturb the next
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(textwrap.indent(output, "    "), flush=True)
    if process.returncode:
        raise Failure(f"{name} ended with status {process.returncode}")
    result = json.loads(output.splitlines()[-1])
    took = time.perf_counter() - start
    facts = {"flags": flags, "load_before": load, "took": took, "machine": describe_machine()}
    return result | facts


def processor() -> str:
    """The name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """What a benchmark is measured with; stored with its result, as others may be run elsewhere."""
    hardware = {"processor": processor(), "cores": len(os.sched_getaffinity(0))}
    versions = {package: version(package) for package in VERSIONS}
    return hardware | {"Python": platform.python_version()} | versions


def machine(results: list[dict[str, Any]]) -> str:
    """A paragraph on the machine and the versions: the most frequent, and in brackets the
    benchmarks that were measured with others."""

    def show(key: str) -> str:
        benchmarks: dict[str, list[str]] = {}
        for result in results:
            value = result.get("machine", {}).get(key, "not recorded")
            name = "not installed" if value is None else str(value)
            benchmarks.setdefault(name, []).append(result["benchmark"])
        common = max(benchmarks, key=lambda value: len(benchmarks[value]))
        others = [f"{', '.join(x)}: {value}" for value, x in benchmarks.items() if value != common]
        return f"{common} ({'; '.join(others)})" if others else common

    seconds = sum(result["took"] for result in results)
    versions = ", ".join(f"{key} {show(key)}" for key in ("Python", *VERSIONS))
    return (
        f"Machine: {show('processor')}, {show('cores')} cores, no accelerator. {versions}. "
        f"{seconds / 60:.0f} minutes."
    )


def met(claim: dict[str, Any]) -> str:
    if claim["target"] is None or claim["ratio"] is None:
        return ""
    return "yes" if claim["ratio"] >= claim["target"] else "**no**"


def threads(flags: Sequence[str]) -> str:
    """The value of the last --threads."""
    return [value for name, value in itertools.pairwise(flags) if name == "--threads"][-1]


def rows(result: dict[str, Any]) -> list[str]:
    """Rows of the table for one benchmark."""
    name = result["benchmark"]
    link = f"[{name}](../benchmarks/{name}.py)"
    lines = []
    for claim in result["claims"]:
        ratio = ""  # the page has a claim that was measured in CPU time alone
        if claim["ratio"] is not None:
            ratio = f"{claim['ratio']:.2f} ({claim['low']:.2f} to {claim['high']:.2f})"
        target = "" if claim["target"] is None else str(claim["target"])
        cells = (
            claim["claim"],
            claim["peer"],
            ratio,
            "" if claim["processor"] is None else f"{claim['processor']:.2f}",
            str(claim["repeats"]),
            str(claim.get("threads", threads(result["flags"]))),
            str(result["load_before"]),
            target,
            met(claim),
            link,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def misses(results: list[dict[str, Any]]) -> list[str]:
    """A paragraph for every claim below its target."""
    paragraphs = []
    for result in results:
        for claim in result["claims"]:
            if met(claim) == "**no**":
                key = result["benchmark"], claim["claim"], claim["peer"]
                told = [x.text for x in REASONS.get(key, ()) if x.agrees(claim)]
                reason = " ".join(told) or "The cause has not been investigated yet."
                paragraphs.append(
                    f"**{claim['claim']}**, against {claim['peer']}: "
                    f"{claim['ratio']:.2f}, target {claim['target']}. {reason}"
                )
    return paragraphs


def fill(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_on_hyphens=False)


def page(results: list[dict[str, Any]]) -> str:
    """The text of docs/performance.md."""
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    table += [row for result in results for row in rows(result)]
    paragraphs = misses(results) or ["None."]
    parts = [
        HEADER.rstrip(),
        fill(machine(results)),
        "\n".join(table),
        "## Claims that miss their target",
        "\n\n".join(map(fill, paragraphs)),
        NOTES.read_text().strip(),
    ]
    return "\n\n".join(parts) + "\n"


def result_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.json"


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The stored results by benchmark, in the order of the page."""
    files = [result_file(folder, name) for name, _ in BENCHMARKS]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    # Failures used to be stored, too.
    return {result["benchmark"]: result for result in results if "error" not in result}


def without_result(folder: pathlib.Path) -> list[str]:
    """The benchmarks that have no result in the folder."""
    stored = read_results(folder)
    return [name for name, _ in BENCHMARKS if name not in stored]


def check_results(folder: pathlib.Path, only: Sequence[str]) -> None:
    """Fails if a benchmark that is not run now has no result, since the page shows all of them."""
    lacking = [name for name in without_result(folder) if name not in only]
    if lacking:
        raise SystemExit(
            f"error: --results {folder} has no result of {', '.join(lacking)}, and docs/"
            "performance.md would lose their rows; run without --only, or name the folder of a "
            "complete run"
        )


@ends_quietly
def main() -> None:
    flags = parse_flags()
    check_results(flags.results, flags.only)
    flags.results.mkdir(parents=True, exist_ok=True)
    problems = []
    for name, arguments in BENCHMARKS:
        if name in flags.only:
            try:
                # The last --threads wins.
                result = run(name, ("--threads", str(flags.threads), *arguments))
            except Failure as failure:
                problems.append(str(failure))
                print(f"    {failure}", flush=True)
                continue
            result_file(flags.results, name).write_text(json.dumps(result, indent=2) + "\n")
    lacking = without_result(flags.results)
    if lacking:
        problems.append(f"no result of {', '.join(lacking)}, so the page was not written")
    else:
        PAGE.write_text(page(list(read_results(flags.results).values())))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    if problems:
        raise SystemExit(f"error: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
