"""Reports what a config's data contain, and every problem that keeps a run from starting on them.

Takes the config and flags of a run, and uses no device. For image sets, counts the classes and
their images, reads a sample, and reports its sizes and unreadable files. For sentences, counts
lines and empty lines by language and split, and all, missing and unreadable pictures. Lists all
problems, not only the first. For a user's own folder or table, ends with the flags that train on
it: without further flags, those of the layout that it finds.

  --sample=N  read N pictures per split, evenly spaced (default 500)
  --all       read every picture

Exit status: 0 if a run could start on the data, 1 if not, 2 for a bad command line, or 128 plus the
number of the signal that stopped it. Does not check networks, weights or tokenizers: a run checks
those itself before it writes anything.
"""

import argparse
import collections
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from common_jax import app
from common_jax.commands.arguments import count
from common_jax.commands.choice import choose
from common_jax.config import freeze
from common_jax.inputs import BadExample
from common_jax.inputs.names import listed
from common_jax.inputs.tables import SPLIT, is_table, read_table

USER_ERRORS = (*app.USER_ERRORS, ImportError)
SAMPLE = 500
USAGE = "%(prog)s --config=FILE.py [--sample=N | --all] [--config.FIELD=VALUE ...]"
NOWHERE = epath.Path("check_data")  # a workdir that is never written


@dataclasses.dataclass
class Findings:
    """The findings so far, printed as they come in.

    Attributes:
      sample: number of pictures to read per split; None for all.
      problems: the problems that keep a run from starting.
    """

    sample: int | None
    problems: list[str] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def problem(self, text: str) -> None:
        """Records a problem that keeps a run from starting, once."""
        if text not in self.problems:
            self.problems.append(text)
            self.say(f"  PROBLEM: {text}")

    def attempt(self, load: Callable[..., Any], *args: Any, **settings: Any) -> Any | None:
        """Returns the result of `load`; records a user error and returns None."""
        try:
            return load(*args, **settings)
        except USER_ERRORS as error:
            self.problem(str(error))
            return None

    def places(self, size: int) -> Sequence[int]:
        """The indices to read, out of `size` examples."""
        if self.sample is None or self.sample >= size:
            return range(size)
        return np.linspace(0, size - 1, self.sample).round().astype(int).tolist()


@dataclasses.dataclass(frozen=True)
class Checker:
    """What a package contributes to the check.

    Attributes:
      config: the dataclass of its configs.
      look: (config, findings) -> None; records everything about the config's data.
      settings_of: config -> fields, by path below the config, that train on the user's own data at
        config.data.path; empty for data with a known layout.
      example: example commands for --help.
    """

    config: type
    look: Callable[[Any, Findings], None]
    settings_of: Callable[[ml_collections.ConfigDict], Mapping[str, Any]]
    example: str


Checkers = Mapping[str, Checker]  # by the config field that identifies the package


def read_sizes(
    measure: Callable[[int], tuple[int, int]], places: Sequence[int]
) -> tuple[collections.Counter, dict[str, str]]:
    """Counts of the sizes of the readable examples, and the reason for each unreadable one."""

    def read(index: int) -> tuple[int, int] | BadExample:
        try:
            return measure(index)
        except BadExample as bad:
            return bad

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(read, places))
    bad = {one.name: one.reason for one in found if isinstance(one, BadExample)}
    return collections.Counter(one for one in found if not isinstance(one, BadExample)), bad


def say_bad(bad: Mapping[str, str], places: Sequence[int], findings: Findings) -> None:
    """Prints how many pictures cannot be read, and the reason for the first ones."""
    findings.say(f"  unreadable: {len(bad)} of {len(places)}")
    for name, reason in list(bad.items())[:10]:
        findings.say(f"    {name}: {reason}")


def say_unread_rows(path: str, splits: Collection[str], findings: Findings) -> None:
    """Prints which splits a table has besides `splits`, the fields' values. Loading these has
    already reported a table that cannot be read."""
    file = Path(path).expanduser()
    try:
        table = read_table(file) if file.is_file() and is_table(file) else None
    except USER_ERRORS:
        return
    others = table.split_sizes(without=splits) if table and SPLIT in table.columns else ()
    if others:
        findings.say(f"rows of splits that no field names: {listed(others)}")


def flags_for(settings: Mapping[str, Any]) -> str:
    """Returns fields of the config as command-line flags."""
    # Double quotes within tuples, since shlex.quote puts single quotes around them.
    texts = {key: str(value).replace("'", '"') for key, value in settings.items()}
    texts |= {key: value for key, value in settings.items() if isinstance(value, str)}
    return " \\\n  ".join(f"--config.{key}={shlex.quote(text)}" for key, text in texts.items())


def check(config: ml_collections.ConfigDict, sample: int | None, checkers: Checkers) -> int:
    """Prints the findings; returns 0 if a run could start, otherwise 1."""
    logging.getLogger().setLevel(logging.WARNING)
    findings = Findings(sample)
    checker = choose(config, checkers)
    frozen = findings.attempt(freeze, checker.config, config)
    if frozen is not None:
        checker.look(frozen, findings)
    if path := config.data.path:
        try:
            if settings := checker.settings_of(config):
                findings.say(f"flags that train on {path}:\n  {flags_for(settings)}")
        except USER_ERRORS as error:
            if findings.problems and str(error) not in findings.problems:
                findings.say(f"no flags that train on {path}: {error}")
    count = len(findings.problems)
    if not count:
        findings.say("a run could start on these data: no problem found")
        return 0
    findings.say(
        f"{count} problem{'s' if count > 1 else ''} that keep{'s' * (count == 1)} a run "
        "from starting:"
    )
    for number, text in enumerate(findings.problems, start=1):
        findings.say(f"  {number}. {text}")
    return 1


def main(argv: Sequence[str], checkers: Checkers) -> None:
    """Runs the command, and exits with its status.

    Args:
      argv: the command line, starting with the program's name.
      checkers: the checkers of the packages whose configs it accepts.
    """
    parser = argparse.ArgumentParser(argv[0], usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--sample", type=count, default=SAMPLE)
    parser.add_argument("--all", dest="sample", action="store_const", const=None)
    args, rest = parser.parse_known_args(argv[1:])
    app.run(
        lambda config, _: sys.exit(check(config, args.sample, checkers)),
        "\n".join([__doc__, *(checker.example for checker in checkers.values())]),
        [argv[0], f"--workdir={NOWHERE}", "--hosts=one", *rest],
        lost="the data were not checked to the end",
    )
