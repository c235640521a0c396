"""Prepares a TFDS image set as ArrayRecords, with a label file for each split.

    pip install -e '.[prepare]'
    python tools/prepare_data.py cifar10 --data-dir /data/tfds
    python tools/prepare_data.py imagenet2012 --data-dir /data/tfds --manual-dir /data/archives

Works with any TFDS set that has the features image and label: imagenet2012, imagenet_r, cifar10,
cifar100, caltech_birds2011 and so on. TFDS downloads what it is allowed to; for imagenet2012 the
archives ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar must be in --manual-dir. Training then
reads the set without TensorFlow: --config.data.source=tfds --config.data.path=/data/tfds
--config.data.name=cifar10. If the set is already prepared, only the label files are written.
"""

import argparse
import sys
from typing import Any

import numpy as np
from etils import epath

from common_jax.signals import ends_quietly
from common_jax.workdir import describe_error
from m2mkd_jax.data.files.records import find_prepared, open_builder, stored_labels

EXTRA = "pip install -e '.[prepare]' (TFDS, TensorFlow and TFDS's other dependencies)"


def prepare(name: str, data_dir: str, *, manual_dir: str | None) -> epath.Path:
    """Prepares the set unless it exists, and returns its folder.

    Raises:
      ImportError: TensorFlow or TFDS is missing.
      ValueError: there is no such set, or it has no images with labels.
    """
    try:
        return find_prepared(data_dir, name)
    except FileNotFoundError:
        import tensorflow  # noqa: F401, which TFDS needs to encode images
        import tensorflow_datasets as tfds
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(f"TFDS has no set {name!r}: {str(error).splitlines()[0]}") from error
    _require_features(name, builder.info.features)
    settings = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=settings, file_format="array_record")
    return epath.Path(builder.data_path)


def _require_features(name: str, features: Any) -> None:
    kinds = {key: type(feature).__name__ for key, feature in dict(features or {}).items()}
    if (kinds.get("image"), kinds.get("label")) != ("Image", "ClassLabel"):
        raise ValueError(
            f"{name} has the features {kinds}; a set with image: Image and label: ClassLabel is "
            "needed"
        )


def describe(folder: epath.Path) -> list[str]:
    """Writes the label files; returns one line about the set and one per split, with its number of
    images, files, images per class, and unlabelled images."""
    builder = open_builder(folder)
    names = builder.info.features["label"].names
    lines = [f"{builder.info.full_name} in {folder}: {len(names)} classes"]
    for split, info in builder.info.splits.items():
        labels = stored_labels(builder, folder, split)
        counts = np.bincount(labels[labels >= 0], minlength=len(names))
        unlabelled = f", {np.sum(labels < 0)} without label" if (labels < 0).any() else ""
        lines.append(
            f"  {split}: {len(labels)} images in {len(info.filepaths)} files, "
            f"{counts.min()} to {counts.max()} a class{unlabelled}; labels-{split}.npz"
        )
    return lines


@ends_quietly
def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 once the set is prepared, 2 if it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the set's name in TFDS; NAME:VERSION for a version")
    parser.add_argument("--data-dir", required=True, help="TFDS folder, created if needed")
    parser.add_argument("--manual-dir", help="folder of manually downloaded archives")
    args = parser.parse_args(argv)
    try:
        folder = prepare(args.name, args.data_dir, manual_dir=args.manual_dir)
        print("\n".join(describe(folder)))
    except ImportError as error:
        print(f"error: preparing needs {EXTRA}: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, AssertionError) as error:
        # TFDS asserts that manually downloaded archives exist.
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
