"""A training step of a dense ViT against three in torch: plain, compiled, and with transformers.

Forward pass, cross entropy, backward pass and AdamW in float32, without stochastic depth, with the
same weights, images and settings. Ours is the step of a run, which also computes the gradient norm,
checks for non-finite values and sums metrics. The plain step is written out below, with torch's
fused attention and fused AdamW. The compiled one is the same under `torch.compile`, which needs a
C++ compiler. The third is `ViTForImageClassification`, also with fused attention and fused AdamW.
The losses of the first three steps are compared first.

    pip install torch "transformers>=5.23"
    python benchmarks/vit_step.py
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timing

from common_jax.optim import OptimConfig
from common_jax.weights import table as tables
from m2mkd_jax import losses
from m2mkd_jax.models import vit, vit_names
from m2mkd_jax.models.encoder import Interface

OPTIM = OptimConfig(steps=1000, schedule="constant", lr=1e-4, lr_per=None, decay_all=True)
TOLERANCE = 1e-4


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--variant", choices=sorted(vit.VARIANTS), default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--labels", type=int, default=1000)
    return parser.parse_args()


def plain(torch: Any, config: vit.ViTConfig, weights: Mapping[str, np.ndarray]) -> Callable:
    """loss(images, labels) of a ViT in plain torch, and its parameters."""
    f = torch.nn.functional
    p = {name: torch.tensor(x).requires_grad_() for name, x in weights.items()}
    depth, width = sum(config.depths), config.width

    def linear(x: Any, name: str) -> Any:
        return f.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return f.layer_norm(x, (width,), weight, bias, config.norm_eps)

    def attention(x: Any, name: str) -> Any:
        batch, tokens, _ = x.shape
        qkv = linear(x, f"{name}.qkv").view(batch, tokens, 3, config.heads, -1)
        heads = f.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return linear(heads.transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    def loss(images: Any, labels: Any) -> Any:
        kernel, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
        x = f.conv2d(images, kernel, bias, stride=config.patch).flatten(2).transpose(1, 2)
        x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]
        for i in range(depth):
            x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
            y = f.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
            x = x + linear(y, f"blocks.{i}.mlp.fc2")
        return f.cross_entropy(linear(norm(x, "norm")[:, 0], "head"), labels)

    return loss, list(p.values())


NAMES = {
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "blocks.": "vit.layers.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "head.": "classifier.",
}


def published(
    transformers: Any, torch: Any, config: vit.ViTConfig, interface: Interface, weights: Mapping
) -> Callable:
    """The same for transformers' `ViTForImageClassification`."""
    theirs = transformers.ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=sum(config.depths),
        num_attention_heads=config.heads,
        intermediate_size=config.encoder.hidden,
        layer_norm_eps=config.norm_eps,
        image_size=interface.image_size,
        patch_size=config.patch,
        qkv_bias=config.qkv_bias,
        num_labels=interface.labels,
        attn_implementation="sdpa",
    )
    network = transformers.ViTForImageClassification(theirs)
    state = {}
    for name, x in weights.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if name.startswith("norm."):
            name = f"vit.layer{name}"
        if "attn.qkv" in name:
            parts = zip("qkv", np.split(x, 3), strict=True)
            state |= {name.replace("attn.qkv", f"attention.{q}_proj"): part for q, part in parts}
        else:
            state[name] = x
    network.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    network.train()
    assert theirs.hidden_dropout_prob == theirs.attention_probs_dropout_prob == 0

    def loss(images: Any, labels: Any) -> Any:
        return network(pixel_values=images, labels=labels).loss

    return loss, list(network.parameters())


def make_batch(interface: Interface, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    side, labels = interface.image_size, interface.labels
    return {
        "image": rng.normal(size=(size, side, side, 3)).astype("float32"),
        "label": rng.integers(labels, size=size).astype("int32"),
    }


def make_step(config: vit.ViTConfig, interface: Interface, batch: Mapping) -> timing.Training:
    """The step of a run, with its parameters under "network"."""
    network = vit.build(config, interface)

    def loss(params, helpers, batch, rngs, step):
        del helpers, step
        logits, _ = network.apply(params["network"], batch["image"], train=True, rngs=rngs)
        return losses.smoothed_cross_entropy(logits, batch["label"], 0.0), {}

    def init(key):
        return {"network": network.init(key)}

    return timing.Training(timing.make_task(loss, init, vit.PARTITION_RULES, batch), OPTIM, batch)


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    torch, transformers = timing.import_torch(sizes.threads)
    config, image_size = vit.variant(sizes.variant)
    interface = Interface(image_size, 3, sizes.labels)
    batch = make_batch(interface, sizes.batch)
    ours = make_step(config, interface, batch)
    weights = tables.write(
        vit_names.network_table(config.depths, heads=config.heads), ours.state.params["network"]
    )
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(batch["label"]).long()
    compiled, parameters = plain(torch, config, weights)
    peers = {
        "torch": plain(torch, config, weights),
        "torch.compile": (torch.compile(compiled), parameters),
        "transformers": published(transformers, torch, config, interface, weights),
    }
    cases = {"ours": ours}
    cases |= {
        name: timing.torch_step(torch, OPTIM, *peer, images, labels) for name, peer in peers.items()
    }
    wrong = timing.check_losses(cases, TOLERANCE)
    times = timing.take_turns(cases, sizes.repeats)
    claims = [
        timing.compare(times, "ours", name, claim="training step of a dense ViT", target=1.0)
        for name in peers
    ]
    print(f"{sizes.variant}, {sizes.batch} images of {image_size} pixels, {sizes.threads} threads")
    timing.report(
        "vit_step",
        claims,
        times=times,
        variant=sizes.variant,
        batch=sizes.batch,
        largest_difference_of_losses=wrong,
        compile_seconds=ours.compile_seconds,
    )


if __name__ == "__main__":
    main()
