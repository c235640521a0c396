"""Text features of M-CLIP: ours against transformers' XLM-R with the same projection and weights.

Ours is the program of `TextTower.encode`, which computes the features of a run: sentences are
sorted by length, in batches of 256 padded to a multiple of 8 tokens. The peer is `XLMRobertaModel`
in torch with fused attention and the same masked mean and projection, on batches of 256 in the
original order, padded to their longest sentence. Random weights, float32, forward pass only,
compiled once per length; the features are compared first. Sentences have 8 to 40 tokens, and come
in any order or sorted by length.

    pip install torch "transformers>=5.23"
    python benchmarks/mclip_features.py
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np
import timing

from cliptrans_jax.data.examples import pad
from cliptrans_jax.encoders import BUCKET, TEXT_BATCH, TextTower, by_length
from cliptrans_jax.features import encode_program
from cliptrans_jax.towers import mclip_names
from cliptrans_jax.towers.mclip import MClip, MClipConfig
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.weights import table as tables

TOLERANCE = 1e-4
BEGIN, END, FIRST_WORD = 0, 2, 10


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=10_010)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args()


def make_sentences(sizes: argparse.Namespace) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(6.0, 2.8, sizes.sentences).round(), 8, 40).astype(int)
    words = (rng.integers(FIRST_WORD, sizes.vocab, length - 2) for length in lengths)
    return [np.asarray([BEGIN, *chosen, END], np.int32) for chosen in words]


def make_ours(tower: TextTower, params) -> Callable:
    """features(sentences) as in `TextTower.encode`, compiled once per length."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    encode, params = encode_program(tower.apply_batch, mesh), jax.device_put(params)

    def features(sentences: list[np.ndarray]) -> np.ndarray:
        parts, order = [], by_length(sentences)
        with jax.set_mesh(mesh):
            for first in range(0, len(sentences), TEXT_BATCH):
                chosen = [sentences[place] for place in order[first : first + TEXT_BATCH]]
                length = -(-max(map(len, chosen)) // BUCKET) * BUCKET
                ids = pad(chosen, length, pad_id=tower.config.pad)
                batch = {"ids": ids, "_mask": np.ones(len(chosen), np.float32)}
                parts.append(encode(params, batch, np.arange(len(chosen), dtype=np.int32))[0])
        return np.concatenate(parts)[np.argsort(order)]

    return features


def make_theirs(torch, transformers, config: MClipConfig, params) -> Callable:
    """features(sentences) in torch."""
    theirs = transformers.XLMRobertaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.hidden,
        max_position_embeddings=config.positions,
        type_vocab_size=config.types,
        layer_norm_eps=config.eps,
        pad_token_id=config.pad,
        attn_implementation="sdpa",
    )
    network = transformers.XLMRobertaModel(theirs, add_pooling_layer=False).eval()
    tensors = {
        name: torch.tensor(np.array(x))
        for name, x in tables.write(mclip_names.table(config), params).items()
    }
    weight, bias = (tensors.pop(f"LinearTransformation.{part}") for part in ("weight", "bias"))
    network.load_state_dict(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    )

    def features(sentences: list[np.ndarray]) -> np.ndarray:
        parts = []
        for first in range(0, len(sentences), TEXT_BATCH):
            chosen = sentences[first : first + TEXT_BATCH]
            ids = torch.full((len(chosen), max(map(len, chosen))), config.pad)
            for row, sentence in zip(ids, chosen, strict=True):
                row[: len(sentence)] = torch.from_numpy(sentence)
            mask = (ids != config.pad).long()
            with torch.inference_mode():
                states = network(input_ids=ids, attention_mask=mask).last_hidden_state
                mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                parts.append(torch.nn.functional.linear(mean, weight, bias).numpy())
        return np.concatenate(parts)

    return features


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    torch, transformers = timing.import_torch(sizes.threads)
    config = MClipConfig(
        vocab=sizes.vocab,
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.heads,
        hidden=4 * sizes.width,
        features=sizes.width,
    )
    ids = np.full((1, 2), FIRST_WORD, np.int32)
    params = MClip(config, "float32").init(jax.random.key(0), ids, ids > 0)["params"]
    ours = make_ours(TextTower(config, params, None, "float32"), params)
    theirs = make_theirs(torch, transformers, config, params)
    sentences = make_sentences(sizes)
    orders = {"in any order": sentences, "sorted": sorted(sentences, key=len)}

    wrong = timing.check_results(ours(sentences), theirs(sentences), TOLERANCE)
    cases = {}
    for order, chosen in orders.items():
        cases[f"ours, {order}"] = lambda chosen=chosen: ours(chosen)
        cases[f"transformers, {order}"] = lambda chosen=chosen: theirs(chosen)
    times = timing.take_turns(cases, sizes.repeats)
    claims = [
        timing.compare(
            times,
            f"ours, {order}",
            f"transformers, {order}",
            claim=f"text features of M-CLIP, sentences {order}",
            target=1.0,
        )
        for order in orders
    ]
    timing.report(
        "mclip_features",
        claims,
        times=times,
        sentences=sizes.sentences,
        largest_relative_difference=wrong,
    )


if __name__ == "__main__":
    main()
