"""Cases of `gpu.py`: peers in torch, with timm and transformers.

They run in eager mode, in bfloat16 autocast, with fused attention and fused AdamW.
"""

from collections.abc import Callable
from typing import Any

from decode import FIRST_WORD, LANGUAGE
from gpu_layers import moe_sizes
from gpu_steps import TOKENS, mbart_sizes, sentences
from gpu_timing import chained, named, rate, run_case, say

MICRO_BATCHES = 4


def start_torch() -> tuple[Any, str, Callable[[Any], None], str]:
    """torch, its device, a function that blocks until the device is ready, and the card's name."""
    import torch

    if torch.cuda.is_available():
        block = lambda _: torch.cuda.synchronize()  # noqa: E731
        return torch, "cuda", block, torch.cuda.get_device_name()
    return torch, "cpu", lambda _: None, "cpu"


def measure_moe(tiny: bool) -> None:
    """Only the matrix products of a mixture of experts and the GELU between them: no routing,
    gathers, biases or sums."""
    with named("moe_torch"):
        torch, device, block, card = start_torch()
        sizes = moe_sizes(tiny)
        pairs, count = sizes.pairs, sizes.experts

        def draw(*shape: int):
            kind = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
            return torch.randn(*shape, **kind)

        x, dy = draw(pairs, sizes.width), draw(pairs, sizes.width)
        up, down = draw(count, sizes.width, sizes.hidden), draw(count, sizes.hidden, sizes.width)
        ends = [pairs * (i + 1) // count for i in range(count)]
        offsets = torch.tensor(ends, device=device, dtype=torch.int32)
        gelu, product = torch.nn.functional.gelu, torch._grouped_mm

        def grouped():
            return product(gelu(product(x, up, offs=offsets)), down, offs=offsets)

        def loop():
            parts = zip([0, *ends[:-1]], ends, up, down, strict=True)
            return torch.cat([gelu(x[a:b] @ one) @ other for a, b, one, other in parts])

        for case, layer in (("grouped_mm", grouped), ("loop_over_experts", loop)):
            with named(f"moe_torch_{case}"):

                def step(layer=layer):
                    return torch.autograd.grad(layer(), (x, up, down), dy)

                times = chained(step, sync=block)
                rates = rate(times, 6 * sizes.product_flops, card)
                say(f"moe_torch_{case}", **times, **rates, note="products and GELU only")


def measure_vitl(tiny: bool) -> None:
    """timm's ViT-Large, with stochastic depth, without augmentation."""
    with named("vitl_torch"):
        import timm

        torch, device, block, card = start_torch()
        batch = 2 if tiny else 128
        size = "tiny" if tiny else "large"
        network = timm.create_model(f"vit_{size}_patch16_224", drop_path_rate=0.1).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=device == "cuda")
        images = torch.randn(batch, 3, 224, 224, device=device)
        labels = torch.randint(0, 1000, (batch,), device=device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            return loss

        times = chained(step, sync=block)
        # FLOPs of ViT-Large only: matrices and attention, with a multiply-add counted as two.
        tokens, width, blocks = 197, 1024, 24
        flops = 6 * batch * tokens * (304e6 + blocks * 2 * tokens * width)
        memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        rates = {} if tiny else rate(times, flops, card)
        say("vitl_torch", **times, **rates, peak_gb=memory, note=f"timm {timm.__version__}, eager")


def make_mbart(torch: Any, tiny: bool) -> tuple[Any, str]:
    """mBART from transformers with random weights, and a note with the versions."""
    import transformers

    sizes = mbart_sizes(tiny)
    config = transformers.MBartConfig(
        vocab_size=sizes.vocab,
        d_model=sizes.width,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_attention_heads=sizes.encoder_heads,
        decoder_attention_heads=sizes.decoder_heads,
        encoder_ffn_dim=sizes.encoder_hidden,
        decoder_ffn_dim=sizes.decoder_hidden,
        scale_embedding=True,
        attn_implementation="sdpa",
    )
    network = transformers.MBartForConditionalGeneration(config)
    return network, f"transformers {transformers.__version__}, torch {torch.__version__}, eager"


def measure_mbart(tiny: bool) -> None:
    """A step of the same size as `mbart_step`, without a prefix."""
    with named("mbart_torch"):
        torch, device, block, _ = start_torch()
        network, note = make_mbart(torch, tiny)
        network = network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=device == "cuda")
        shape = MICRO_BATCHES, 32, TOKENS
        ids = torch.randint(FIRST_WORD, network.config.vocab_size, shape, device=device)

        def step():
            optimizer.zero_grad(set_to_none=True)
            for part in ids:
                with torch.autocast(device, torch.bfloat16):
                    loss = network(input_ids=part, labels=part).loss / MICRO_BATCHES
                loss.backward()
            optimizer.step()
            return loss

        times = chained(step, sync=block)
        memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        say("mbart_torch", **times, peak_gb=memory, note=note)


def measure_decode(tiny: bool) -> None:
    """`generate` in bfloat16, on the sentences of `decode`."""
    with named("decode_torch"):
        torch, device, block, _ = start_torch()
        network, note = make_mbart(torch, tiny)
        network, work = network.to(device, torch.bfloat16).eval(), sentences(tiny)
        shape = work.count, work.source
        ids = torch.randint(FIRST_WORD, network.config.vocab_size, shape, device=device)

        def generate(beams: int):
            with torch.inference_mode():
                return network.generate(
                    input_ids=ids,
                    num_beams=beams,
                    do_sample=False,
                    max_new_tokens=work.new,
                    min_new_tokens=work.new,
                    early_stopping=True,
                    decoder_start_token_id=2,
                    forced_bos_token_id=LANGUAGE,
                )

        for beams in (5, 1):
            times = chained(lambda beams=beams: generate(beams), count=1, sync=block)
            per_second = 1e3 * work.count / times["ms"]
            say(f"decode_torch_beams{beams}", **times, sentences_s=per_second, note=note)


CASES = {
    "moe_torch": measure_moe,
    "vitl_torch": measure_vitl,
    "mbart_torch": measure_mbart,
    "decode_torch": measure_decode,
}

if __name__ == "__main__":
    run_case(CASES)
