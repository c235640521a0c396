"""m2mKD's V-MoE block against the same block in plain torch, on the same weights.

The original's mixture of experts is fastmoe's, whose kernels need a GPU. The peer does the same
with torch's own ops: a token's two largest gate logits, a softmax over these, tokens sorted by
expert, each expert's matrix products on its tokens, and the weighted sum. No token is dropped.
Block: norm, attention, norm, experts, with residuals; forward and backward pass, gradients of input
and parameters, float32. All outputs and gradients are compared first.

    pip install torch "transformers>=5.23"
    python benchmarks/vmoe_torch.py
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import timing
from flax import traverse_util
from vmoe_block import NORM_EPS, block_parser, make_block

from m2mkd_jax.moe.config import MoeConfig

TOLERANCE = 1e-4


def plain(torch: Any, p: Mapping[str, Any], heads: int, chosen: int) -> Callable[[Any], Any]:
    """The block in torch; `p` has our parameters by path."""
    f = torch.nn.functional

    def norm(x: Any, name: str) -> Any:
        return f.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], NORM_EPS)

    def attention(x: Any) -> Any:
        batch, tokens, width = x.shape
        kernel, bias = p["attention/qkv/kernel"], p["attention/qkv/bias"]
        qkv = torch.addmm(bias.reshape(-1), x.reshape(-1, width), kernel.reshape(width, -1))
        qkv = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = f.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(-1, width)
        kernel, bias = p["attention/out/kernel"], p["attention/out/bias"]
        return torch.addmm(bias, y, kernel.reshape(width, width)).view(batch, tokens, width)

    def expert(x: Any, e: int) -> Any:
        hidden = f.gelu(torch.addmm(p["moe/up_bias"][e], x, p["moe/up"][e]))
        return torch.addmm(p["moe/down_bias"][e], hidden, p["moe/down"][e])

    def mixture(x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        logits = torch.addmm(p["moe/router/bias"], rows, p["moe/router/kernel"])
        values, experts = torch.topk(logits, chosen)
        order = torch.argsort(experts.reshape(-1), stable=True)
        counts = torch.bincount(experts.reshape(-1), minlength=logits.shape[1]).tolist()
        parts = rows[order // chosen].split(counts)
        answers = torch.cat([expert(part, e) for e, part in enumerate(parts)])
        # From expert order back to token order.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        answers = answers[back].view(len(rows), chosen, -1)
        return torch.bmm(torch.softmax(values, -1)[:, None], answers).view(x.shape)

    def block(x: Any) -> Any:
        x = x + attention(norm(x, "norm1"))
        return x + mixture(norm(x, "norm2"))

    return block


def main() -> None:
    sizes = block_parser(__doc__).parse_args()
    timing.start(sizes.threads, keep_memory=True)
    torch, _ = timing.import_torch(sizes.threads)
    moe = MoeConfig(experts=sizes.experts, expert_init="fan_in")
    network = make_block(sizes, moe)
    x, dy = jax.random.normal(jax.random.key(0), (2, sizes.examples, sizes.tokens, sizes.width))
    params = network.init(jax.random.key(1), x, True)["params"]
    # Initial gates are nearly uniform; scaled up, they vary between tokens like trained gates.
    params["moe"]["router"]["kernel"] *= 50

    # Both return the output and the gradients by name.
    @jax.jit
    def ours(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        y, vjp = jax.vjp(lambda p, x: network.apply({"params": p}, x, True), params, x)
        by_params, by_x = vjp(dy)
        return traverse_util.flatten_dict(by_params, sep="/") | {"x": by_x, "y": y}

    flat = traverse_util.flatten_dict(params, sep="/")
    inputs = {name: torch.tensor(np.asarray(v)) for name, v in (flat | {"x": x}).items()}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    by_y, block = torch.tensor(np.asarray(dy)), plain(torch, inputs, sizes.heads, moe.chosen)

    def theirs() -> dict[str, Any]:
        y = block(inputs["x"])
        gradients = torch.autograd.grad(y, [*inputs.values()], by_y)
        return dict(zip(inputs, gradients, strict=True)) | {"y": y.detach()}

    wrong = timing.check_results(ours(params, x), theirs(), TOLERANCE)

    times = timing.take_turns({"ours": lambda: ours(params, x), "torch": theirs}, sizes.repeats)
    claim = timing.compare(times, "ours", "torch", claim="V-MoE block of m2mKD", target=1.0)
    timing.report("vmoe_torch", [claim], times=times, largest_relative_difference=wrong)


if __name__ == "__main__":
    main()
