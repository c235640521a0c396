"""m2mKD in JAX: modules of a ViT teacher are distilled into modules of V-MoE and NAC students,
inside a shared meta model."""

from common_jax import __version__ as __version__

__all__ = ["load_model"]


def __getattr__(name: str):
    # Lazy: data-loading workers import this package and must not pay for importing the networks.
    if name == "load_model":
        from m2mkd_jax.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
