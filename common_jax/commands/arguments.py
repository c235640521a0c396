"""Arguments that both programs' commands have; imports nothing that takes time."""

import argparse
import re


def count(text: str) -> int:
    """A number from 1, for argparse."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} must be a whole number from 1 to 999999")
    return int(text)


def add_run(parser: argparse.ArgumentParser, *, use: str = "") -> None:
    """The argument RUN; `use` is added to its help."""
    about = "workdir of a run or of a pipeline, or the folder of one step"
    parser.add_argument("run", metavar="RUN", help=f"{about}{use}")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `export`."""
    add_run(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--push",
        metavar="ID",
        help="also upload it to the Hugging Face hub, as a private model unless ID exists",
    )


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `show`."""
    parser.add_argument(
        "source",
        nargs="?",
        metavar="RUN_OR_CONFIG",
        help="workdir of a run, or FILE.py:ARGUMENT=VALUE,...",
    )
    parser.add_argument("--config", help="the config, as other commands take it")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="fields and parameters with TEXT in their path"
    )
    parser.epilog = "Any field can be set: --config.optim.batch=64"


def add_none(parser: argparse.ArgumentParser) -> None:
    """No arguments: the command parses its own."""
