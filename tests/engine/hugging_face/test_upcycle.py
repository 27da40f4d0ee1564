"""Dense folders as mixtures of experts: logits equal the dense model's at the start, and the mixture trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_moe_ep
from ds_moe_ep.errors import ConfigError, EngineError
from tests.engine.checkpoint.live_bytes import LiveBytes
from tests.engine.hugging_face.tiny_models import SIZES, distance, load, logits_of, token_ids

BOUND = 2e-6
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 8},
}


def dense_model(family: str, folder: Path, **config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in SIZES.items() if key != "num_experts_per_tok"}
    torch.manual_seed(1)
    made = AutoConfig.for_model(family, **{"intermediate_size": 40, **sizes, **DENSE.get(family, {}), **config})
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", DENSE)
def test_a_mixture_of_equal_experts_has_the_dense_models_logits(family: str, tmp_path: Path) -> None:
    model = dense_model(family, tmp_path / "dense")
    folder = ds_moe_ep.upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4, max_shard_bytes=30_000)
    assert distance(logits_of(load(folder)), logits_of(model)) <= BOUND
    mine = ds_moe_ep.from_pretrained(folder)
    assert distance(logits_of(mine), logits_of(model)) <= BOUND
    assert len(list(folder.glob("*.safetensors"))) > 2
    mine.train()
    mine(input_ids=token_ids(), labels=token_ids()).loss.backward()
    ups = [p.grad.abs().max() for name, p in mine.named_parameters() if name.endswith(".up.weight")]
    assert len(ups) == 8
    assert min(ups) > 0, "every expert gets tokens and gradients"


def write_config(folder: Path, changes: dict[str, Any], without: Sequence[str] = ()) -> None:
    path = folder / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("family", "left_out", "values"),
    [
        ("llama", ("rope_parameters", "rms_norm_eps", "num_key_value_heads"), {"num_key_value_heads": 4}),
        ("mistral", ("rope_parameters",), {}),
        ("qwen3", ("head_dim",), {"head_dim": 128}),
        ("qwen3", (), {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("qwen3", (), {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ],
)
def test_what_a_dense_folder_leaves_out_has_its_own_familys_value(
    family: str, left_out: tuple[str, ...], values: dict[str, Any], tmp_path: Path
) -> None:
    """Configurations of older releases name no base of the rotary embedding, for one, and Mixtral's is another."""
    dense_model(family, tmp_path / "dense", **values)
    write_config(tmp_path / "dense", {}, left_out)
    model = load(tmp_path / "dense")
    folder = ds_moe_ep.upcycle(tmp_path / "dense", tmp_path / "moe", num_experts=4)
    assert distance(logits_of(load(folder)), logits_of(model)) <= BOUND
    shutil.copytree(folder, tmp_path / "other")  # the control: the mixture's own values are seen
    write_config(
        tmp_path / "other", {"sliding_window": 2, "use_sliding_window": True} if not left_out else {}, left_out
    )
    with pytest.raises((AssertionError, RuntimeError)):
        assert distance(logits_of(load(tmp_path / "other")), logits_of(model)) <= 100 * BOUND


def test_one_tensor_of_a_mixture_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The control: with noise a shard, here the whole mixture, is many times as large."""
    dense_model("mistral", tmp_path / "dense", hidden_size=64, intermediate_size=2048)
    largest = 4 * 64 * 2048
    for noise, bound in ((0.0, 1), (0.1, 4)):  # the matrix and, with noise, its wide form, the noise and their sum
        with LiveBytes() as live:
            folder = ds_moe_ep.upcycle(tmp_path / "dense", tmp_path / f"moe{noise}", 8, noise=noise)
        assert live.most <= bound * largest, noise
        assert (folder / "model-00001-of-00001.safetensors").stat().st_size > 10 * bound * largest


def test_noise_parts_the_experts_and_is_drawn_from_the_seed(tmp_path: Path) -> None:
    model = dense_model("mistral", tmp_path / "dense")
    folders = [
        ds_moe_ep.upcycle(tmp_path / "dense", tmp_path / f"moe{index}", 4, noise=noise, seed=seed)
        for index, (noise, seed) in enumerate(((0.1, 0), (0.1, 0), (0.1, 1)))
    ]
    one, same, other = (logits_of(load(folder)) for folder in folders)
    assert torch.equal(one, same)
    assert distance(one, logits_of(model)) > 1e-3
    assert distance(one, other) > 1e-3


def test_what_cannot_become_a_mixture_is_refused(tmp_path: Path) -> None:
    dense_model("llama", tmp_path / "biased", attention_bias=True)
    dense_model("mistral", tmp_path / "dense")
    dense_model("gemma", tmp_path / "gemma", head_dim=8)
    dense_model("qwen3", tmp_path / "mixed", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    for name, changes in (
        ("packed", {"quantization_config": {"quant_method": "fp8"}}),
        ("scores", {"architectures": ["MistralForSequenceClassification"]}),
    ):
        shutil.copytree(tmp_path / "dense", tmp_path / name)
        write_config(tmp_path / name, changes)

    def refusal(source: str, num_experts: int = 4, top_k: int = 2, **words: Any) -> str:
        with pytest.raises((ConfigError, EngineError)) as error:
            ds_moe_ep.upcycle(tmp_path / source, tmp_path / "moe", num_experts, top_k, **words)
        return str(error.value)

    assert refusal("biased").startswith("config.attention_bias=true: Mixtral has no such biases")
    assert refusal("gemma").startswith("config.model_type='gemma': has no mixture to become")
    assert refusal("mixed").startswith("config.layer_types=['full_attention', 'sliding_attention']: layers of the mix")
    assert refusal("packed").startswith("config.quantization_config: ")
    assert refusal("scores").startswith("config.architectures=['MistralForSequenceClassification']: ")
    assert refusal("nothing").endswith("name a Hugging Face folder")
    assert refusal("dense", top_k=5).startswith("top_k=5: a token visits 1 to num_experts=4 experts")
    assert refusal("dense", noise=-1.0).startswith("noise=-1.0: ")
    (tmp_path / "dense/model.safetensors").write_bytes(b"short")
    assert "holds neither a whole" in refusal("dense")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("moe")]
