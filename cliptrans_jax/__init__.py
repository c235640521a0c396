"""CLIPTrans in JAX: features of M-CLIP become a prefix in a translator's decoder."""

from common_jax import __version__ as __version__

__all__ = ["load_model"]


def __getattr__(name: str):
    # Imported on first use: the list of commands needs no networks.
    if name == "load_model":
        from cliptrans_jax.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
