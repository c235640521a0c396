"""Files for tests/journeys.sh, and the loading of exported folders by other frameworks.

python tests/journeys_data.py FOLDER                      # pictures/ and shop/ in it
python tests/journeys_data.py --timm EXPORTED RUN PICTURES
python tests/journeys_data.py --transformers EXPORTED
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two")
COLOURS = {
    "red": "röd",
    "blue": "blå",
    "green": "grön",
    "yellow": "gul",
    "black": "svart",
    "orange": "orange",
    "purple": "lila",
    "pink": "rosa",
    "brown": "brun",
    "gray": "grå",
}
SHAPES = {"circle": "cirkel", "square": "kvadrat", "line": "linje"}
SIZES = {"small": "liten", "large": "stor", "": ""}


def write_digits(folder: pathlib.Path) -> None:
    """Writes pictures of three digits, with a folder per digit."""
    digits = load_digits()
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:100]):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def write_shop(folder: pathlib.Path) -> None:
    """Writes a table of names in two languages, and drawings of them."""
    folder.mkdir()
    rows = ["split\ten\tsv\tpicture"]
    for size, size_sv in SIZES.items():
        for colour, colour_sv in COLOURS.items():
            for shape, shape_sv in SHAPES.items():
                english = " ".join(filter(None, (size, colour, shape)))
                swedish = " ".join(filter(None, (size_sv, colour_sv, shape_sv)))
                name = f"{english.replace(' ', '_')}.png"
                draw(colour, shape, 6 if size == "small" else 14).save(folder / name)
                split = {0: "val", 1: "test"}.get(len(rows) % 9, "train")
                rows.append(f"{split}\t{english}\t{swedish}\t{name}")
    (folder / "shop.tsv").write_text("\n".join(rows) + "\n")


def draw(colour: str, shape: str, radius: int) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    box = (16 - radius, 16 - radius, 16 + radius, 16 + radius)
    brush = ImageDraw.Draw(picture)
    forms = {"circle": brush.ellipse, "square": brush.rectangle, "line": brush.line}
    forms[shape](box, fill=colour)
    return picture


def load_in_timm(exported: str, run: str, picture: str) -> None:
    """Raises AssertionError unless timm's probabilities equal those of `m2mkd_jax.load_model`."""
    import timm
    import torch

    import m2mkd_jax

    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(model)
    image = Image.open(picture)
    with torch.no_grad():
        theirs = model(timm.data.create_transform(**settings)(image)[None]).numpy()
    apply, params = m2mkd_jax.load_model(run)
    ours = np.asarray(apply(params, np.asarray(image)[None, :, :, None]))
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def load_in_transformers(exported: str) -> None:
    """Raises AssertionError unless transformers loads the folder and generates."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.MBartForConditionalGeneration.from_pretrained(exported)
    ids = model.generate(**tokenizer(["red circle"], return_tensors="pt"), max_new_tokens=8)
    text = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(text) == 1, text


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--timm", exported, run, picture]:
            load_in_timm(exported, run, picture)
        case ["--transformers", exported]:
            load_in_transformers(exported)
        case [folder]:
            write_digits(pathlib.Path(folder, "pictures"))
            write_shop(pathlib.Path(folder, "shop"))
