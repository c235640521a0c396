"""The training loss of a published NAC in torch, for `nac_step.py`.

The plain form computes it like the original: keys and values of every token for every receiver and,
in every iteration, distances and affinities that are normalised before a softmax. The rearranged
form computes the same result like ours: no keys and values of tokens, distances once per step, and
no normalisation, which the softmax cancels. Parameters have the original's names. Random draws are
passed in, keyed by the paths at which `m2mkd_jax.nac.layers.draw` looks them up.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from m2mkd_jax.nac.kernel import EPS, TINY
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.tokenizer import NORM_EPS, PRESETS

SETS = ("input", "mediator", "output")
GRAPH, TRUNK = "latent_graphs.0", "input_tokenizer.backbone"


def make_loss(
    torch: Any,
    config: NacConfig,
    weights: Mapping[str, np.ndarray],
    *,
    drop_path: float,
    rearranged: bool,
) -> tuple[Callable, list]:
    """loss(images, targets, noise) for channels-last images, and its parameters."""
    f = torch.nn.functional
    p = {name: torch.tensor(x).requires_grad_() for name, x in weights.items()}
    root = math.sqrt(config.head_width)

    def linear(x: Any, name: str) -> Any:
        return f.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(x: Any, name: str, eps: float = 1e-5) -> Any:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return f.layer_norm(x, weight.shape, weight, bias, eps)

    def scales(codes: Any, name: str) -> Any:
        x = f.linear(codes, p[f"{name}.scale.weight"])
        return 1 + p[f"{name}.scale_gain"] * f.layer_norm(x, x.shape[-1:])

    def coded(x: Any, codes: Any, name: str) -> Any:
        """A code-conditioned layer; those for queries, keys and values have no bias."""
        bias = p.get(f"{name}.native_bias")
        return f.linear(x * scales(codes, name), p[f"{name}.native_weight"], bias)

    def split(x: Any) -> Any:
        return x.unflatten(-1, (config.heads, -1))

    def conv(x: Any, name: str, **settings: int) -> Any:
        x = x.permute(0, 3, 1, 2)
        return f.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **settings).permute(0, 2, 3, 1)

    def tokenize(x: Any) -> Any:
        for stage, width in enumerate(config.tokenizer.widths):
            name = f"{TRUNK}.downsample_layers.{stage}"
            if stage == 0:
                x = conv(x, f"{name}.0", stride=config.tokenizer.stem)
                x = norm(x, f"{name}.1", NORM_EPS)
            else:
                x = conv(norm(x, f"{name}.0", NORM_EPS), f"{name}.1", stride=2)
            for i in range(PRESETS[config.tokenizer.preset][stage]):
                name = f"{TRUNK}.stages.{stage}.{i}"
                y = conv(x, f"{name}.dwconv", padding=3, groups=width)
                y = f.gelu(linear(norm(y, f"{name}.norm", NORM_EPS), f"{name}.pwconv1"))
                x = x + p[f"{name}.gamma"] * linear(y, f"{name}.pwconv2")
        grid = p["input_tokenizer.positional_grid.grid"].permute(1, 2, 0)
        return torch.cat([x, grid.expand(len(x), -1, -1, -1)], -1).flatten(1, 2)

    def add_noise(codes: Any, u: Any) -> Any:
        return codes + config.code_noise * codes.detach().abs() * (2 * u - 1)

    def seed(codes: Any, normal: Any) -> Any:
        codes = norm(codes, f"{GRAPH}.latent_seeder.layernorm")
        log_variance = linear(codes, f"{GRAPH}.latent_seeder.code_to_state_logvar")
        mean = linear(codes, f"{GRAPH}.latent_seeder.code_to_state_mu")
        return mean + torch.exp(0.5 * log_variance) * normal

    def ffn(x: Any, codes: Any, name: str) -> Any:
        x, gate = coded(norm(x, f"{name}.layernorm"), codes, f"{name}.ffn.0").chunk(2, -1)
        return p[f"{name}.layer_scale.gamma"] * coded(x * f.gelu(gate), codes, f"{name}.ffn.2")

    def leave(pooled: Any, codes: Any, name: str) -> Any:
        branch = coded(pooled.flatten(2), codes, f"{name}.exit_layer")
        return p[f"{name}.layer_scale.gamma"] * branch

    # The read-in's attention, from queries to tokens.

    def pool_plainly(query: Any, tokens: Any, codes: Any, key: str, value: str) -> Any:
        """Every receiver has its own keys and values."""
        keys, values = (split(coded(tokens[:, :, None], codes, name)) for name in (key, value))
        weights = (torch.einsum("bthk,bsthk->bhts", query, keys) / root).softmax(-1)
        return torch.einsum("bhts,bsthk->bthk", weights, values)

    def pool_rearranged(query: Any, tokens: Any, codes: Any, key: str, value: str) -> Any:
        """See `m2mkd_jax.nac.read_in.pool_tokens`."""
        by_head = [p[f"{x}.native_weight"].unflatten(0, (config.heads, -1)) for x in (key, value)]
        rows = torch.einsum("bthk,hku->bthu", query / root, by_head[0])
        rows = (rows * scales(codes, key)[:, None]).flatten(1, 2)
        weights = (rows @ tokens.transpose(1, 2)).softmax(-1)
        pooled = (weights @ tokens).unflatten(1, (-1, config.heads))
        return torch.einsum("bthu,hku->bthk", pooled * scales(codes, value)[:, None], by_head[1])

    def read_in(states: Any, codes: Any, tokens: Any) -> Any:
        name = f"{GRAPH}.read_in.read_in_attention"
        normed = norm(states, f"{name}.receiver_layernorm")
        query = split(coded(normed, codes, f"{name}.query_compiler"))
        pool = pool_rearranged if rearranged else pool_plainly
        layers = f"{name}.key_compiler", f"{name}.value_compiler"
        pooled = pool(query, norm(tokens, f"{name}.sender_layernorm"), codes, *layers)
        states = states + leave(pooled, codes, name)
        return states + ffn(states, codes, f"{GRAPH}.read_in.ffn")

    # Attention between latents.

    def distances(receivers: Any, senders: Any) -> Any:
        return 1 - f.normalize(receivers, dim=-1) @ f.normalize(senders, dim=-1).T

    def sample(distance: Any, bandwidth: Any, u: Any) -> Any:
        """Logarithms of sampled edges; an edge that is cut has the smallest probability."""
        scaled, kernel = distance / bandwidth, config.kernel
        cut = scaled > kernel.truncation / bandwidth.detach()
        edges = torch.exp(-scaled).masked_fill(cut, 0.0)
        logits = (torch.logit(u, EPS) + torch.logit(edges, EPS)) / kernel.temperature
        return f.logsigmoid(logits).clamp(math.log(TINY), math.log1p(-EPS))

    def attend(states: Any, codes: Any, senders: Any, sent: Any, logs: Any, name: str) -> Any:
        """Attention to senders with codes `sent`, under log affinities `logs`, without residual."""
        if not rearranged:
            logs = logs - logs.logsumexp(-1, keepdim=True)
        own, other = f"{name}.receiver_layernorm", f"{name}.sender_layernorm"
        senders = norm(senders, other if f"{other}.weight" in p else own)
        query = coded(norm(states, own), codes, f"{name}.query_compiler")
        keys, values = (coded(senders, sent, f"{name}.{x}_compiler") for x in ("key", "value"))
        query, keys, values = (split(x).transpose(1, 2) for x in (query, keys, values))
        weights = (query @ keys.transpose(2, 3) / root + logs).softmax(-1)
        return leave((weights @ values).transpose(1, 2), codes, name)

    def drop(branch: Any, u: Any) -> Any:
        return branch / (1 - drop_path) * torch.floor(1 - drop_path + u)

    def loss(images: Any, targets: Any, noise: Mapping[str, Any]) -> Any:
        codes = {name: p[f"{GRAPH}.{name}_latents.codes_"] for name in SETS}
        signatures = {name: p[f"{GRAPH}.{name}_latents.signatures_"] for name in SETS}
        inputs, mediators, outputs = (
            seed(add_noise(codes[x], noise[f"graph/{x}_codes"]), noise[f"graph/{x}_states"])
            for x in SETS
        )
        own = add_noise(codes["input"], noise["stage_0/read_in/receiver_codes"])
        inputs = read_in(inputs, own, tokenize(images))

        all_codes = torch.cat([codes["input"], codes["mediator"]])
        all_signatures = torch.cat([signatures["input"], signatures["mediator"]])
        for i in range(config.iterations):
            name, stage = f"{GRAPH}.propagators.{i}", f"stage_{i + 1}"
            if i == 0 or not rearranged:
                distance = distances(signatures["mediator"], all_signatures)
            bandwidth = p[f"{name}.latent_attention.kernel.bandwidth"]
            logs = sample(distance, bandwidth, noise[f"{stage}/attention/kernel"])[:, None]
            own = add_noise(codes["mediator"], noise[f"{stage}/receiver_codes"])
            sent = add_noise(all_codes, noise[f"{stage}/sender_codes"])
            senders = torch.cat([inputs, mediators], 1)
            branch = attend(mediators, own, senders, sent, logs, f"{name}.latent_attention")
            mediators = mediators + drop(branch, noise[f"{stage}/attention/drop_path"])
            branch = ffn(mediators, own, f"{name}.ffn")
            mediators = mediators + drop(branch, noise[f"{stage}/ffn/drop_path"])

        name, stage = f"{GRAPH}.read_out", f"stage_{config.iterations + 1}"
        bandwidth = p[f"{name}.latent_attention.kernel.bandwidth"]
        logs = -distances(signatures["output"], all_signatures) / bandwidth
        own = add_noise(codes["output"], noise[f"{stage}/receiver_codes"])
        sent = add_noise(all_codes, noise[f"{stage}/sender_codes"])
        senders = torch.cat([inputs, mediators], 1)
        outputs = attend(outputs, own, senders, sent, logs, f"{name}.latent_attention")
        outputs = outputs + ffn(outputs, own, f"{name}.ffn")
        confidence = linear(outputs, "output_tokenizer.confidence_scorer")[..., 0]
        shares = (confidence + noise[f"{stage}/pooling/gumbel"]).softmax(-1)
        pooled = (shares[:, None] @ outputs)[:, 0]
        return f.cross_entropy(linear(pooled, "output_tokenizer.to_logits"), targets)

    return loss, list(p.values())
