"""`m2mkd features RUN FILES --out F.npz`: token maps and pooled vectors of pictures."""

import argparse

from common_jax.command_line import Command, read_settings
from common_jax.commands.arguments import add_run, count, natural
from common_jax.commands.output import check_npz, write_npz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_run(parser, use=", of a ViT or V-MoE")
    parser.add_argument("pictures", metavar="PICTURE_OR_FOLDER", nargs="+")
    parser.add_argument(
        "--out",
        metavar="FILE.npz",
        required=True,
        help="arrays maps (B, I, J, D), pooled (B, D) and names (B,)",
    )
    parser.add_argument("--size", type=count, metavar="N", help="side of the images, in pixels")
    parser.add_argument("--stage", type=natural, metavar="K", help="stage of maps (default: last)")
    parser.add_argument("--no-maps", action="store_true", help="write pooled vectors only")
    parser.add_argument("--batch", type=count, metavar="N", help="pictures at a time")
    parser.epilog = (
        "Maps are the patch tokens after the stage, before the last norm; pooled vectors are what\n"
        "the head reads. If --size differs from training, position tables are resized."
    )


def run(args: argparse.Namespace) -> int:
    """Writes the file; pictures that cannot be read are left out, and make it return 1."""
    import numpy as np

    from common_jax import app
    from m2mkd_jax.picture_files import find_pictures
    from m2mkd_jax.token_maps import check_maps, run_features
    from m2mkd_jax.trained import open_run, picture_batches

    out = check_npz(args.out)
    paths = find_pictures(args.pictures)
    size = {} if args.size is None else {"data.image_size": str(args.size)}
    trained = open_run(args.run, read_settings(args.rest) | size)
    app.use_compilation_cache(trained.config.run.compilation_cache)
    stage = check_maps(trained, args.stage)
    _, batches = picture_batches(trained, paths, args.batch)
    maps, pooled, real = [], [], []
    for images, found in run_features(trained, batches, stage):
        rows = images["_mask"] > 0
        real.append(rows)
        pooled.append(found.pooled[rows])
        if not args.no_maps:
            maps.append(found.maps[rows])
    there = np.concatenate(real)[: len(paths)]
    arrays = {"pooled": np.concatenate(pooled), "names": np.array(paths)[there]}
    if maps:
        arrays["maps"] = np.concatenate(maps)
    write_npz(out, arrays)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{out}: {shapes}; maps of stage {stage}" if maps else f"{out}: {shapes}")
    return int(not there.all())


COMMAND = Command(
    "write token maps and pooled vectors of pictures to an npz file",
    add_arguments,
    run,
    rest=("--config.", "--data."),
)
