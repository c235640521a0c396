"""The input pipeline against plain PIL: images per second of the full DeiT training transform.

Ours is `train_batches` on a folder of JPEGs as a run uses it: files are read, decoded, cropped and
resized to `--side`, flipped, augmented by RandAugment and stacked to batches. The baseline, written
out below, is a loop over the same files with the same PIL operations that discards the result. Both
run in `--workers` processes on `--threads` cores, in wall-clock time, and in one thread, in
wall-clock and in CPU time; so does timm's transform, in processes only, if timm is installed. All
cases take turns, so that a busy machine slows all of them alike. Images that our processes have
prefetched are consumed before a turn, and the next ones are awaited after it.

--folder holds SPLIT/CLASS/*.jpg, and its first split is read. Without it, JPEGs of about 500 x 375
pixels and 100 KB, like ImageNet's, are made: smooth random fields with fine texture.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --folder /data/imagenet --workers 16 --threads 16

Rates per core are over the cores that the processes can use. Small images in memory and the
training step of DeiT-Tiny, which consumes the images, are timed too.
"""

import argparse
import concurrent.futures
import importlib.util
import itertools
import math
import multiprocessing
import os
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL
import timing
import vit_step
from PIL import Image, ImageEnhance, ImageOps

from common_jax.inputs import train_batches
from common_jax.inputs.workers import AHEAD
from m2mkd_jax.data.augment import AugmentConfig
from m2mkd_jax.data.source import ArraySource
from m2mkd_jax.data.sources import DataConfig, load_source
from m2mkd_jax.data.transforms import train_transform, with_pictures
from m2mkd_jax.models import vit
from m2mkd_jax.models.encoder import Interface

SIZES = ((500, 375), (375, 500), (500, 333), (480, 400))
FIELDS = ((3, 90), (12, 45), (48, 22))  # cells per side and strength of each field
TEXTURE = 13
FILL = (124, 116, 104)
STEP, STEP_BATCH = "deit_tiny_patch16_224", 8
PIECE = 8  # files per task of the loops in processes


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=9)
    parser.add_argument("--folder", help="folder with SPLIT/CLASS/*.jpg; made if not given")
    parser.add_argument("--images", type=int, default=1024, help="images per turn")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--small", type=int, default=50_000, help="number of 32-pixel images")
    return parser.parse_args()


def make_images(folder: pathlib.Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        picture = np.full((height, width, 3), 128.0)
        for cells, strength in FIELDS:
            for channel in range(3):
                field = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
                smooth = field.resize((width, height), Image.Resampling.BICUBIC)
                picture[..., channel] += strength * np.asarray(smooth)
        picture += rng.normal(0, TEXTURE, (height, width, 1))
        path = folder / "train" / f"class_{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)


# The baseline: the recipe in plain PIL.


def crop_and_resize(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            break
    else:
        wide = tall = min(width, height)
    left, top = random.randint(0, width - wide), random.randint(0, height - tall)
    image = image.crop((left, top, left + wide, top + tall))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def affine(image: Image.Image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Image.Image:
    how = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), **how)


def solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else image.point([0] * 768)


# (image, fraction of the maximum strength, sign) -> image
OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
    lambda image, m, sign: ImageOps.invert(image),
    lambda image, m, sign: image.rotate(sign * 30 * m, Image.Resampling.BICUBIC, fillcolor=FILL),
    lambda image, m, sign: posterize(image, 4 - int(4 * m)),
    lambda image, m, sign: ImageOps.solarize(image, 256 - int(256 * m)),
    lambda image, m, sign: solarize_add(image, int(110 * m)),
    lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: affine(image, b=sign * 0.3 * m),
    lambda image, m, sign: affine(image, d=sign * 0.3 * m),
    lambda image, m, sign: affine(image, c=sign * 0.45 * m * image.width),
    lambda image, m, sign: affine(image, f=sign * 0.45 * m * image.height),
)


def decode(path: str) -> Image.Image:
    with Image.open(path, formats=["JPEG"]) as image:
        return image.convert("RGB")


