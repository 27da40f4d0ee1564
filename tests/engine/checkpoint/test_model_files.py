"""A model file never holds some of the experts: refused where one rank's would be written, whole where it can be."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine.checkpoint.own_experts import shifted
from ds_moe_ep.errors import EngineError, ExportError
from tests.engine.test_doors import E, Net, deepspeeds_layer, own_layer, plain_engine, refusal, tokens
from tests.ranks import RankPool

EXPERTS = "layers.0.deepspeed_moe.experts.deepspeed_experts"


def prepared(model: nn.Module) -> tuple[Any, Any]:
    """An accelerator and the engine that it makes."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DummyOptim

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=copy.deepcopy(CONFIG)))
    return accelerator, accelerator.prepare(model, DummyOptim(model.parameters()))[0]


CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def pretrained(*layers: nn.Module) -> Any:
    """A transformers model around a Net."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.net = Net(*layers)

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.net(x)
            return loss

    return Model(PretrainedConfig())


def refused_doors(accelerator: Any, engine: Any, folder: Path, of_all_ranks: bool = True) -> dict[str, str]:
    """Errors of each writer of model files, none of which may leave a file."""
    import huggingface_hub
    import safetensors.torch

    model = engine.module
    doors = {
        "engine.save_16bit_model": lambda path: engine.save_16bit_model(path),
        "accelerator.get_state_dict": lambda path: torch.save(accelerator.get_state_dict(engine), path / "x.bin"),
        "accelerator.save_model": lambda path: accelerator.save_model(engine, path),
        "model.save_pretrained": lambda path: accelerator.unwrap_model(engine).save_pretrained(path),
        "safetensors.torch.save_model": lambda path: safetensors.torch.save_model(model, path / "x.safetensors"),
        "huggingface_hub.save_torch_model": lambda path: huggingface_hub.save_torch_model(model, path),
    }
    if not of_all_ranks:
        del doors["engine.save_16bit_model"]
    said = {}
    for name, save in doors.items():
        path = folder / f"{name} {dist.get_rank()}"
        path.mkdir()
        said[name] = refusal(lambda save=save, path=path: save(path))
        weights = [each.name for each in path.rglob("*") if each.suffix in (".bin", ".safetensors", ".pt")]
        assert not weights, (name, weights)
    return said


def door_cases(folder: str) -> dict[str, Any]:
    import deepspeed

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    accelerator, engine = prepared(pretrained(own_layer(), own_layer()))
    found["own"] = refused_doors(accelerator, engine, made(Path(folder) / "own"))
    found["a rank's own use"] = uses_of_one_rank(engine)
    accelerator, hooked = prepared(pretrained(deepspeeds_layer()))
    with ds_moe_ep.attach_overlap(hooked):
        found["hooked"] = refused_doors(accelerator, hooked, made(Path(folder) / "hooked"), of_all_ranks=False)
        found["whole, hooked"] = whole_and_own(hooked, folder, "hooked.bin")
    found["hooks removed"] = refusal(lambda: hooked.save_16bit_model(f"{folder}/unhooked{dist.get_rank()}"))
    engine = plain_engine(own_layer(), stage=1)
    engine.backward(engine(tokens(0)))
    engine.step()
    engine.save_checkpoint(f"{folder}/checkpoint")
    found["whole, own"] = whole_and_own(extended(Net(own_layer(), own_layer())), folder, "own.bin")
    found["whole, adapted"] = whole_and_own(extended(with_adapters()), folder, "adapted.bin")
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return {**found, "state": state}


def extended(model: nn.Module) -> Any:
    """An engine of the package's door, behind one step."""
    import ds_moe_ep

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = ds_moe_ep.initialize(model=model, config=copy.deepcopy(CONFIG), model_parameters=trained)[0]
    engine.backward(engine(tokens(dist.get_rank())))
    engine.step()
    return engine


def with_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(Net(own_layer()), LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))


def whole_and_own(engine: Any, folder: str, file: str) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """This rank's state, and where it is found again once the model has loaded the file of all ranks. Collective."""
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "deepspeed_experts" in name:
                parameter.add_(dist.get_rank())  # also where experts began alike
    engine.save_16bit_model(folder, file)
    dist.barrier()
    own = {name: value.clone() for name, value in engine.module.state_dict().items()}
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    engine.module.load_state_dict(torch.load(f"{folder}/{file}"))
    back = engine.module.state_dict()
    return own, {name: torch.equal(back[name], value) for name, value in own.items()}


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def uses_of_one_rank(engine: Any) -> bool:
    """Uses that are no model file go on: a state of one's own, copies, averages, pickles."""
    own = engine.module.state_dict()
    average = torch.optim.swa_utils.AveragedModel(engine.module.net.layers[0].deepspeed_moe.experts)
    copied = copy.deepcopy(engine.module.net.layers[0].deepspeed_moe.gate)
    return bool(own) and bool(average.state_dict()) and bool(copied.state_dict()) and bool(engine.module_state_dict())


