"""m2mKD in JAX: modules of a ViT teach the modules of V-MoE students through a shared meta
model."""

from m2mkd_jax.loading import load_model as load_model

__all__ = ["load_model"]
