"""Makes a corpus of Tux Paint's stamps: pictures, each with a sentence in many languages.

    apt-get download tuxpaint-stamps-default
    dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python tools/prepare_stamps.py stamps data/stamps

Writes OUT/stamps.tsv, with the columns split, picture and one per language, and OUT/images/. Train
with --config.data.source=table --config.data.path=OUT/stamps.tsv.

A stamp is a PNG or SVG with a text file of the same name: the English sentence, then lines such as
"de.utf8=Ein Frosch.". All stamps of the same thing are in one split: those with the same English
sentence, or with file names that differ only in numbers, such as frog.png and frog-1.png. A hash of
the seed and the thing chooses the split: about 70 % train, 10 % val, 20 % test.

--with-emoji adds OpenMoji's pictures and names (14 languages) to the training split, except those
that name a thing in the other splits.

Each stamp is either under the GPL or in the public domain: see the package's notice,
usr/share/doc/tuxpaint-stamps-default/copyright, before you publish any of them or a model.
"""

import argparse
import collections
import dataclasses
import io
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from cliptrans_jax.data import emoji_set
from common_jax.commands.arguments import count
from common_jax.inputs.grouping import Groups
from common_jax.inputs.texts import read_lines
from common_jax.signals import ends_quietly
from common_jax.workdir import check_output, describe_error

# Last digit of a thing's hash -> split; all other digits are train.
SPLITS = {7: "val", 8: "test", 9: "test"}
TRANSLATION = re.compile(r"(?P<language>[\w@]+)\.utf8=(?P<text>.*)")
NUMBER = re.compile(r"[-_ ]?\d+$")
LANGUAGES = {"zh_cn": "zh"}  # codes in the text files -> codes in the corpus


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture with its sentences.

    Attributes:
      key: path in the image folder, without suffix.
      picture: the picture, of any size, on white.
      texts: sentence by language.
      thing: what it shows; all examples of a thing share a split.
    """

    key: str
    picture: Image.Image
    texts: Mapping[str, str]
    thing: str


def read_texts(path: Path) -> dict[str, str]:
    """Returns the sentences of a stamp's text file by language."""
    first, *rest = read_lines(path) or ("",)
    texts = {"en": first}
    for match in filter(None, map(TRANSLATION.fullmatch, rest)):
        code = match["language"].lower()
        texts[LANGUAGES.get(code, code)] = match["text"].strip()
    # Where nobody has translated a sentence, some files repeat the English one.
    return {code: text for code, text in texts.items() if text and (code == "en" or text != first)}


def plain_name(sentence: str) -> str:
    """Returns the name of a thing: its English sentence without article, case and punctuation."""
    words = re.findall(r"\w+", sentence.lower())
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)


def things_of(stamps: Mapping[str, str]) -> dict[str, str]:
    """Returns the thing of each stamp; `stamps` maps paths without suffix to English sentences."""
    found = Groups()
    for path, sentence in stamps.items():
        name = path.rpartition("/")[2].lower()
        stem = "/" + (NUMBER.sub("", name) or name)
        found.join(stem, plain_name(sentence))
    return {path: found.name(plain_name(sentence)) for path, sentence in stamps.items()}


def split_of(thing: str, seed: int) -> str:
    """Returns the split of a thing."""
    return SPLITS.get(zlib.crc32(f"{seed}:{thing}".encode()) % 10, "train")


def draw(path: Path, size: int) -> Image.Image:
    """Returns a PNG or SVG as a square of size x size pixels, on white."""
    content = path.read_bytes()
    if path.suffix == ".svg":
        import resvg_py

        drawing = content.decode()
        content = bytes(
            resvg_py.svg_to_bytes(svg_string=drawing, width=4 * size, skip_system_fonts=True)
        )
    picture = Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    corner = ((size - picture.width) // 2, (size - picture.height) // 2)
    square.paste(picture, corner, mask=picture)
    return square


def read_stamps(folder: Path, size: int) -> Iterator[Example]:
    """Yields the stamps below a folder, sorted by path.

    Raises:
      FileNotFoundError: there are none.
    """
    found = {}
    for text in sorted(folder.rglob("*.txt")):
        pictures = [text.with_suffix(suffix) for suffix in (".png", ".svg")]
        picture = next((path for path in pictures if path.is_file()), None)
        if picture is not None and (texts := read_texts(text)):
            found[str(text.relative_to(folder).with_suffix(""))] = picture, texts
    if not found:
        raise FileNotFoundError(
            f"{folder} has no stamps (NAME.png or NAME.svg with NAME.txt); unpack "
            "tuxpaint-stamps-default with dpkg-deb -x and give that folder"
        )
    things = things_of({path: texts.get("en", "") for path, (_, texts) in found.items()})
    for path, (file, texts) in found.items():
        try:
            picture = draw(file, size)
        except (OSError, ValueError) as error:
            print(f"skipped {file}, which cannot be drawn: {error}", file=sys.stderr)
            continue
        yield Example(path.partition("stamps/")[2] or path, picture, texts, things[path])


def read_emoji(size: int) -> Iterator[Example]:
    """Yields the emoji with their names in all of their languages."""
    for split in ("train", "val", "test"):  # all emoji
        corpus = emoji_set.load_emoji(split, emoji_set.LANGUAGES, size=size)
        for place, emoji in enumerate(corpus.keys):
            texts = {code: names[place] for code, names in corpus.texts.items()}
            key = "emoji/" + "-".join(f"{ord(character):x}" for character in emoji)
            picture = Image.fromarray(corpus.require_images()[place])
            yield Example(key, picture, texts, plain_name(texts["en"]))


def write_corpus(rows: Sequence[tuple[str, Example]], out: Path) -> str:
    """Writes the pictures and the table of (split, example); returns a summary."""
    counts = collections.Counter(code for _, example in rows for code in example.texts)
    languages = sorted(counts, key=lambda code: (-counts[code], code))
    lines = ["\t".join(("split", "picture", *languages))]
    for split, example in rows:
        path = out / "images" / f"{example.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        example.picture.save(path)
        texts = (example.texts.get(code, "").replace("\t", " ") for code in languages)
        lines.append("\t".join((split, f"{example.key}.png", *texts)))
    (out / "stamps.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    splits = collections.Counter(split for split, _ in rows)
    return (
        f"{out / 'stamps.tsv'}: {', '.join(f'{n} {split}' for split, n in splits.items())}\n"
        f"sentences: {', '.join(f'{code} {counts[code]}' for code in languages)}"
    )


@ends_quietly
def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0 once the corpus is written, 2 if it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder that the package was unpacked to")
    parser.add_argument("out", type=Path, help="folder for the corpus, created if needed")
    parser.add_argument("--size", type=count, default=64, help="side of the pictures (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default 0)")
    parser.add_argument("--with-emoji", action="store_true", help="add emoji to the train split")
    args = parser.parse_args(argv)
    try:
        check_output("OUT", args.out)
        stamps = [
            (split_of(example.thing, args.seed), example)
            for example in read_stamps(args.folder, args.size)
        ]
        outside = {plain_name(one.texts.get("en", "")) for split, one in stamps if split != "train"}
        emoji = read_emoji(args.size) if args.with_emoji else ()
        rows = stamps + [("train", one) for one in emoji if one.thing not in outside]
        print(write_corpus(rows, args.out))
    except (ValueError, OSError) as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
