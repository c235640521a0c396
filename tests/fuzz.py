"""Corrupted and forged files, in every format that may come from an untrusted source: each must be
read correctly or refused clearly.

    make fuzz
    PYTHONPATH=. python tests/fuzz.py --format='PyTorch archive' --count=200 --seed=1
    PYTHONPATH=. python tests/fuzz.py --format=image --only=17 --keep=FOLDER

A mutant is a function of format, seed and number. Each of these is wrong: an undocumented
exception; a message without the file's name or longer than 2,000 characters; more than 256 MB or
5 s of CPU time; a process that dies; and data that differ both from the sample's and from an
independent reading of the same bytes.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import queue
import random
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator

import mutations
from fuzz_format import Format, limited
from fuzz_formats import FORMATS
from fuzz_weights import SHARDS

MEMORY = 256 << 20  # bytes that a worker may use beyond what it has when it is ready
SECONDS = 5
PATIENCE = 60  # seconds without output, after which a worker counts as hanging
START = 600  # seconds until a worker's first output, while it imports and compiles
LONGEST = 2000  # maximum characters of a message
OUTCOMES = ("refused", "right", "wrong")
REFUSALS = (ValueError, OSError)
CHUNK = 250  # mutants per process


@dataclasses.dataclass(frozen=True)
class Result:
    """What happened to a mutant: one of OUTCOMES, and the details."""

    number: int
    outcome: str
    detail: str = ""


def make_mutant(form: Format, seed: int, number: int) -> tuple[int, bytes, bool]:
    """The index of the sample that was taken, the mutant, and whether it is forged with valid
    checksums."""
    rng = random.Random(f"{form.name} {seed} {number}")
    sample = rng.randrange(len(form.samples))
    data, forged = form.samples[sample], False
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        structured = rng.random() < 0.5
        data = rng.choice(form.edits if structured else mutations.BYTES)(rng, data)
        forged |= structured
    return sample, data, forged


def try_mutant(form: Format, folder: pathlib.Path, seed: int, number: int) -> Result:
    """Reads one mutant and judges the outcome."""
    sample, data, forged = make_mutant(form, seed, number)
    path = folder / form.file
    path.write_bytes(data)
    start = time.process_time()
    try:
        value = form.read(path)
    except REFUSALS as error:
        message, value = str(error), None
        wrong = _wrong_message(message, path.name)
        result = Result(number, "wrong" if wrong else "refused", wrong or message[:200])
    except BaseException:
        lines = traceback.format_exc(limit=-2).strip().splitlines()
        return Result(number, "wrong", " | ".join(line.strip()[:200] for line in lines[-5:]))
    else:
        result = None
    if (seconds := time.process_time() - start) > SECONDS:
        return Result(number, "wrong", f"{seconds:.1f} s")
    if result is None:
        wrong = _wrong_value(form, path, form.samples[sample], data, value, forged=forged)
        result = Result(number, "wrong" if wrong else "right", wrong)
    return result


def _wrong_message(message: str, name: str) -> str:
    """What is wrong with a message, or ""."""
    if name not in message and not any(n in message for n in SHARDS):
        return f"without the file's name: {message[:300]}"
    if len(message) > LONGEST:
        return f"{len(message)} characters: {message[:200]}"
    if not message.replace("\n", "").isprintable():
        return f"not printable: {message[:300]!r}"
    return ""


def _wrong_value(form: Format, path, sample: bytes, data: bytes, value, *, forged: bool) -> str:
    """How the value that was read differs from the right one, or ""."""
    if form.agree(value, form.plain(path, sample)):
        return ""
    if form.checked and not forged:
        return f"differs from the sample in spite of checksums: {str(value)[:200]}"
    try:
        with limited(SECONDS):
            plain = form.plain(path, data)
    except Exception as error:
        return f"read as {str(value)[:200]}, and by the independent reading {error!r:.200}"
    if not form.agree(value, plain):
        return f"read as {str(value)[:200]}, and by the independent reading {str(plain)[:200]}"
    return ""


def work(name: str, seed: int, numbers: range) -> None:
    """Runs a worker, which prints one line of JSON per mutant."""
    form = FORMATS[name]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        form.prepare(folder)
        for sample in form.samples:  # so that everything is imported and compiled
            (folder / form.file).write_bytes(sample)
            form.read(folder / form.file)
        limit_memory()
        for number in numbers:
            print(
                json.dumps(dataclasses.asdict(try_mutant(form, folder, seed, number))), flush=True
            )


def limit_memory() -> None:
    """Limits this process to MEMORY more than it has now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_worker(name: str, seed: int, numbers: range) -> Iterator[Result]:
    """The results of a range of mutants; replaces workers that die or hang."""
    while numbers:
        command = [sys.executable, __file__, f"--format={name}", f"--seed={seed}"]
        command += [f"--worker={numbers.start}:{numbers.stop}"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # other arenas only reserve memory
        )
        patience = START
        while numbers:
            ready, _, _ = select.select([process.stdout], [], [], patience)
            patience = PATIENCE
            line = process.stdout.readline() if ready else ""
            if not line:
                process.kill()
                why = "it hangs"
                if ready:
                    said = process.stderr.read()[-300:]
                    why = f"the process died with {process.wait()}: {said}"
                yield Result(numbers.start, "wrong", why)
                numbers = numbers[1:]
                break
            yield Result(**json.loads(line))
            numbers = numbers[1:]
        process.kill()
        process.wait()
        process.stdout.close()


def run(names: list[str], *, count: int, seed: int, jobs: int) -> dict[str, list[Result]]:
    """The results of all formats, by name."""
    chunks: queue.Queue = queue.Queue()
    for start in range(0, count, CHUNK):
        for name in names:
            chunks.put((name, range(start, min(start + CHUNK, count))))
    results: dict[str, list[Result]] = {name: [] for name in names}

    def take() -> None:
        while True:
            try:
                name, numbers = chunks.get_nowait()
            except queue.Empty:
                return
            results[name] += list(run_worker(name, seed, numbers))

    threads = [threading.Thread(target=take) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def table(results: dict[str, list[Result]]) -> str:
    """A table with one row per format."""
    lines = ["format          | tried | refused clearly | read rightly | wrong"]
    for name, found in results.items():
        counts = collections.Counter(result.outcome for result in found)
        lines.append(
            f"{name:15} | {len(found):5} | {counts['refused']:15} | {counts['right']:12} | "
            f"{counts['wrong']:5}"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=[*FORMATS], action="append", help="default: all")
    parser.add_argument("--count", type=int, default=3000, help="mutants per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--only", type=int, help="try only this mutant, in this process")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the file of --only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    names = flags.format or [*FORMATS]
    if flags.worker:
        start, stop = map(int, flags.worker.split(":"))
        work(names[0], flags.seed, range(start, stop))
        return 0
    if flags.only is not None:
        form = FORMATS[names[0]]()
        folder = flags.keep or pathlib.Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        form.prepare(folder)
        result = try_mutant(form, folder, flags.seed, flags.only)
        (folder / form.file).write_bytes(make_mutant(form, flags.seed, flags.only)[1])
        print(folder / form.file, result)
        return int(result.outcome == "wrong")
    start = time.monotonic()
    results = run(names, count=flags.count, seed=flags.seed, jobs=flags.jobs)
    print(table(results))
    wrong = [(n, r) for n, found in results.items() for r in found if r.outcome == "wrong"]
    for name, result in wrong[:40]:
        print(f"{name} {result.number}: {result.detail}")
    print(f"{time.monotonic() - start:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
