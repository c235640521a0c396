"""Arguments that both programs' commands have; imports nothing that takes time."""

import argparse


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
