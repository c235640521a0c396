"""Installs the packages of this repository: m2mkd_jax and what it shares with cliptrans_jax."""

from setuptools import find_packages, setup

setup(
    name="modular-jax",
    version="0.1.0",
    description="Module-to-module knowledge distillation (m2mKD) in JAX/Flax, for TPUs and GPUs",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["common_jax*", "m2mkd_jax*", "cliptrans_jax*"]),
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.9",
        "ml_collections>=1.1.0",
        "networkx>=3.4",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=10.3",
        "scikit-learn>=1.5",
        "tensorboardX>=2.6.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["beartype>=0.23", "pytest>=9", "pytest-xdist>=3.8", "ruff>=0.17"],
        # Reading data sets that TFDS prepared; preparing them also needs TensorFlow itself.
        "tfds": ["tensorflow-datasets>=4.9.10"],
    },
)
