"""CLIPTrans in JAX: features of M-CLIP become a prefix in a translator's decoder."""

from cliptrans_jax.loading import load_model as load_model

__all__ = ["load_model"]
