"""m2mKD's ViT and V-MoE in plain numpy, from a state dict with the original's names.

The reference for both the networks and the converter: it shares no code with either.
"""

from collections.abc import Mapping

import numpy as np
from scipy.special import erf, softmax

STITCH_EPS = 1e-5  # the default of the original's framework, regardless of the encoder's epsilon
CHOSEN = 2

State = Mapping[str, np.ndarray]


def run(state: State, x: np.ndarray, *, heads: int, eps: float) -> tuple[np.ndarray, list]:
    """The output of a network or stage for images (B, I, J, channels) or tokens (B, T, D), and the
    tokens after each block."""
    if "cls_token" in state:
        x = embed(state, x)
    blocks = []
    while block := below(state, f"blocks.{len(blocks)}."):
        x = run_block(block, x, heads=heads, eps=eps)
        blocks.append(x)
    if "head.weight" in state:
        x = linear(state, "head", norm(state, "norm", x, eps)[:, 0])
    return x, blocks


def below(state: State, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)}


def linear(state: State, name: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def norm(state: State, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def embed(state: State, images: np.ndarray) -> np.ndarray:
    kernel = state["patch_embed.proj.weight"]  # [D, channels, p, p]
    side, (batch, rows, columns, _) = kernel.shape[-1], images.shape
    patches = [
        np.tensordot(images[:, i : i + side, j : j + side], kernel, ((1, 2, 3), (2, 3, 1)))
        for i in range(0, rows, side)
        for j in range(0, columns, side)
    ]
    patches = np.stack(patches, axis=1) + state["patch_embed.proj.bias"]
    first = np.broadcast_to(state["cls_token"], (batch, 1, len(kernel)))
    return np.concatenate([first, patches], axis=1) + state["pos_embed"]


def run_block(state: State, x: np.ndarray, *, heads: int, eps: float) -> np.ndarray:
    if "pre_stitch.fc.weight" in state:
        x = linear(state, "pre_stitch.fc", norm(state, "pre_stitch.ln", x, STITCH_EPS))
    x = x + attend(state, norm(state, "norm1", x, eps), heads)
    y = norm(state, "norm2", x, eps)
    x = x + (mlp(state, "mlp.fc1", "mlp.fc2", y) if "mlp.fc1.weight" in state else mix(state, y))
    if "post_stitch.fc.weight" in state:
        x = linear(state, "post_stitch.fc", norm(state, "post_stitch.ln", x, STITCH_EPS))
    return x


def attend(state: State, x: np.ndarray, heads: int) -> np.ndarray:
    batch, count, width = x.shape
    parts = linear(state, "attn.qkv", x).reshape(batch, count, 3, heads, width // heads)
    query, key, value = parts.transpose(2, 0, 3, 1, 4)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(width // heads)
    y = (softmax(scores, axis=-1) @ value).swapaxes(1, 2)
    return linear(state, "attn.proj", y.reshape(batch, count, width))


def mlp(state: State, first: str, second: str, x: np.ndarray) -> np.ndarray:
    return linear(state, second, gelu(linear(state, first, x)))


def mix(state: State, x: np.ndarray) -> np.ndarray:
    """For each token: its largest logits, a softmax over only these, those experts' outputs."""
    y, logits = np.zeros(x.shape), linear(state, "moe.gate.gate", x)
    for place in np.ndindex(*x.shape[:2]):
        best = np.argsort(-logits[place])[:CHOSEN]
        for e, weight in zip(best, softmax(logits[place][best]), strict=True):
            expert = {name: a[0] for name, a in below(state, f"moe.experts.{e}.").items()}
            y[place] += weight * mlp(expert, "htoh4", "h4toh", x[place])
    return y
