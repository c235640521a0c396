"""Runners for m2mKD's data functions."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import PIL
from PIL import Image

from m2mkd_jax.data import augment, few_shot, randaugment, samplers
from parity.cases import Case, Comparison


def run_mixup_cutmix(case: Case) -> Iterator[Comparison]:
    """Mixed images and soft targets, for fixed and random lambda and box centre."""
    config, arrays = case.config, case.arrays
    settings = config["config"]
    atol, rtol = config["tolerance"]["atol"], config["tolerance"]["rtol"]
    images = jnp.moveaxis(jnp.asarray(arrays["inputs/images"]), 1, -1)
    labels = jnp.asarray(arrays["inputs/labels"])
    height, width = images.shape[1:3]
    smoothings = settings["smoothings"]

    def compare(name, use_cutmix, lam, centre, effective, box):
        mixed = augment.mixup(images, lam)
        if use_cutmix and centre is not None:
            edges = augment.cutmix_box(lam, centre, height=height, width=width)
            if box is not None:
                yield f"{name}/box", np.array(edges), np.array(box), 0, 0
            mixed, lam = augment.cutmix(images, lam, centre)
        yield f"{name}/lam", float(lam), effective, atol, rtol
        # CutMix only copies pixels.
        exact = (0, 0) if use_cutmix else (atol, rtol)
        want = arrays[f"outputs/{name}/images"]
        yield f"{name}/images", np.moveaxis(np.asarray(mixed), -1, 1), want, *exact
        return lam

    def targets(lam, smoothing):
        smooth = augment.soft_targets(labels, settings["num_classes"], smoothing)
        return np.asarray(augment.mix_targets(smooth, lam))

    for name, entry in config["cases"].items():
        use_cutmix, box = entry["kind"] == "cutmix", entry["bbox_yl_yh_xl_xh"]
        centre = tuple(entry["center"]) if entry["center"] else None
        lam = yield from compare(
            name, use_cutmix, entry["lam_drawn"], centre, entry["lam_effective"], box
        )
        for smoothing in smoothings:
            key = f"soft_targets_smoothing{smoothing:g}"
            want = arrays[f"outputs/{name}/{key}"]
            yield f"{name}/{key}", targets(lam, smoothing), want, atol, rtol

    drawing = augment.AugmentConfig(
        mixup=settings["mixup_alpha"],
        cutmix=settings["cutmix_alpha"],
        switch=settings["switch_prob"],
        mix_probability=settings["prob"],
    )
    for entry in config["seeded_draws"]:
        seed = entry["numpy_legacy_seed"]
        rng = np.random.RandomState(seed)
        use_cutmix, lam, centre = augment.draw_mix(rng, drawing, height=height, width=width)
        name = f"draw_seed{seed}"
        yield f"{name}/lam_drawn", lam, entry["lam_drawn"], 1e-12, 0
        yield f"{name}/use_cutmix", use_cutmix, entry["use_cutmix"], 0, 0
        lam = yield from compare(
            name, use_cutmix, lam, centre, entry["lam_effective"], entry["bbox"]
        )
        want = arrays[f"outputs/{name}/soft_targets"]
        yield f"{name}/soft_targets", targets(lam, smoothings[0]), want, atol, rtol


def run_augment_ops(case: Case) -> Iterator[Comparison]:
    """Every RandAugment operation: argument and image, exact with the same Pillow version."""
    config, arrays = case.config, case.arrays
    settings = config["config"]
    image = Image.fromarray(arrays["inputs/image_hwc_uint8"].astype(np.uint8))
    fill = tuple(settings["fill_rgb"])
    same_pillow = PIL.__version__ == settings["pillow"]
    names = set(settings["policy"]["ops"])
    yield "operations", sorted(randaugment.OPERATIONS) == sorted(names), True, 0, 0
    for key, entry in config["level_args"].items():
        name, _, level = key.partition("_m")
        magnitude, _, sign = level.partition("_")
        argument = randaugment.level_argument(name, float(magnitude or 0), sign == "neg")
        arguments = [] if argument is None else [argument]
        yield f"{key}/argument", arguments, entry["args"], 1e-12, 0
        got = np.asarray(randaugment.OPERATIONS[name](image, argument, fill), np.int32)
        want = arrays[f"outputs/{key}"]
        if same_pillow:
            yield f"{key}/image", got, want, 0, 0
        else:
            yield f"{key}/mean difference", np.abs(got - want).mean(), 0.0, 1.0, 0


def run_few_shot(case: Case) -> Iterator[Comparison]:
    """Classes, rows and labels that each seed chooses in CIFAR-100 and CUB-200."""
    config, arrays = case.config, case.arrays
    settings = config["config"]
    shots = {"train": settings["n_shot"], "val": settings["val_sample"]}
    cub_training = arrays["inputs/cub_is_training"].astype(bool)
    # (labels from 0, classes, eligible rows of train and val, number of the first row). The
    # original draws both train and val of CIFAR-100 from its training split.
    sets = {
        "cifar100": (arrays["inputs/cifar_train_targets"], 100, {"train": None, "val": None}, 0),
        "cub": (
            arrays["inputs/cub_labels_from_1"] - 1,
            200,
            {"train": cub_training, "val": ~cub_training},
            1,
        ),
    }
    for name, entry in config["results"].items():
        source, _, seed = name.rpartition("_seed")
        labels, labels_count, eligible, first = sets[source]
        chosen = {}
        for side, count in shots.items():
            episode = few_shot.choose_episode(
                labels,
                ways=settings["k_way"],
                shots=count,
                seed=int(seed),
                labels_count=labels_count,
                eligible=eligible[side],
            )
            chosen[side] = episode.indices
            want = arrays[f"outputs/{name}/{side}_index"]
            yield f"{name}/{side}_index", episode.indices + first, want, 0, 0
            want = arrays[f"outputs/{name}/{side}_label"]
            yield f"{name}/{side}_label", episode.labels, want, 0, 0
            classes = np.array(episode.classes)
            want = np.array(entry["chosen_classes_in_draw_order"])
            yield f"{name}/{side}_classes", classes, want, 0, 0
        shared = len(np.intersect1d(chosen["train"], chosen["val"]))
        yield f"{name}/overlap", shared, entry["train_samples_also_in_val"], 0, 0


def run_repeated_aug_sampler(case: Case) -> Iterator[Comparison]:
    """The examples that each process gets from the epoch's permutation."""
    for name, settings in case.config["config"].items():
        permutation = np.arange(settings["dataset_size"])
        if settings["shuffle"]:
            permutation = case.arrays[f"inputs/{name}/permutation"]
        for rank in range(settings["world"]):
            got = samplers.repeated_indices(permutation, rank=rank, world=settings["world"])
            want = case.arrays[f"outputs/{name}/rank{rank}"]
            yield f"{name}/rank{rank}", got, want, 0, 0
