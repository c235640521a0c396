"""CLIPTrans' networks in numpy and float64, one example and one head at a time, using the published
tensor names.

The reference for `cliptrans_jax.models`, with none of its layouts and shortcuts.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors under a name prefix."""

    tensors: Mapping[str, np.ndarray]
    prefix: str = ""
    eps: float = 1e-5

    def __getitem__(self, name: str) -> np.ndarray:
        return np.float64(self.tensors[self.prefix + name])

    def below(self, prefix: str) -> "Weights":
        return dataclasses.replace(self, prefix=self.prefix + prefix)

    def layers(self, prefix: str) -> Iterator["Weights"]:
        """The weights of layers 0, 1, ..."""
        numbered = re.compile(re.escape(self.prefix + prefix) + r"\.(\d+)\.")
        found = {int(match[1]) for name in self.tensors if (match := numbered.match(name))}
        return (self.below(f"{prefix}.{i}.") for i in sorted(found))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        apart = x - x.mean(axis=-1, keepdims=True)
        unit = apart / np.sqrt(np.square(apart).mean(axis=-1, keepdims=True) + self.eps)
        return unit * self[f"{name}.weight"] + self[f"{name}.bias"]

    def attention(self, names, x, context, visible, heads) -> np.ndarray:
        """Attention from x to `context`; `names` are the layers of queries, keys, values and
        outputs."""
        query, key, value, out = names
        found = attend(
            self.linear(query, x),
            self.linear(key, context),
            self.linear(value, context),
            visible,
            heads,
        )
        return self.linear(out, found)


def attend(query, keys, values, visible, heads) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) v over the visible keys of each query."""
    parts = []
    for part in np.split(np.arange(query.shape[-1]), heads):
        scores = query[:, part] @ keys[:, part].T / math.sqrt(len(part))
        weights = np.where(visible, np.exp(scores - scores.max()), 0)
        parts.append(weights / weights.sum(axis=-1, keepdims=True) @ values[:, part])
    return np.concatenate(parts, axis=-1)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


# mBART and the prefix.

SELF = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
CROSS = tuple(f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out"))


def embed(model: Weights, ids) -> np.ndarray:
    table = model["shared.weight"]
    return table[ids] * math.sqrt(table.shape[1])


def mbart_encoder(model: Weights, ids, mask, heads) -> np.ndarray:
    side = model.below("encoder.")
    places = side["embed_positions.weight"][2 : 2 + len(ids)]
    x = side.norm("layernorm_embedding", embed(model, ids) + places)
    for layer in side.layers("layers"):
        y = layer.norm("self_attn_layer_norm", x)
        x = x + layer.attention(SELF, y, y, mask[None], heads)
        y = layer.norm("final_layer_norm", x)
        x = x + layer.linear("fc2", gelu(layer.linear("fc1", y)))
    return side.norm("layer_norm", x)


def mbart_decoder(model: Weights, x, visible, states, mask, heads) -> np.ndarray:
    side = model.below("decoder.")
    places = side["embed_positions.weight"][2 : 2 + len(x)]
    x = side.norm("layernorm_embedding", x + places)
    for layer in side.layers("layers"):
        y = layer.norm("self_attn_layer_norm", x)
        x = x + layer.attention(SELF, y, y, visible, heads)
        y = layer.norm("encoder_attn_layer_norm", x)
        x = x + layer.attention(CROSS, y, states, mask[None], heads)
        y = layer.norm("final_layer_norm", x)
        x = x + layer.linear("fc2", gelu(layer.linear("fc1", y)))
    return side.norm("layer_norm", x)


def cliptrans_logits(tensors, vectors, source, labels, *, heads, pad=1) -> np.ndarray:
    """Logits of one example's labels, which end in `</s>` and pads; `vectors` are its prefix."""
    mbart, count = Weights(tensors, "mbart."), len(vectors)
    model = mbart.below("model.")
    real = [label for label in labels if label != pad]
    given = [real[-1], *labels[:-1]]
    words = embed(model, given)
    x = np.concatenate([words[:1], vectors, words[1:]])
    seen = [True] * (1 + count) + [token != pad for token in given[1:]]
    visible = np.tril(np.ones((len(x), len(x)), bool)) & seen
    visible[1 : count + 1, 1 : count + 1] = True
    mask = source != pad
    states = mbart_encoder(model, source, mask, heads[0])
    hidden = mbart_decoder(model, x, visible, states, mask, heads[1])
    scored = np.concatenate([hidden[:1], hidden[1 + count :]])
    return scored @ model["shared.weight"].T + mbart["final_logits_bias"][0]


