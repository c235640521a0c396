"""Makes the mistakes in `tests/mistakes` one at a time in copies of the code, and runs the tests
that should catch each.

Prints `file | mistake | noticed by` for each, and the rate at the end. A mistake is not tried again
while it, its file and its tests are unchanged. Exits with 1 if fewer than 95 % are noticed, if an
unnoticed one has no reason in `equivalent`, if the tests of a mistake fail without it, or if its
text is no longer in the file.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence

from mistakes import MISTAKES
from mistakes.mistake import Mistake

ROOT = pathlib.Path(__file__).parents[1]
LEAST = 0.95
SECONDS = 600  # time limit for the tests of one mistake, which may make them wait forever
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one run of tests.

    Args:
      kind: "noticed", "passed", or "broken" if no test ran.
      detail: the first test that failed, or the output instead.
    """

    kind: str
    detail: str = ""


class Copy:
    """A copy of the repository's files, in which mistakes are made."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path, cache: pathlib.Path) -> None:
        for name in listed(root):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
        self.folder = folder
        self._environment = os.environ | {
            "PYTHONPATH": str(folder),  # takes precedence over an installed copy of the packages
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }

    def run(self, tests: str) -> Outcome:
        """Runs tests until the first one fails."""
        flags = ("-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider")
        try:
            process = subprocess.run(
                (sys.executable, "-m", "pytest", *flags, *tests.split()),
                cwd=self.folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Outcome("noticed", f"no end within {SECONDS} s")
        if process.returncode == 0:
            return Outcome("passed")
        failed = FAILED.search(process.stdout)
        if process.returncode == 1 and failed:
            return Outcome("noticed", failed[1])
        said = (process.stdout + process.stderr).strip().splitlines()
        return Outcome("broken", f"pytest ends with {process.returncode}: {' '.join(said[-3:])}")

    def run_with(self, mistake: Mistake) -> Outcome:
        """Runs the tests of a mistake with the mistake made, and undoes it."""
        path = self.folder / mistake.file
        before = path.read_text()
        try:
            self._write(path, before.replace(mistake.right, mistake.wrong))
            return self.run(mistake.tests)
        finally:
            self._write(path, before)

    def _write(self, path: pathlib.Path, text: str) -> None:
        path.write_text(text)
        # Python would take a module of the same size and mtime for the one it has compiled.
        pathlib.Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def listed(root: pathlib.Path) -> list[str]:
    """Files in the working tree that git tracks or would add."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in names.split("\0") if name and (root / name).is_file())


def fault(mistake: Mistake, root: pathlib.Path) -> str:
    """What is wrong with the entry itself, or ""."""
    path = root / mistake.file
    if not path.is_file():
        return f"{mistake.file} does not exist"
    if mistake.right == mistake.wrong:
        return "right and wrong are the same"
    if (count := path.read_text().count(mistake.right)) != 1:
        return f"{mistake.right!r} occurs {count} times in {mistake.file} and must occur once"
    for test in mistake.tests.split():
        file, *names = test.split("::")
        text = (root / file).read_text() if (root / file).is_file() else ""
        if not all(f"def {name}(" in text or f"class {name}" in text for name in names) or not text:
            return f"there is no test {test}"
    return "" if mistake.tests else "no tests are named"


def key_of(tests: str, root: pathlib.Path, mistake: Mistake | None = None) -> str:
    """A hash of what an outcome depends on: the mistake, its file and its test files."""
    files = [mistake.file] if mistake else []
    files += sorted({test.partition("::")[0] for test in tests.split()})
    said = [repr(mistake), tests, *((root / file).read_text() for file in files)]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


class Results:
    """Outcomes by key, stored in a file so that the next start resumes from it."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._found: dict[str, Outcome] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            self._found[entry["key"]] = Outcome(entry["kind"], entry["detail"])

    def get(self, key: str) -> Outcome | None:
        return self._found.get(key)

    def keep(self, key: str, outcome: Outcome) -> None:
        self._found[key] = outcome
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key} | dataclasses.asdict(outcome)) + "\n")


def try_all(
    mistakes: Sequence[Mistake], root: pathlib.Path, results: Results, jobs: int
) -> Iterator[tuple[Mistake, Outcome]]:
    """Each mistake and the outcome of its tests, in the order in which they finish.

    If tests fail without any mistake, the outcome of all their mistakes is "broken".
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        places = pathlib.Path(scratch)
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(jobs):
            copies.put(Copy(root, places / str(number), places / "compiled"))

        def run(tests: str, mistake: Mistake | None = None) -> Outcome:
            key = key_of(tests, root, mistake)
            outcome = results.get(key)
            if outcome is None:
                copy = copies.get()
                try:
                    outcome = copy.run_with(mistake) if mistake else copy.run(tests)
                finally:
                    copies.put(copy)
                results.keep(key, outcome)
            return outcome

        def judge(mistake: Mistake) -> Outcome:
            with clean[mistake.tests]:  # the first thread runs the tests without a mistake
                found = run(mistake.tests)
            if found.kind == "passed":
                return run(mistake.tests, mistake)
            return Outcome("broken", f"fails without the mistake: {found.detail}")

        clean = {mistake.tests: threading.Lock() for mistake in mistakes}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(judge, mistake): mistake for mistake in mistakes}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()


def summary(outcomes: Iterable[tuple[Mistake, Outcome]]) -> tuple[str, bool]:
    """The last line of the output, and whether all is well."""
    outcomes = list(outcomes)
    noticed = sum(outcome.kind == "noticed" for _, outcome in outcomes)
    unexplained = [x for x, outcome in outcomes if outcome.kind == "passed" and not x.equivalent]
    broken = sum(outcome.kind == "broken" for _, outcome in outcomes)
    rate = noticed / max(len(outcomes), 1)
    text = (
        f"{noticed} of {len(outcomes)} noticed ({100 * rate:.1f} %), {len(unexplained)} not "
        f"noticed without a reason, {broken} broken"
    )
    return text, bool(outcomes) and rate >= LEAST and not unexplained and not broken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regex of `FILE: MISTAKE` to try; all if empty")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes tried at once")
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "runs" / "mutants.jsonl",
        help="file with earlier outcomes; delete it to try all mistakes again",
    )
    options = parser.parse_args(argv)
    chosen = [x for x in MISTAKES if re.search(options.only, f"{x.file}: {x.what}")]
    if faults := [f"{x.file}: {x.what}: {said}" for x in chosen if (said := fault(x, ROOT))]:
        print("\n".join(faults))
        return 1
    print("file | mistake | noticed by", flush=True)
    outcomes = []
    for mistake, outcome in try_all(chosen, ROOT, Results(options.results), options.jobs):
        outcomes.append((mistake, outcome))
        by = {
            "noticed": outcome.detail,
            "broken": f"BROKEN: {outcome.detail}",
            "passed": f"none: {mistake.equivalent}" if mistake.equivalent else "NONE",
        }[outcome.kind]
        print(f"{mistake.file} | {mistake.what} | {by}", flush=True)
    text, well = summary(outcomes)
    print(text)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
