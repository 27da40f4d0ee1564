"""Each way in is one file: it imports installed packages alone, and runs where nothing else of the repository lies."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_moe_ep.bench.harness.processes import free_port
from tests.examples.training_scripts import PIPELINE
from tests.policy.sources import ROOT
from tests.ranks import SERVER_ENV
from tests.test_wheel import build_wheel, copy_sources, environment_of

EXAMPLES = ROOT / "examples"
EP4 = ("--deepspeed_config", "ep4_cpu")
WAYS: dict[str, tuple[str, ...]] = {  # file by file, with the words of a short run
    "adopt_deepspeed_moe.py": ("--steps", "20"),
    "finetune_mixtral.py": ("--steps", "2", "--model", "MODEL"),
    "finetune_mixtral_accelerate.py": ("--steps", "2", "--model", "MODEL"),
    "hook_autoep.py": ("--steps", "2", "--model", "MODEL"),
    "hook_deepspeed_moe.py": ("--steps", "20"),
    "hook_megatron_moe.py": ("--steps", "20"),
    "train_ep16.py": ("--steps", "2", *EP4),
    "train_own_layer.py": ("--steps", "2", *EP4),
    "train_pipeline.py": ("--steps", "2"),
    "train_tensor_parallel.py": ("--steps", "2"),
    "train_tp8_pp2.py": ("--steps", "2", "--deepspeed_config", "LAYOUT"),
    "train_with_accelerate.py": ("--steps", "2"),
    "train_with_trainer.py": ("--steps", "2"),
}
LOSS = re.compile(r"\| loss (\d+\.\d+)")
INSTALLED = {"accelerate", "deepspeed", "ds_moe_ep", "torch", "transformers"}


def others_of(source: str) -> set[str]:
    """Imported packages that are neither of the standard library nor installed with this one and its extra hf."""
    tree = ast.parse(source)
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return {name for name in found if name.split(".")[0] not in {*sys.stdlib_module_names, *INSTALLED}}


def test_every_example_is_a_way_in_that_the_page_names() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(WAYS)
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in WAYS if f"[`{name}`]({name})" not in page] == []


@pytest.mark.parametrize("name", WAYS)
def test_a_way_in_imports_installed_packages_alone(name: str) -> None:
    assert others_of((EXAMPLES / name).read_text(encoding="utf-8")) == set()


def test_a_neighbour_a_test_and_a_relative_import_are_found() -> None:
    source = (
        "import os\nfrom tests.ranks import run_ranks\nfrom . import world\nimport examples.world\nimport neighbour"
    )
    assert others_of(source) == {"tests.ranks", ".", "examples.world", "neighbour"}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment in which the package is installed from its wheel."""
    folder = tmp_path_factory.mktemp("copied")
    wheel = build_wheel(copy_sources(folder / "source"), folder / "built")
    return environment_of(folder / "environment", [wheel]) / "python"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny Mixtral."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    folder = tmp_path_factory.mktemp("model")
    MixtralForCausalLM(MixtralConfig(vocab_size=256, **sizes, **heads, **experts)).save_pretrained(folder)
    return folder


@pytest.mark.slow  # a launcher and four processes that import torch and deepspeed: half a minute each
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", WAYS)
def test_a_way_in_that_was_copied_into_an_empty_folder_trains_there(
    name: str, python: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / name, tmp_path)
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(PIPELINE))
    words = [{"MODEL": str(model), "LAYOUT": str(layout)}.get(word, word) for word in WAYS[name]]
    launcher = [str(python), "-m", "deepspeed.launcher.runner", "--num_gpus", "4", "--master_port", str(free_port())]
    here = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "COV"))}
    done = subprocess.run(
        [*launcher, name, *words], cwd=tmp_path, env=here | SERVER_ENV, capture_output=True, text=True, timeout=380
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    losses = [float(loss) for loss in LOSS.findall(done.stdout)]
    assert losses and all(0 < loss < 10 for loss in losses), printed[-4000:]
    assert str(ROOT) not in printed, "a file of the checkout took part"