def whole_file(folder: str) -> dict[str, Tensor]:
    """The way out that the refusal names: the checkpoint in one process, in the model made with ep_size=1."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    engine = plain_engine(own_layer_of_one())
    engine.load_checkpoint(f"{folder}/checkpoint", load_module_only=True)
    engine.save_16bit_model(folder, "whole.bin")
    whole: dict[str, Tensor] = torch.load(f"{folder}/whole.bin")
    return whole


def own_layer_of_one() -> Any:
    from ds_moe_ep import GeluMLP, MoE, MoEConfig

    return MoE(8, GeluMLP(8, 16), config=MoEConfig(num_experts=E))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def found(pool: RankPool, folder: str) -> list[dict[str, Any]]:
    return pool.run(2, door_cases, folder, timeout_s=150)


@pytest.mark.parametrize("kind", ["own", "hooked"])
def test_every_writer_of_model_files_is_refused_by_name_on_every_rank(kind: str, found: list[dict[str, Any]]) -> None:
    for by_rank in found:
        for door, said in by_rank[kind].items():
            assert said.startswith(f"ExportError: {door}: the experts of net.layers.0 lie on 2 ranks"), (door, said)
            assert "engine.save_checkpoint(folder) saves all of them" in said


@pytest.mark.parametrize("kind", ["own", "hooked", "adapted"])
def test_a_file_that_all_ranks_write_holds_every_expert_and_each_rank_finds_its_own_in_it(
    kind: str, found: list[dict[str, Any]], folder: str
) -> None:
    whole = torch.load(f"{folder}/{kind}.bin")
    seen = set()
    for rank, by_rank in enumerate(found):
        own, is_back = by_rank[f"whole, {kind}"]
        assert all(is_back.values()), (rank, is_back)
        for name, value in own.items():
            place = shifted(name, rank * E // 2)
            assert torch.equal(whole[place], value), place
            seen.add(place)
    assert set(whole) == seen
    first, second = (by_rank[f"whole, {kind}"][0] for by_rank in found)
    trained = [name for name in first if "deepspeed_experts" in name and (kind != "adapted" or "lora_" in name)]
    assert trained
    assert not any(torch.equal(first[name], second[name]) for name in trained), "the control"


def test_a_state_of_all_experts_is_refused_where_a_ranks_place_is_not_known() -> None:
    layer = own_layer()
    name = "deepspeed_moe.experts.deepspeed_experts.0.fc1.weight"
    whole = {shifted(name, index): torch.zeros(16, 8) for index in range(E)}
    with pytest.raises(EngineError, match=r"cannot be loaded before the expert-parallel groups of ep_size 2 exist"):
        layer.load_state_dict(whole)


def test_a_rank_may_use_its_own_state_and_hooks_that_are_gone_refuse_nothing(found: list[dict[str, Any]]) -> None:
    for by_rank in found:
        assert by_rank["a rank's own use"] and by_rank["hooks removed"] == "nothing was refused"


def test_the_way_out_gives_a_file_of_all_experts(pool: RankPool, found: list[dict[str, Any]], folder: str) -> None:
    (whole,) = pool.run(1, whole_file, folder)
    assert len({name.split(".")[5] for name in whole if name.startswith(EXPERTS)}) == E
    for rank, by_rank in enumerate(found):
        for name, value in by_rank["state"].items():
            if name.startswith(EXPERTS):
                local, leaf = name.removeprefix(EXPERTS + ".").split(".", 1)
                name = f"{EXPERTS}.{2 * rank + int(local)}.{leaf}"
            assert torch.equal(whole[name], value), name


def test_the_error_is_one_that_the_trainer_takes_for_a_model_that_no_rank_has() -> None:
    assert issubclass(ExportError, ValueError) and issubclass(ExportError, EngineError)
    assert isinstance(pickle.loads(pickle.dumps(ExportError("words"))), ExportError)


def test_adapters_of_dense_layers_are_written_and_those_of_experts_refused(tmp_path: Path) -> None:
    import safetensors.torch
    from peft import LoraConfig, get_peft_model

    dense = get_peft_model(Net(own_layer()), LoraConfig(r=2, target_modules=["leave"]))
    dense.save_pretrained(str(tmp_path / "dense"))
    assert (tmp_path / "dense" / "adapter_model.safetensors").is_file()
    with pytest.raises(ExportError, match=r"safetensors\.torch\.save_model"):  # the base weights would be in that file
        safetensors.torch.save_model(dense, str(tmp_path / "all.safetensors"))
    experts = get_peft_model(Net(own_layer()), LoraConfig(r=2, target_modules=["fc1", "leave"]))
    with pytest.raises(ExportError, match=r"model\.save_pretrained: the experts of .*layers\.0"):
        experts.save_pretrained(str(tmp_path / "experts"))
    assert not list((tmp_path / "experts").glob("*.safetensors"))
