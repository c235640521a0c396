"""Pictures, and zips of them: samples, both systems' reading, and PIL's own."""

import io
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import mutations
import numpy as np
from fuzz_format import Format, same
from PIL import Image


def _pictures() -> tuple[bytes, ...]:
    pixels = (np.arange(16 * 12 * 3).reshape(16, 12, 3) * 7 % 256).astype(np.uint8)
    files = []
    kinds = (("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("BMP", "RGB"))
    kinds += (("GIF", "P"), ("PPM", "RGB"), ("PPM", "L"), ("TIFF", "RGB"), ("TIFF", "L"))
    for kind, mode in kinds:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return (*files, file.getvalue())


def _other_kind(rng: random.Random, data: bytes) -> bytes:
    """Content in another format than the name says; opening some of these starts a program."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    kinds = (
        eps,
        b"GIF89a" + b"\xff" * 20,
        b"II*\x00\x08\x00\x00\x00" + data,
        b"P6 60000 60000 255 ",
    )
    return rng.choice((*kinds, b"<svg/>", b"P5 99999999 9999999 255\n", b"\x00\x00\x01\x00" + data))


def _png_size(rng: random.Random, data: bytes) -> bytes:
    """Another size in a PNG's header, with a valid checksum."""
    if not data.startswith(b"\x89PNG"):
        return mutations.extreme(rng, data[:64]) + data[64:]
    sizes = b"".join(
        (rng.choice((0, 1, 16, 40_000, 1 << 31)) % (1 << 32)).to_bytes(4) for _ in "ij"
    )
    head = data[12:16] + rng.choice((sizes, data[16:24])) + bytes(rng.choice((data[24:29],)))
    if rng.random() < 0.3:
        head = head[:12] + bytes((rng.choice((1, 2, 8, 16)), rng.randrange(8), 0, 0, 0))
    return data[:12] + head + zlib.crc32(head).to_bytes(4) + data[33:]


def _read_picture(path: Path) -> np.ndarray:
    """Both systems' reading of an image file."""
    from cliptrans_jax.data.corpus import FolderImages
    from m2mkd_jax.data.files.folders import DirectoryFiles, FolderSource

    files = DirectoryFiles(path.parent, (path.name,))
    source = FolderSource(files, np.zeros(1, np.int32), label_names=("a",), channels=3)
    found = source[0]["image"]
    other = FolderImages(path.parent, (path.name,))[0]
    assert same(np.ascontiguousarray(found), np.ascontiguousarray(other))
    return np.ascontiguousarray(found)


def _plain_picture(path: Path, content: bytes) -> np.ndarray:
    formats = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    with Image.open(io.BytesIO(content), formats=formats) as image:
        if image.mode in ("I", "F", "I;16", "I;16B"):  # their range is not 0 to 255
            return _read_picture(path)
        return np.asarray(image.convert("RGB"))


def _image_zip() -> bytes:
    names = ("train/cat/a.jpg", "train/cat/b.png", "train/dog/c.png")
    return mutations.write_zip(zip(names, _pictures(), strict=False))


def _read_image_zip(path: Path) -> dict[str, np.ndarray]:
    from m2mkd_jax.data.files.folders import FolderSource, find_folder

    found = find_folder(str(path), "train")
    source = FolderSource(found.files, found.labels, label_names=found.label_names, channels=3)
    names = found.files.names
    labels = [found.label_names[label] for label in found.labels]
    assert labels == [name.split("/")[1] for name in names]
    return {names[i]: np.ascontiguousarray(source[i]["image"]) for i in range(len(names))}


def _plain_image_zip(path: Path, content: bytes) -> dict[str, np.ndarray]:
    suffixes = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {
            name: _plain_picture(path, archive.read(name))
            for name in archive.namelist()
            if name.startswith("train/") and name.lower().endswith(suffixes)
        }


def _is_part(found: Any, whole: Any) -> bool:
    """Whether the found pictures are among all of them. A zip's list of entries has no checksum,
    and an entry that it does not list is not there."""
    return all(name in whole and same(picture, whole[name]) for name, picture in found.items())


def pictures() -> Format:
    """Small pictures in every format that is read."""
    return Format(
        "image",
        "picture.jpg",
        _pictures(),
        (_other_kind, _png_size, _png_size),
        _read_picture,
        _plain_picture,
        checked=False,
    )


def picture_zips() -> Format:
    """A zip with two classes."""
    return Format(
        "image zip",
        "images.zip",
        (_image_zip(),),
        (mutations.zip_entries(), mutations.zip_entries(_png_size), mutations.zip_fields),
        _read_image_zip,
        _plain_image_zip,
        checked=True,
        agree=_is_part,
    )
