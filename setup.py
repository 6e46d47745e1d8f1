"""Packages: everything under dlm_scale/, and the top-level folder kernels/ as dlm_scale.kernels.

In a clone the link dlm_scale/kernels -> ../kernels does the same, so nothing has to be installed there.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "dlm_scale" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="dlm_scale",
    version=VERSION,
    description="Pretrain, evaluate and batch-sample diffusion language models with DeepSpeed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["dlm_scale", "dlm_scale.*"]), "dlm_scale.kernels"],
    package_dir={"dlm_scale.kernels": "kernels"},
    entry_points={"console_scripts": ["dlm = dlm_scale.cli:main"]},
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8",
        "megatron-core>=0.16.1",
        "numpy>=1.26",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "safetensors>=0.4",
        "xxhash>=3.0",
        "tiktoken>=0.7",
        "tokenizers>=0.19",
        "datasets>=3.0",
        "zstandard>=0.22",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8"],
        "log": ["wandb>=0.19"],
        "test": ["pytest>=8.0", "pytest-timeout>=2.3", "hypothesis>=6.100", "triton>=3.4; sys_platform == 'linux'",
                 "transformers>=5.0"],
        "hub": ["transformers>=5.0"],
    },
)
