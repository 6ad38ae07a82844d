"""Installation. Versions that CI tests are pinned in constraints.txt, not here."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megameta",
    version="0.1.0",
    description="Pre-train language models with learned meta-tokens and meta-attention",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megameta", "megameta.*"]),
    package_data={"megameta": ["py.typed", "paper/reproduce/scales/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "datasets>=4.0",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "tensorboard>=2.16",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=13.0",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "zstandard>=0.22",
        "pyarrow>=15",
        "tiktoken>=0.14",
        "rensa>=0.5",
        "py3langid>=0.4",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "eval": ["lm-eval[hf]>=0.4"],
        "finetune": ["accelerate>=1.1", "peft>=0.17"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "coverage>=7.10",
            "hypothesis>=6.100",
            "accelerate>=1.1",
            "peft>=0.17",
            "lm-eval[hf]>=0.4",
            "ruff>=0.9",
            "mypy>=1.10",
            "pre-commit>=3.7",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["megameta=megameta.__main__:main"]},
)
