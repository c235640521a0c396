"""`m2mkd predict RUN PICTURE_OR_FOLDER...`: class names and probabilities of pictures."""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run, count, natural
from common_jax.commands.output import json_line, writable

if TYPE_CHECKING:
    from m2mkd_jax.picture_files import PictureFiles
    from m2mkd_jax.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_run(parser)
    parser.add_argument("pictures", metavar="PICTURE_OR_FOLDER", nargs="+")
    parser.add_argument("--top", type=count, default=5, metavar="N", help="classes (default 5)")
    for form, about in (("json", "a JSON object per picture"), ("csv", "a row per class")):
        parser.add_argument(
            f"--{form}", action="store_const", dest="form", const=form, default="table", help=about
        )
    parser.add_argument("--module", type=natural, metavar="K", help="which of several modules")
    parser.add_argument("--batch", type=count, metavar="N", help="pictures at a time")
    parser.epilog = (
        "Fields of the run's config.data (but not labels and channels), config.mesh, "
        "config.evaluation, config.sources and config.precision can be changed: "
        "--config.mesh.fsdp=2"
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A picture's classes with their probabilities, best first; `problem` if it is unreadable."""

    picture: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str = ""


def run(args: argparse.Namespace) -> int:
    """Prints predictions as they are computed; returns 1 if a picture could not be read."""
    from common_jax.inputs.names import printable

    paths, predictions = predict(args)
    show = {"json": show_json, "csv": show_csv}.get(args.form, show_table)
    return int(show(predictions, width=max(map(len, map(printable, paths)))) > 0)


def show_table(predictions: Iterable[Prediction], *, width: int) -> int:
    """Prints one line per picture; returns the number of unreadable ones, which the log names."""
    from common_jax.inputs.names import printable

    unreadable = 0
    for one in predictions:
        shares = "  ".join(f"{name} {share:.1%}" for name, share in one.classes)
        print(f"{printable(one.picture):{width}}  {shares or 'unreadable'}", flush=True)
        unreadable += bool(one.problem)
    return unreadable


def show_json(predictions: Iterable[Prediction], *, width: int) -> int:
    """Like `show_table`, but prints one JSON object per line."""
    unreadable = 0
    for one in predictions:
        classes = [{"class": name, "probability": share} for name, share in one.classes]
        content = {"error": one.problem} if one.problem else {"classes": classes}
        print(json_line({"picture": one.picture} | content), flush=True)
        unreadable += bool(one.problem)
    return unreadable


def show_csv(predictions: Iterable[Prediction], *, width: int) -> int:
    """Like `show_table`, but prints CSV with one row per class."""
    writer, unreadable = csv.writer(sys.stdout, lineterminator="\n"), 0
    writer.writerow(("picture", "rank", "class", "probability"))
    for one in predictions:
        for rank, (name, share) in enumerate(one.classes, 1):
            writer.writerow((writable(one.picture), rank, name, f"{share:.6f}"))
        unreadable += bool(one.problem)
    return unreadable


def predict(args: argparse.Namespace) -> tuple[list[str], Iterator[Prediction]]:
    """The paths of the pictures, and their predictions in order, computed as they are read."""
    from common_jax import app
    from m2mkd_jax.picture_files import find_pictures
    from m2mkd_jax.trained import choose_network, open_run, picture_batches

    paths = find_pictures(args.pictures)
    trained = open_run(args.run, read_settings(args.rest))
    app.use_compilation_cache(trained.config.run.compilation_cache)
    name = choose_network(trained, args.module)
    source, batches = picture_batches(trained, paths, args.batch)
    top = min(args.top, len(trained.classes))
    return paths, _predictions(trained, name, source, batches, top)


def _predictions(
    trained: "Trained", name: str, source: "PictureFiles", batches: Iterable, top: int
) -> Iterator[Prediction]:
    import jax
    from jax import numpy as jnp

    from m2mkd_jax.trained import run_batches

    def finish(logits, batch):
        return jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), top)

    paths = iter(enumerate(source.paths))
    for batch, found in run_batches(trained, batches, finish):
        rows = zip(batch["_mask"], *found[name], strict=True)
        # Not strict: the last batch may be padded with more rows than there are paths left.
        for (real, shares, labels), (index, path) in zip(rows, paths, strict=False):
            if not real:
                yield Prediction(path, problem=source.problem(index))
                continue
            names = (trained.classes[label] for label in labels)
            yield Prediction(path, tuple(zip(names, shares.tolist(), strict=True)))


COMMAND = Command(
    "classify pictures: names and probabilities", add_arguments, run, ("--config.", "--data.")
)
