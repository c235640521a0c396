"""`cliptrans features`: M-CLIP's vectors of sentences and pictures."""

import argparse
from pathlib import Path

from common_jax.command_line import Command, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "run",
        metavar="RUN",
        help="workdir of a run or of a pipeline, or the folder of one step; its towers are used",
    )
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
        help="arrays features (N, M), names (N,) and texts (N,)",
    )
    parser.add_argument(
        "--unit",
        action="store_true",
        help="vectors of length 1, whose products are cosine similarities",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the vectors of all files."""
    import numpy as np

    from cliptrans_jax.runs.finished import find
    from cliptrans_jax.vectors import encode_items, list_items, write_vectors
    from common_jax import app
    from common_jax.mesh import make_mesh

    out = Path(args.out).expanduser()
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"--out={out} must be a name that ends in .npz, in an existing folder")
    items = list_items(args.files)
    trained = find(args.run, settings=read_settings(args.rest))
    app.use_compilation_cache(trained.config.run.compilation_cache)
    vectors = encode_items(trained, items, make_mesh(trained.config.mesh))
    if args.unit:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    write_vectors(out, items, vectors)
    pictures = sum(item.picture is not None for item in items)
    print(
        f"{out}: {len(items)} vectors of {vectors.shape[1]} numbers, of {len(items) - pictures} "
        f"sentences and {pictures} pictures"
    )


COMMAND = Command(
    "write M-CLIP's vectors of sentences and pictures to an npz file",
    add_arguments,
    run,
    rest=("--config.",),
)
