"""Arguments shared by both programs' commands; imports nothing slow."""

import argparse
import re


def count(text: str) -> int:
    """An argparse type: an integer from 1 to 999999."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """An argparse type: an integer from 0 to 999999."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"0*[0-9]{1,6}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"{text[:100]!r} must be a whole number from {least} to 999999"
        )
    return int(text)


def add_run(parser: argparse.ArgumentParser, *, use: str = "") -> None:
    """Adds the argument RUN; `use` is appended to its help."""
    about = "workdir of a run or of a pipeline, or the folder of one step"
    parser.add_argument("run", metavar="RUN", help=f"{about}{use}")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export`."""
    add_run(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--push",
        metavar="ID",
        help="also upload it to the Hugging Face Hub, as a private model unless ID exists",
    )


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `show`."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="RUN_OR_CONFIG",
        help="workdir of a run, or FILE.py:ARGUMENT=VALUE,...",
    )
    parser.add_argument("--config", help="the config, as other commands take it")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only fields and parameters whose path has TEXT"
    )
    parser.epilog = "Any field can be set: --config.optim.batch=64"


def add_none(parser: argparse.ArgumentParser) -> None:
    """Adds no arguments: the command parses its own."""