def plain(path: str, side: int) -> Image.Image:
    image = crop_and_resize(decode(path), side)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation in random.choices(OPERATIONS, k=2):
        if random.random() < 0.5:
            strength = min(max(random.gauss(9, 0.5), 0), 10) / 10
            image = operation(image, strength, random.choice((-1, 1)))
    return image


def loop_plain(paths: Sequence[str], side: int) -> None:
    for path in paths:
        plain(path, side)


def loop_timm(paths: Sequence[str], side: int) -> None:
    transform = timm_transform(side)
    for path in paths:
        transform(decode(path))


def timm_transform(side: int, cache: dict[int, Callable] = {}) -> Callable:  # noqa: B006
    """timm's transform up to uint8 pixels, like ours; created once per process."""
    if side not in cache:
        import torch
        from timm.data import create_transform

        torch.set_num_threads(1)
        recipe = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
        cache[side] = create_transform(side, is_training=True, use_prefetcher=True, **recipe)
    return cache[side]


def in_processes(
    pool: concurrent.futures.Executor, loop: Callable, paths: Sequence[str], side: int
) -> np.ndarray:
    """Seconds per image of a loop over all paths, split among processes."""
    pieces = [paths[first : first + PIECE] for first in range(0, len(paths), PIECE)]
    start = timing.clocks()
    list(pool.map(loop, pieces, [side] * len(pieces)))
    return without_cpu_time((timing.clocks() - start) / len(paths))


def without_cpu_time(seconds: np.ndarray) -> np.ndarray:
    """Leaves wall-clock time: the CPU time of processes counts only once they have ended."""
    return np.asarray([seconds[0], np.nan])


def in_thread(loop: Callable, *arguments: Any, count: int) -> np.ndarray:
    """Wall-clock and CPU seconds per image of a loop in this thread."""
    start = timing.clocks()
    loop(*arguments)
    return (timing.clocks() - start) / count


def consume(batches: Iterator[dict[str, np.ndarray]], count: int) -> None:
    for batch in itertools.islice(batches, count):
        assert batch["image"].dtype == np.uint8


