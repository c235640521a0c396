"""CLIPTrans runs small enough for tests: coloured shapes in Multi30k's layout, and networks of
width 16."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw
from tiny import fill

from cliptrans_jax.config import ClipConfig, Config, Recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.tokenizers.framing import BOS, EOS, PAD, FramedTokenizer
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.runs import contrastive
from cliptrans_jax.runs.run_tokenizer import save_tokenizer, train_tokenizer
from cliptrans_jax.towers.clip import ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.checkpoint import Checkpoints
from common_jax.config import unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig
from common_jax.step import init_state
from common_jax.workdir import write_json

COLOURS = {"red": "rotes", "green": "grünes", "blue": "blaues", "pink": "rosa", "grey": "graues"}
SHAPES = {"square": "Quadrat", "circle": "Rund", "cross": "Kreuz", "bar": "Band"}
PLACES = {"": "", " above": " oben"}
TEST = "test_2016_flickr"
SPLITS = {"train": 24, "val": 6, TEST: 5}
SIDE = 20  # side of a picture in pixels

VOCAB, FEATURES, PREFIX = 300, 8, 4
OPTIM = OptimConfig(
    steps=6,
    batch=8,
    lr=5e-3,
    lr_per=None,
    schedule="constant",
    warmup_epochs=0,
    weight_decay=0.0,
    b2=0.98,
)
MBART = MBartConfig(
    vocab=VOCAB,
    width=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_heads=2,
    decoder_heads=2,
    encoder_hidden=32,
    decoder_hidden=32,
    positions=32,
)
# All sizes differ, so that no weight layout can mix them up.
UNEVEN = MBartConfig(
    vocab=40,
    width=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_heads=4,
    decoder_heads=2,
    encoder_hidden=24,
    decoder_hidden=20,
    positions=12,
)


def write_corpus(root: pathlib.Path) -> pathlib.Path:
    """Writes a folder like Multi30k's, with English, German and pictures."""
    examples = [
        (f"a {colour} {shape}{place}", f"ein {COLOURS[colour]} {SHAPES[shape]}{PLACES[place]}")
        for place in PLACES
        for shape in SHAPES
        for colour in COLOURS
    ]
    order, first = np.random.default_rng(0).permutation(len(examples)), 0
    for folder in ("raw", "image_splits"):
        (root / folder).mkdir(parents=True)
    for split, count in SPLITS.items():
        chosen = [examples[i] for i in order[first : first + count]]
        first += count
        for language, texts in zip(("en", "de"), zip(*chosen, strict=True), strict=True):
            (root / "raw" / f"{split}.{language}").write_text("".join(f"{x}\n" for x in texts))
        names = [f"{english.replace(' ', '_')}.png" for english, _ in chosen]
        (root / "image_splits" / f"{split}.txt").write_text("".join(f"{x}\n" for x in names))
        (root / "images" / split).mkdir(parents=True)
        for name, (english, _) in zip(names, chosen, strict=True):
            draw(english).save(root / "images" / split / name)
    return root


def draw(english: str) -> Image.Image:
    """The picture of a sentence."""
    _, colour, shape, *place = english.split()
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    up = 3 if place else 7
    box = (5, up, 5 + SIDE // 2, up + SIDE // 2)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "cross":
        pen.line(box, fill=colour, width=3)
        pen.line((box[0], box[3], box[2], box[1]), fill=colour, width=3)
    else:
        low = box[3] if shape == "square" else up + 3
        pen.rectangle((*box[:3], low), fill=colour)
    return picture


def read_split(root: pathlib.Path, split: str) -> tuple[list[str], list[str], list[np.ndarray]]:
    """A split's English, German and pictures."""
    english, german = (
        (root / "raw" / f"{split}.{code}").read_text().splitlines() for code in ("en", "de")
    )
    return english, german, [np.asarray(draw(text)) for text in english]


def tiny_config(stage: str, root: pathlib.Path | None) -> Config:
    """A run of two epochs that logs, evaluates and saves after each; without `root`, on emoji."""
    source = {"source": "multi30k", "path": str(root), "test_split": TEST}
    return Config(
        stage=stage,
        data=DataConfig() if root is None else DataConfig(**source),
        tokenizer=TokenizerConfig(vocab=VOCAB, max_length=20),
        clip=ClipConfig(
            text=MClipConfig(
                vocab=VOCAB,
                width=16,
                layers=1,
                heads=2,
                hidden=32,
                positions=32,
                features=FEATURES,
            ),
            image=ClipVisionConfig(
                image=16, patch=8, width=16, layers=1, heads=2, hidden=32, features=FEATURES
            ),
        ),
        model=ModelConfig(mbart=MBART, mapper=MapperConfig(prefix=PREFIX, features=FEATURES)),
        batching=BatchingConfig(bucket=20),
        decode=DecodeConfig(beams=2, max_new_tokens=8, batch=8, bucket=20, growth=1),
        optim=OPTIM,
        mesh=MeshConfig(data=1),
        run=RunConfig(log_every=1, best="val/bleu", compilation_cache=None),
    )


def tiny_pipeline(root: pathlib.Path) -> Config:
    """Stages "clip", "caption" and "translate" of such a run."""
    config = tiny_config("pipeline", root)
    stages = ("clip", "caption", "translate")
    return dataclasses.replace(config, recipes=dict.fromkeys(stages, Recipe(config.optim)))


def write_run(workdir: epath.Path, config: Config) -> None:
    """A workdir as a run leaves it after its first step, with distinct numbers in all
    parameters."""
    settings = unfreeze(config).to_dict()
    save_tokenizer(train_tokenizer(config, workdir)[1], workdir)
    write_json(workdir / "config.json", settings)
    towers = functools.partial(contrastive.init, config)
    init = towers if config.stage == "clip" else Translator(config.model).init

    def state(params):
        made = init_state(params, config.optim, trainable=".*", metrics={})
        return made.replace(step=made.step + 1)  # as in the name of the folder it is saved in

    checkpoints = Checkpoints(workdir, keep=1, best=None)
    checkpoints.save(jax.jit(state)(fill(init)), step=1, config=settings, metrics=None)
    checkpoints.close()


ENGLISH, GERMAN = 57, 58  # language codes of number_tokenizer


def number_tokenizer(*, limit: int) -> FramedTokenizer:
    """A tokenizer whose words are numbers: "7" is token 7."""
    return FramedTokenizer(
        cut=lambda texts: [[int(word) for word in text.split()] for text in texts],
        join=lambda ids: " ".join(map(str, ids)),
        definition=lambda: b"words are ids",
        vocab=60,
        language_ids={"en": ENGLISH, "de": GERMAN},
        special=frozenset({BOS, PAD, EOS, ENGLISH, GERMAN}),
        limit=limit,
    )
