"""Packaging of afd-scale; `make install` installs it with the exact versions of constraints/cpu.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """The package's version, without importing it: its dependencies need not be there yet."""
    text = (HERE / "afd_scale" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('afd_scale/__init__.py must hold a line __version__ = "..."')
    return match.group(1)


SERVE = ["starlette>=0.46,<2", "uvicorn>=0.35,<1", "websockets>=14", "python-multipart>=0.0.18"]

setup(
    name="afd-scale",
    version=read_version(),
    description="On-Policy Adversarial Flow Distillation of causal video diffusion students, at DeepSpeed scale",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["afd_scale", "afd_scale.*"]),
    package_data={"afd_scale": ["py.typed", "**/*.j2", "**/*.html", "**/*.safetensors"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19,<0.20",
        "mosaicml-streaming>=0.13,<0.14",
        "diffusers>=0.39,<0.40",
        "accelerate>=1,<2",  # diffusers loads no Wan model without it (0.39)
        "transformers>=4.57,<5",  # mosaicml-streaming 0.13 caps it at <5
        "httpx>=0.27,<1",
        "ftfy>=6.1,<7",  # Wan's own tokenizer code cleans prompts with it
        "pyarrow>=17",
        "safetensors>=0.6,<1",
        "numpy>=2.0,<2.2",  # mosaicml-streaming 0.13 caps it at <2.2
        "pydantic>=2.11,<3",
        "PyYAML>=6,<7",
        "av>=14",
        "opencv-python-headless>=4.10,<6",
        "matplotlib>=3.9,<4",
        "jinja2>=3.1,<4",
        "rich>=13",
        "tensorboard>=2.17,<3",
        "xxhash>=3.4,<4",
        "packaging>=23",
        "psutil>=5.9",
        "nvidia-ml-py>=12",
    ],
    extras_require={
        # flash-attn is in no extra: it has no wheels for the torch above, and where there is no CUDA already its
        # metadata fails and takes the rest along (docs/cluster.md says how to get it).
        # Built against the torch that is there: pip install --no-build-isolation. te.autocast is there since 2.9.
        "transformer-engine": ["transformer-engine[pytorch]>=2.9,<3"],
        "mpi": ["mpi4py>=4,<5"],
        "wandb": ["wandb>=0.22"],
        "serve": SERVE,
        "trackio": ["trackio>=0.20,<0.21"],
        "dev": [
            *SERVE,
            "pytest>=8.4",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "moto[s3,server]>=5.1",
            "playwright>=1.50",  # drives the page in a browser, where one is there
            "peft>=0.21,<0.22",  # loads exported adapters in the tests
            "ruff>=0.12",
            "mypy>=1.16",
            "types-PyYAML>=6",
        ],
    },
)