def ours(batches: Iterator, batch: int, images: int, *, ahead: int) -> np.ndarray:
    """Seconds per image in steady state, not counting prefetched images."""
    count = max(1, images // batch)
    if not ahead:
        return in_thread(consume, batches, count, count=count * batch)
    consume(batches, ahead + 1)
    seconds = without_cpu_time(in_thread(consume, batches, count, count=count * batch))
    time.sleep(ahead * batch * seconds[0] + 0.2)
    return seconds


def in_memory(count: int) -> float:
    """32-pixel images per CPU second from memory, in batches of 128, without a transform."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    source = ArraySource({"image": images, "label": labels}, tuple("0123456789"))
    batches = train_batches(source, transform=None, seed=0, batch=128)
    consume(batches, 10)
    return 1 / float(in_thread(consume, batches, 500, count=500 * 128)[1])


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(sizes.folder or temporary)
        if not sizes.folder:
            make_images(folder, sizes.images)
        measure(sizes, folder)


def measure(sizes: argparse.Namespace, folder: pathlib.Path) -> None:
    split = min(path.name for path in folder.iterdir() if path.is_dir())
    paths = [str(path) for path in sorted((folder / split).rglob("*")) if path.is_file()]
    random.Random(0).shuffle(paths)
    paths = (paths * (sizes.images // len(paths) + 1))[: sizes.images]
    data = DataConfig(
        source="folder",
        path=str(folder),
        image_size=sizes.side,
        channels=3,
        labels=len([path for path in (folder / split).iterdir() if path.is_dir()]),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        train_split=split,
    )
    augment = AugmentConfig(flip=True, randaugment=True)
    transform = train_transform(data, augment)
    settings = {
        "source": with_pictures(load_source(data, split), transform),
        "transform": transform,
        "seed": 0,
        "batch": sizes.batch,
    }
    cores = min(sizes.workers, len(os.sched_getaffinity(0)))
    kilobytes = statistics.mean(os.path.getsize(path) for path in paths) / 1e3
    print(f"pillow {PIL.__version__}, {sizes.workers} processes on {cores} cores")
    print(f"{sizes.images} JPEGs of {kilobytes:.0f} KB, to {sizes.side} x {sizes.side}\n")

    alone = train_batches(**settings)
    many = train_batches(**settings, workers=sizes.workers)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(sizes.workers, spawn) as pool:
        shared = (paths, sizes.side)
        cases: dict[str, Callable[[], np.ndarray]] = {
            "ours": lambda: ours(many, sizes.batch, sizes.images, ahead=2 * AHEAD + 1),
            "PIL": lambda: in_processes(pool, loop_plain, *shared),
            "ours, one thread": lambda: ours(alone, sizes.batch, sizes.images, ahead=0),
            "PIL, one thread": lambda: in_thread(loop_plain, *shared, count=len(paths)),
            "PIL, decoding alone": lambda: in_thread(
                lambda: [decode(path) for path in paths], count=len(paths)
            ),
        }
        if all(map(importlib.util.find_spec, ("timm", "torchvision"))):
            cases["timm"] = lambda: in_processes(pool, loop_timm, *shared)
        else:
            print("skipping timm, which is not installed (pip install timm torch torchvision)\n")
        config, side = vit.variant(STEP)
        interface = Interface(side, 3, 1000)
        images = vit_step.make_batch(interface, STEP_BATCH)
        step = vit_step.make_step(config, interface, images)
        cases["step"] = lambda: timing.seconds_of(step) / STEP_BATCH
        seconds = in_turns(cases, max(timing.LEAST, sizes.repeats))
    many.close()
    report(sizes, seconds, cores)


def in_turns(
    cases: Mapping[str, Callable[[], Any]], turns: int, *, fragile: Collection[str] = ("timm",)
) -> dict[str, list]:
    """Results by case, measured in turns. A `fragile` case that fails is named and skipped: now and
    then timm 1.0.22 asks Pillow 13 to posterize to 0 bits, which is an error."""
    results: dict[str, list] = {name: [] for name in cases}
    for turn in range(-1, turns):  # the first starts the processes and fills the page cache
        for name in list(results):
            try:
                result = cases[name]()
            except Exception as error:
                if name not in fragile:
                    raise
                print(f"skipping {name}: {type(error).__name__}: {error}\n")
                del results[name]
                continue
            if turn >= 0:
                results[name].append(result)
    return results


def report(sizes: argparse.Namespace, seconds: dict[str, list[np.ndarray]], cores: int) -> None:
    times = {name: np.stack(turns) for name, turns in seconds.items()}
    rates = {name: (1 / turns[:, 0]).tolist() for name, turns in times.items()}
    middle = {name: statistics.median(rate) for name, rate in rates.items()}
    for name, rate in rates.items():
        used = cores if name in ("ours", "PIL", "timm", "step") else 1
        spread = f"({min(rate):.0f} to {max(rate):.0f})"
        print(f"{name:20s}{middle[name]:7.0f} img/s  {spread}, {middle[name] / used:.0f} per core")
    shares = times["PIL, decoding alone"] / times["PIL, one thread"]
    decoding = float(np.median(shares[:, 1]))
    print(f"\ndecoding takes {decoding:.0%} of the plain loop")
    small = in_memory(sizes.small)
    print(f"32-pixel images in memory, batches of 128: {small:.0f} examples/s in one thread\n")
    reading = "reading JPEGs, DeiT's transform"
    one_thread = timing.compare(
        times,
        "ours, one thread",
        "PIL, one thread",
        claim=f"{reading}, one thread",
        target=None,
    )
    claims = [
        timing.compare(times, "ours", "PIL", claim=reading, target=0.9),
        one_thread | {"threads": 1},
        timing.compare(times, "ours", "step", claim="reading for a step of DeiT-Tiny", target=1.0),
    ]
    if "timm" in times:
        claims.append(timing.compare(times, "ours", "timm", claim=reading, target=None))
    for claim in claims:
        if np.isnan(claim["processor"]):
            claim["processor"] = None
    details = {
        "images": sizes.images,
        "side": sizes.side,
        "workers": sizes.workers,
        "cores": cores,
        "images_per_second": rates,
        "images_per_second_a_core": middle["ours"] / cores,
        "decoding_share": decoding,
        "in_memory_examples_per_second": small,
    }
    timing.report("input_pipeline", claims, **details)


if __name__ == "__main__":
    main()
