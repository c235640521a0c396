"""Arguments that both programs' commands have; imports nothing that takes time."""

import argparse
import re


def count(text: str) -> int:
    """A number from 1, for argparse."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} must be a whole number from 1 to 999999")
    return int(text)


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `show`."""
    parser.add_argument(
        "source", metavar="RUN_OR_CONFIG", help="workdir of a run, or FILE.py:ARGUMENT=VALUE,..."
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="fields and parameters with TEXT in their path"
    )
    parser.epilog = "Any field can be set: --config.optim.batch=64"


def add_none(parser: argparse.ArgumentParser) -> None:
    """No arguments: the command parses its own."""