def prelu(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + weights[f"{name}.weight"] * np.minimum(x, 0)


def prefix(weights: Weights, kind: str, feature, count: int) -> np.ndarray:
    """The output of a mapping network for one feature."""
    if kind == "mlp":
        return prelu(weights, "hidden.1", weights.linear("hidden.0", feature)).reshape(count, -1)
    if kind == "hidden_mlp":
        hidden = np.maximum(weights.linear("hidden.0", feature), 0)
        return prelu(weights, "hidden.3", weights.linear("hidden.2", hidden)).reshape(count, -1)
    x = weights.linear("projector", feature).reshape(count, -1)
    layer = weights.below("transformer.layers.0.")
    rows = x @ layer["self_attn.in_proj_weight"].T + layer["self_attn.in_proj_bias"]
    attended = attend(*np.split(rows, 3, axis=-1), np.ones((count, count), bool), 2)
    x = layer.norm("norm1", x + layer.linear("self_attn.out_proj", attended))
    hidden = np.maximum(layer.linear("linear1", x), 0)
    return layer.norm("norm2", x + layer.linear("linear2", hidden))


# The towers.

BERT = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
BERT = (*BERT, "attention.output.dense")


def mclip_embeddings(weights: Weights, ids, pad) -> np.ndarray:
    table = weights.below("transformer.embeddings.")
    count, places = pad, []
    for token in ids:
        count += token != pad
        places.append(count if token != pad else pad)
    x = table["word_embeddings.weight"][ids] + table["position_embeddings.weight"][places]
    return table.norm("LayerNorm", x + table["token_type_embeddings.weight"][0])


def mclip(weights: Weights, ids, mask, *, heads, pad=1) -> np.ndarray:
    """M-CLIP's feature of one sentence."""
    x = mclip_embeddings(weights, ids, pad)
    for layer in weights.below("transformer.encoder.").layers("layer"):
        attended = layer.attention(BERT, x, x, mask[None], heads)
        x = layer.norm("attention.output.LayerNorm", x + attended)
        hidden = gelu(layer.linear("intermediate.dense", x))
        x = layer.norm("output.LayerNorm", x + layer.linear("output.dense", hidden))
    return weights.linear("LinearTransformation", x[mask].mean(axis=0))


def clip_blocks(model: Weights, x, visible, heads, activation) -> np.ndarray:
    for layer in model.below("encoder.").layers("layers"):
        y = layer.norm("layer_norm1", x)
        x = x + layer.attention(SELF, y, y, visible, heads)
        y = layer.norm("layer_norm2", x)
        x = x + layer.linear("mlp.fc2", activation(layer.linear("mlp.fc1", y)))
    return x


def clip_text(weights: Weights, ids, mask, *, heads, activation=quick_gelu) -> np.ndarray:
    """CLIP's feature of one sentence."""
    model = weights.below("text_model.")
    places = model["embeddings.position_embedding.weight"][: len(ids)]
    x = model["embeddings.token_embedding.weight"][ids] + places
    visible = np.tril(np.ones((len(ids), len(ids)), bool)) & mask
    x = model.norm("final_layer_norm", clip_blocks(model, x, visible, heads, activation))
    return weights["text_projection.weight"] @ x[list(ids).index(max(ids))]


def patches(model: Weights, image) -> list[np.ndarray]:
    """The projected patches of an image [3, I, J], without remaining pixels that fill no patch."""
    kernel = model["embeddings.patch_embedding.weight"]
    side = kernel.shape[-1]
    return [
        kernel.reshape(len(kernel), -1) @ image[:, i : i + side, j : j + side].ravel()
        for i in range(0, image.shape[1] - side + 1, side)
        for j in range(0, image.shape[2] - side + 1, side)
    ]


def clip_vision(weights: Weights, image, *, heads, activation=quick_gelu) -> np.ndarray:
    """CLIP's feature of one image [3, I, J]."""
    model = weights.below("vision_model.")
    x = np.stack([model["embeddings.class_embedding"], *patches(model, image)])
    x = model.norm("pre_layrnorm", x + model["embeddings.position_embedding.weight"])
    x = clip_blocks(model, x, np.ones((len(x), len(x)), bool), heads, activation)
    return weights["visual_projection.weight"] @ model.norm("post_layernorm", x[0])


def siglip_text(weights: Weights, ids, *, heads, pad) -> np.ndarray:
    """SigLIP's feature of one sentence."""
    model = weights.below("text_model.")
    places = model["embeddings.position_embedding.weight"]
    ids = [*ids, *[pad] * (len(places) - len(ids))]
    x = model["embeddings.token_embedding.weight"][ids] + places
    x = clip_blocks(model, x, np.ones((len(x), len(x)), bool), heads, gelu_tanh)
    return model.linear("head", model.norm("final_layer_norm", x)[-1])


def siglip_vision(weights: Weights, image, *, heads) -> np.ndarray:
    """SigLIP's feature of one image [3, I, J]."""
    model = weights.below("vision_model.")
    x = np.stack(patches(model, image)) + model["embeddings.patch_embedding.bias"]
    x = x + model["embeddings.position_embedding.weight"]
    x = clip_blocks(model, x, np.ones((len(x), len(x)), bool), heads, gelu_tanh)
    x, head = model.norm("post_layernorm", x), model.below("head.")
    weight, bias = (np.split(head[f"attention.in_proj_{name}"], 3) for name in ("weight", "bias"))
    query, keys, values = (
        y @ w.T + b for y, w, b in zip((head["probe"][0], x, x), weight, bias, strict=True)
    )
    attended = attend(query, keys, values, np.ones((1, len(x)), bool), heads)
    y = head.linear("attention.out_proj", attended)[0]
    return y + head.linear("mlp.fc2", gelu_tanh(head.linear("mlp.fc1", head.norm("layernorm", y))))


def convolution(x, kernel, stride) -> np.ndarray:
    """A torch convolution of x [C, I, J] with kernel [out, C, side, side], position by position."""
    side = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    rows, columns = ((size - side) // stride + 1 for size in x.shape[1:])
    out = np.empty((len(kernel), rows, columns))
    for i in range(rows):
        for j in range(columns):
            seen = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            out[:, i, j] = kernel.reshape(len(kernel), -1) @ seen.ravel()
    return out


def average(x, side) -> np.ndarray:
    channels, rows, columns = x.shape
    return x.reshape(channels, rows // side, side, columns // side, side).mean(axis=(2, 4))


def conv_norm(weights: Weights, conv: str, norm: str, x, stride=1) -> np.ndarray:
    x = convolution(x, weights[f"{conv}.weight"], stride)
    gain, bias, mean, var = (
        weights[f"{norm}.{part}"][:, None, None]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return gain * (x - mean) / np.sqrt(var + weights.eps) + bias


def bottleneck(block: Weights, x, stride, first) -> np.ndarray:
    y = np.maximum(conv_norm(block, "conv1", "bn1", x), 0)
    y = np.maximum(conv_norm(block, "conv2", "bn2", y), 0)
    y = conv_norm(block, "conv3", "bn3", average(y, stride))
    if first:
        x = conv_norm(block, "downsample.0", "downsample.1", average(x, stride))
    return np.maximum(x + y, 0)


def resnet(weights: Weights, image) -> np.ndarray:
    """The feature of one image [3, I, J] in OpenAI's ResNet."""
    weights, x = weights.below("visual."), image
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = np.maximum(conv_norm(weights, f"conv{i}", f"bn{i}", x, stride), 0)
    x = average(x, 2)
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(weights.layers(f"layer{stage}")):
            x = bottleneck(block, x, 2 if stage > 1 and i == 0 else 1, i == 0)
    pool, places = weights.below("attnpool."), x.reshape(len(x), -1).T
    tokens = np.concatenate([places.mean(axis=0, keepdims=True), places])
    tokens = tokens + pool["positional_embedding"]
    names = tuple(f"{part}_proj" for part in "qkvc")
    visible = np.ones((1, len(tokens)), bool)
    return pool.attention(names, tokens[:1], tokens, visible, tokens.shape[1] // 64)[0]
