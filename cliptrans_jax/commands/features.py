"""`cliptrans features`: M-CLIP's vectors of sentences and pictures."""

import argparse

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run
from common_jax.commands.output import check_npz, write_npz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_run(parser, use="; its towers are used")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="text with a sentence per line (UTF-8, plain or .gz), a picture, or a folder of "
        "pictures",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.npz",
        required=True,
        help="output file with the arrays features (N, M), names (N,) and texts (N,)",
    )
    parser.add_argument(
        "--unit",
        action="store_true",
        help="normalise vectors to length 1, so that dot products are cosine similarities",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the vectors; pictures that cannot be read are left out, and make it return 1."""
    import numpy as np

    from cliptrans_jax.runs.finished import find
    from cliptrans_jax.vectors import as_arrays, encode_items, list_items
    from common_jax import app
    from common_jax.mesh import make_mesh

    out = check_npz(args.out)
    items = list_items(args.files)
    trained = find(args.run, settings=read_settings(args.rest))
    app.use_compilation_cache(trained.config.run.compilation_cache)
    kept, vectors = encode_items(trained, items, make_mesh(trained.config.mesh))
    if args.unit:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    write_npz(out, as_arrays(kept, vectors))
    pictures = sum(item.picture is not None for item in kept)
    print(
        f"{out}: {len(kept)} vectors of {vectors.shape[1]} numbers, of {len(kept) - pictures} "
        f"sentences and {pictures} pictures"
    )
    return int(len(kept) < len(items))


COMMAND = Command(
    "write M-CLIP's vectors of sentences and pictures to an npz file",
    add_arguments,
    run,
    rest=("--config.",),
)
