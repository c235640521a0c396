"""timm's ViTs by name: what a name says about a network that its tensors do not."""

import types
from collections.abc import Mapping
from typing import Any

# (width, heads) -> names, and the image sizes that they end in.
_NAMES: Mapping[tuple[int, int], Mapping[str, str]] = {
    (64, 2): {
        "test_vit": "",
        "test_vit2": "",
    },
    (192, 3): {
        "deit_tiny_patch16": "224",
        "vit_tiny_patch16": "224 384",
    },
    (256, 4): {
        "vit_wee_patch16_reg1_gap": "256",
        "vit_xsmall_patch16_clip": "224",
    },
    (320, 5): {
        "vit_little_patch16_reg1_gap": "256",
        "vit_little_patch16_reg4_gap": "256",
    },
    (384, 6): {
        "deit3_small_patch16": "224 384",
        "deit_small_patch16": "224",
        "flexivit_small": "",
        "vit_small_patch8": "224",
        "vit_small_patch14_dinov2": "",
        "vit_small_patch14_reg4_dinov2": "",
        "vit_small_patch16_36x1": "224",
        "vit_small_patch16": "224 384",
        "vit_small_patch32": "224 384",
    },
    (512, 8): {
        "deit3_medium_patch16": "224",
        "vit_medium_patch16_clip": "224",
        "vit_medium_patch16_gap": "240 256 384",
        "vit_medium_patch16_reg1_gap": "256",
        "vit_medium_patch16_reg4_gap": "256",
        "vit_medium_patch32_clip": "224",
        "vit_mediumd_patch16_reg4_gap": "256 384",
    },
    (640, 10): {
        "vit_betwixt_patch16_gap": "256",
        "vit_betwixt_patch16_reg1_gap": "256",
        "vit_betwixt_patch16_reg4_gap": "256 384",
        "vit_betwixt_patch32_clip": "224",
    },
    (768, 12): {
        "deit3_base_patch16": "224 384",
        "deit_base_patch16": "224 384",
        "flexivit_base": "",
        "vit_base_patch8": "224",
        "vit_base_patch14_dinov2": "",
        "vit_base_patch14_reg1_tipsv2": "",
        "vit_base_patch14_reg4_dinov2": "",
        "vit_base_patch16": "224 384",
        "vit_base_patch16_224_miil": "",
        "vit_base_patch16_clip": "224 384",
        "vit_base_patch16_clip_quickgelu": "224",
        "vit_base_patch16_reg4_gap": "256",
        "vit_base_patch16_siglip": "224 256 384 512",
        "vit_base_patch16_siglip_gap": "224 256 384 512",
        "vit_base_patch32": "224 384",
        "vit_base_patch32_clip": "224 256 384 448",
        "vit_base_patch32_clip_quickgelu": "224",
        "vit_base_patch32_siglip": "256",
        "vit_base_patch32_siglip_gap": "256",
    },
    (768, 16): {
        "vit_base_patch16_gap": "224",
    },
    (832, 13): {
        "vit_so150m2_patch16_reg1_gap": "256 384 448",
    },
    (896, 14): {
        "vit_base_patch16_plus": "240",
        "vit_base_patch16_plus_clip": "240",
        "vit_base_patch32_plus": "256",
        "vit_so150m_patch16_reg4_gap": "256 384",
        "vit_so150m_patch16_reg4_map": "256",
    },
    (1024, 16): {
        "deit3_large_patch16": "224 384",
        "eva_large_patch14": "196 336",
        "flexivit_large": "",
        "vit_large_patch14": "224",
        "vit_large_patch14_clip": "224 336",
        "vit_large_patch14_clip_quickgelu": "224 336",
        "vit_large_patch14_dinov2": "",
        "vit_large_patch14_reg1_tipsv2": "",
        "vit_large_patch14_reg4_dinov2": "",
        "vit_large_patch16": "224 384",
        "vit_large_patch16_siglip": "256 384 512",
        "vit_large_patch16_siglip_gap": "256 384 512",
        "vit_large_patch32": "224 384",
    },
    (1152, 16): {
        "vit_so400m_patch14_reg1_tipsv2": "",
        "vit_so400m_patch14_siglip": "224 378 384",
        "vit_so400m_patch14_siglip_gap": "224 378 384 448 896",
        "vit_so400m_patch16_siglip": "256 384 512",
        "vit_so400m_patch16_siglip_gap": "256 384 512",
    },
    (1280, 16): {
        "deit3_huge_patch14": "224",
        "vit_huge_patch14": "224",
        "vit_huge_patch14_clip": "224 336 378",
        "vit_huge_patch14_clip_quickgelu": "224 378",
        "vit_huge_patch14_gap": "224",
        "vit_huge_patch16_gap": "448",
    },
    (1408, 16): {
        "vit_giant_patch14": "224",
        "vit_giant_patch14_clip": "224",
        "vit_giant_patch16_gap": "224",
    },
    (1536, 16): {
        "vit_giantopt_patch16_siglip": "256 384",
        "vit_giantopt_patch16_siglip_gap": "256 384",
    },
    (1664, 16): {
        "vit_gigantic_patch14": "224",
        "vit_gigantic_patch14_clip": "224 378",
        "vit_gigantic_patch14_clip_quickgelu": "224",
    },
}
# Names with these parts have the tanh approximation of the GELU; all other SigLIPs have the exact
# GELU in timm.
_TANH = (
    *("patch32_siglip", "giantopt_patch16_siglip", "so400m_patch16_siglip"),
    *("large_patch16_siglip_512", "large_patch16_siglip_gap_512"),
)
# Regex of names of networks with nearly the tensors of a plain ViT -> what they compute otherwise.
UNSUPPORTED: Mapping[str, str] = types.MappingProxyType(
    {
        r".*_rpn_.*": "norms after attention and MLP",
        r".*_rope_.*|vit_pe_.*": "rotary positions",
        r"test_vit3": "a pooling that also reads its registers",
        r"test_vit4": "RMS norms",
        r".*_radio_.*|vit_intern.*": "no norm after its blocks",
        r"vit_d(little|wee|pwee)_.*": "differential attention",
    }
)


def _facts(name: str, width: int, heads: int) -> Mapping[str, Any]:
    activation = "gelu_tanh" if any(part in name for part in _TANH) else "gelu"
    return {
        "width": width,
        "heads": heads,
        "activation": "quick_gelu" if "quickgelu" in name else activation,
        "norm_eps": 1e-5 if "_clip_" in name else 1e-6,
    }


# Name -> fields of a ViT's section.
TIMM_VITS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        name: _facts(name, width, heads)
        for (width, heads), stems in _NAMES.items()
        for stem, sizes in stems.items()
        for name in ([f"{stem}_{size}" for size in sizes.split()] or [stem])
    }
)
