"""The package's own model as a Hugging Face folder: `from_pretrained` loads it, with equal logits.

fp32: 2e-6 of the largest logit is the order of sums over two experts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ds_moe_ep.config.section import read_section
from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import ExportError
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import build_transformer
from tests.engine.checkpoint.checkpoints import TAG, target_config
from tests.engine.hugging_face.tiny_models import distance, ds_config
from tests.parallel.training_runs import Run

BOUND = 2e-6
IDS = torch.arange(3 * 8).view(3, 8) * 7 % 32
GELU = Run(top_k=2, model={"num_layers": 2})
WIDE = Run(top_k=2, model={"num_layers": 2, "expert": "swiglu", "expert_bias": True, "shared_expert_width": 16})
DEEPSEEK = {"balance": "bias", "score": "sigmoid", "n_group": 2, "route_scale": 2.5, "gate_bias": True}


def write_run(folder: Path, run: Run, knobs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model, its checkpoint as an engine writes it, and its ds_config."""
    config = target_config(run, pipeline=False)
    config["moe_ep"] |= knobs
    section = read_section(config)
    assert section.model is not None
    net = build_transformer(section.model, dataclasses.replace(section.moe, ep_size=1), MoE).eval()
    init_weights(net, seed=3)
    for name, value in (*net.named_buffers(), *net.named_parameters()):
        with torch.no_grad():
            if name.endswith("steps_E"):
                value.copy_(torch.tensor([400, -600, 0, 200]))
            elif name.endswith("bias"):
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    state = net.state_dict()
    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    dense = {name: value for name, value in state.items() if "deepspeed_experts" not in name}
    main = {"module": dense, "num_experts": [4, 4], "dp_world_size": 4}
    torch.save(main, folder / TAG / "mp_rank_00_model_states.pt")
    for layer in range(2):
        for expert in range(4):
            prefix = f"layers.{layer}.feed_forward.deepspeed_moe.experts.deepspeed_experts.{expert}."
            weights = {name: value.clone() for name, value in state.items() if name.startswith(prefix)}
            torch.save(weights, folder / TAG / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return net, config


def trained_and_exported(folder: Path) -> Tensor:
    """Logits of an engine with the model behind one step; its folder and its checkpoint are written. Collective."""
    import ds_moe_ep
    from ds_moe_ep.model.initialize import expert_index_of

    config = target_config(WIDE, pipeline=False) | ds_config(1)
    del config["train_batch_size"]
    config["moe_ep"] |= DEEPSEEK | {"bias_step": 0.2}
    section = read_section(config)
    assert section.model is not None
    net = build_transformer(section.model, section.moe, MoE)
    init_weights(net, 3, expert_index_of(dist.get_rank(), section.moe.num_local_experts))
    engine = ds_moe_ep.initialize(model=net, config=config)[0]
    engine.backward(engine(IDS, IDS).loss)
    engine.step()
    engine.save_checkpoint(str(folder / "own saved"))
    ds_moe_ep.save_pretrained(engine, folder / "own", max_shard_bytes=20_000)
    engine.eval()
    with torch.no_grad():
        return engine.module(IDS).logits_BSV


def check_exported(folder: Path, logits_BSV: Tensor) -> None:
    """The engine's folder gives its logits, and is that of its checkpoint, tensor by tensor."""
    model = load(folder / "own")
    with torch.no_grad():
        assert distance(model(input_ids=IDS).logits, logits_BSV) <= BOUND
    config = target_config(WIDE, pipeline=False)
    config["moe_ep"] |= DEEPSEEK | {"bias_step": 0.2}
    prepare(folder / "own saved", folder / "converted", config, to="hugging_face").write()
    own, converted = (tensors_in(folder / name) for name in ("own", "converted"))
    assert own.keys() == converted.keys()
    assert all(torch.equal(own[name], converted[name]) for name in own)
    assert any(name.endswith("routing_bias") and value.any() for name, value in own.items()), "the bias has moved"
    assert (folder / "own" / "config.json").read_text() == (folder / "converted" / "config.json").read_text()
    assert len(list((folder / "own").glob("*.safetensors"))) > 4, "every rank writes its own"


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def load(folder: Path) -> Any:
    """The folder by Hugging Face; no key may be missing or unexpected."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not {kind: keys for kind, keys in told.items() if keys}
    return model.eval()


@torch.no_grad()
def difference(model: Any, net: nn.Module) -> float:
    return distance(model(input_ids=IDS).logits, net(IDS).logits_BSV)


@pytest.fixture(autouse=True)
def code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a folder's code to a cache of the user's: here it is the test's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))


@pytest.mark.parametrize(("run", "knobs"), [(GELU, {}), (WIDE, DEEPSEEK)])
def test_a_run_of_the_own_model_leaves_as_a_folder_with_its_logits(
    tmp_path: Path, run: Run, knobs: dict[str, Any]
) -> None:
    net, config = write_run(tmp_path / "saved", run, knobs)
    conversion = prepare(tmp_path / "saved", tmp_path / "folder", config, to="hugging_face")
    assert str(conversion).endswith("trust_remote_code=True) loads it")
    conversion.write()
    model = load(tmp_path / "folder")
    assert difference(model, net) <= BOUND
    with torch.no_grad():
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        padded, alone = model(input_ids=IDS, attention_mask=mask).logits[0, 3:], model(input_ids=IDS[:1, 3:]).logits[0]
        assert distance(padded, alone) < 1e-5, "what is padding is not seen, and positions count differences alone"
        best = model(input_ids=IDS[:, :7]).logits[:, -1].argmax(-1)
        assert torch.equal(model.generate(IDS[:, :7], max_new_tokens=1, do_sample=False)[:, -1], best)
    file = next((tmp_path / "folder").glob("*.safetensors"))
    weights = {name: value.clone() for name, value in load_file(file).items()}  # the file is written anew
    of_layer = [name for name in weights if "layers.1.feed_forward.experts." in name and name.endswith("weight")]
    one, other = (next(name for name in of_layer if f"experts.{expert}." in name) for expert in (0, 2))
    save_file(weights | {one: weights[other], other: weights[one]}, file, {"format": "pt"})
    assert difference(load(tmp_path / "folder"), net) > 1e-3, "the control: two experts' weights exchanged"
    if knobs:
        save_file({n: v * (not n.endswith("routing_bias")) for n, v in weights.items()}, file, {"format": "pt"})
        assert difference(load(tmp_path / "folder"), net) > 1e-3, "the control: no routing bias"
    else:  # a pipeline's checkpoint gives the same folder
        prepare(tmp_path / "saved", tmp_path / "stages", target_config(run, pipeline=True)).write()
        prepare(tmp_path / "stages", tmp_path / "again", config, to="hugging_face").write()
        again = load_file(tmp_path / "again" / file.name)
        assert all(torch.equal(again[name], weights[name]) for name in (*weights, *again))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"eval_capacity_factor": 1.0}, r"eval_capacity_factor=1\.0: drops depend on the tokens of a rank"),
        ({"sample_second": True}, r"sample_second=true: the second expert is drawn"),
        ({"router_dtype": "tokens"}, r"router_dtype='tokens': the folder's gate computes in fp32; .* other logits"),
    ],
)
def test_a_gate_that_the_folder_cannot_have_is_refused(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    _, config = write_run(tmp_path / "saved", GELU, {})
    config["moe_ep"] |= knobs
    with pytest.raises(ExportError, match=message):
        prepare(tmp_path / "saved", tmp_path / "folder", config, to="hugging_face")
