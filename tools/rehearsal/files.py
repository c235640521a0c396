"""Makes files of published shapes: random weights, a tokenizer, sentences with pictures, images."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from cliptrans_jax.tensors import config_json, kinds
from cliptrans_jax.towers.clip import ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.weights import write_tensors, write_torch
from common_jax.weights.table import Table, expected_tensors

PIECES = "sentencepiece.bpe.model"
# Vocabulary of both published tokenizers, including "<unk>", "<s>" and "</s>".
PUBLISHED_PIECES = 250_000
SPREAD = 0.02  # standard deviation of random weights
WORDS = ("a", "man", "woman", "dog", "child", "red", "ball", "sits", "runs", "with", "in", "street")
SPLITS = {"train": 64, "val": 8, "test_2016_flickr": 8}
SIDE = 256  # pixels of an image


def random_tensors(table: Table, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A network's tensors under their published names, random except for norm scales of 1."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("/scale"):
            return np.ones(shape, np.float32)
        numbers = rng.standard_normal(math.prod(shape), np.float32)
        numbers *= SPREAD
        return numbers.reshape(shape)

    named = expected_tensors(table, shapes)
    return {name: draw(path, shape) for name, (path, shape) in named.items()}


def write_mbart(folder: pathlib.Path, config: MBartConfig) -> None:
    """Writes mBART as `transformers` saves it, in safetensors."""
    layout = _layout("mbart")
    folder.mkdir(parents=True, exist_ok=True)
    about = config_json.mbart_hf_config(config)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = random_tensors(layout.table(config), layout.shapes(config))
    write_tensors(folder / "model.safetensors", tensors, replace=True)


def write_mclip(folder: pathlib.Path, config: MClipConfig) -> None:
    """Writes M-CLIP's text tower as it is published, in PyTorch's format."""
    layout = _layout("mclip")
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "model_type": "xlm-roberta",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.positions,
        "type_vocab_size": config.types,
        "layer_norm_eps": config.eps,
        "pad_token_id": config.pad,
        "hidden_dropout_prob": config.dropout,
        "hidden_act": config.activation,
    }
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(base, indent=2) + "\n")
    about = {
        "architectures": ["M-CLIP"],
        "modelBase": "xlm-roberta-large" if config == MClipConfig() else str(folder / "base"),
        "numDims": config.features,
        "transformerDimensions": config.width,
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = random_tensors(layout.table(config), layout.shapes(config))
    write_torch(folder / "pytorch_model.bin", tensors, replace=True)


def write_clip(folder: pathlib.Path, config: ClipVisionConfig) -> None:
    """Writes CLIP's image tower as `transformers` saves it, in PyTorch's format."""
    layout = _layout("clip_vision")
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        "hidden_act": config.activation,
        "image_size": config.image,
        "patch_size": config.patch,
        "projection_dim": config.features,
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    tensors = random_tensors(layout.table(config), layout.shapes(config))
    write_torch(folder / "pytorch_model.bin", tensors, replace=True)


def write_pieces(folders: list[pathlib.Path], count: int = PUBLISHED_PIECES) -> None:
    """Writes a SentencePiece model of `count` pieces, most of which occur in no sentence."""
    path = folders[0] / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 4),
        model_prefix=str(path),
        vocab_size=60,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    model = path.with_suffix(".model")
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    for made in (model, path.with_suffix(".vocab")):
        made.unlink()
    for number in range(len(proto.pieces), count):
        proto.pieces.add(piece=f"\u2581word{number}", score=-20.0)
    for folder in folders:
        (folder / PIECES).write_bytes(proto.SerializeToString())


def write_multi30k(root: pathlib.Path) -> None:
    """Writes English and German sentences with pictures in Multi30k's layout."""
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for folder in (root / "raw", root / "image_splits", root / "images" / split):
            folder.mkdir(parents=True, exist_ok=True)
        names = [f"{number}.jpg" for number in range(count)]
        (root / "image_splits" / f"{split}.txt").write_text("".join(f"{x}\n" for x in names))
        for language in ("en", "de"):
            lines = [" ".join(rng.choice(WORDS, 12)) for _ in names]
            (root / "raw" / f"{split}.{language}").write_text("".join(f"{x}\n" for x in lines))
        for name, picture in zip(names, _pictures(rng), strict=False):
            picture.save(root / "images" / split / name)


def write_imagenet(root: pathlib.Path, *, classes: int, per_class: int) -> None:
    """Writes images in one folder per class, like ImageNet."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(classes):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for image, picture in zip(range(per_class), _pictures(rng), strict=False):
                picture.save(folder / f"{image}.JPEG")


def _pictures(rng: np.random.Generator) -> Iterator[Image.Image]:
    while True:
        yield Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def _layout(kind: str) -> kinds.Layout:
    return kinds.KINDS[kind][0]
