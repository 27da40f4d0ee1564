"""Hugging Face folders in, at any ep_size, and out again: logits equal those of transformers.

fp32: 2e-6 of the largest logit is the order of sums over two experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import ds_moe_ep
from ds_moe_ep.errors import ConfigError, EngineError, ExportError
from tests.engine.hugging_face import test_transformer_folder as own_model
from tests.engine.hugging_face.described import as_on_the_hub, differences
from tests.engine.hugging_face.tiny_models import (
    distance,
    ds_config,
    load,
    logits_of,
    make_model,
    token_ids,
    train_one_step,
)
from tests.ranks import RankPool

BOUND = 2e-6
AUTOEP: list[tuple[str, int, int, bool]] = [  # family, ep_size, ZeRO stage, hooked
    ("mixtral", 4, 0, True),
    ("qwen3_moe", 2, 2, False),
    ("deepseek_v3", 2, 1, True),
]
MORE_AUTOEP: list[tuple[str, int, int, bool]] = [("qwen2_moe", 2, 1, True), ("olmoe", 4, 0, False)]
RECOGNISED_BY: dict[str, dict[str, str]] = {  # how AutoEP finds families that have no preset of their name
    "qwen2_moe": {"preset_model": "qwen3_moe"},
    "olmoe": {"moe_layer_pattern": r"model\.layers\.\d+\.mlp", "router_pattern": "gate", "expert_pattern": "experts"},
}
Own = list[tuple[str, int, int]]  # family, ep_size, ZeRO stage
OWN: Own = [("qwen2_moe", 2, 0), ("deepseek_v3", 2, 1), ("gpt_oss", 4, 2)]
MORE_OWN: Own = [("mixtral", 4, 1), ("qwen3_moe", 1, 0), ("olmoe", 4, 2), ("gpt_oss", 1, 0)]
LOADED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "deepseek_v2", "glm4_moe", "dots1", "gpt_oss")


def test_folders_load_without_ranks_and_keep_their_logits(tmp_path: Path) -> None:
    for family in LOADED:
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        mine = ds_moe_ep.from_pretrained(tmp_path / family)
        assert distance(logits_of(mine), logits_of(model)) <= BOUND, family
        other = make_model(family, seed=4)  # the control: another model is seen
        assert distance(logits_of(other), logits_of(model)) > 1e-2, family
    greedy = make_model("deepseek_v2", topk_method="greedy")  # whose groups limit nothing
    greedy.save_pretrained(tmp_path / "greedy")
    assert distance(logits_of(ds_moe_ep.from_pretrained(tmp_path / "greedy")), logits_of(greedy)) <= BOUND
    assert distance(logits_of(make_model("deepseek_v2")), logits_of(greedy)) > 1e-2


def each_exported_by_autoep(folder: Path, cases: Sequence[tuple[str, int, int, bool]]) -> list[Tensor]:
    """Logits of each engine before its export."""
    found = []
    for family, ep_size, stage, is_hooked in cases:
        autoep = {"autoep_size": ep_size, **RECOGNISED_BY.get(family, {"preset_model": family})}
        engine = train_one_step(make_model(family), ds_config(stage, autoep))
        handle = ds_moe_ep.attach_overlap(engine, {"schedule": "peers"}) if is_hooked else None
        found.append(logits_of(engine))
        ds_moe_ep.save_pretrained(engine, folder / family, max_shard_bytes=20_000)
        if handle is not None:
            handle.remove()
    return found


def exported_by_autoep(folder: Path) -> list[Tensor]:
    """Those, and the logits of an engine of the package's own model."""
    import logging

    found = each_exported_by_autoep(folder, AUTOEP)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return [*found, own_model.trained_and_exported(folder)]


class Around(torch.nn.Module):
    """A user's module around a model; files have the model's names."""

    def __init__(self, model: torch.nn.Module, head: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.language_model, self.head = model, head

    def forward(self, **inputs: Any) -> Any:
        return self.language_model(**inputs)


def loaded_and_exported(folder: Path, cases: Own) -> list[tuple[float, Tensor]]:
    """Of each family the distance of the loaded model's logits to the source's, and the logits after one step."""
    found = []
    for family, ep_size, stage in cases:
        if dist.get_rank() == 0:
            make_model(family).save_pretrained(folder / f"source_{family}")
            as_on_the_hub(folder / f"source_{family}", family)
        dist.barrier()
        source = load(folder / f"source_{family}")
        model = ds_moe_ep.from_pretrained(folder / f"source_{family}", ep_size)
        engine = train_one_step(model if family != "qwen2_moe" else Around(model), ds_config(stage))
        before = ds_moe_ep.from_pretrained(folder / f"source_{family}", ep_size)
        for layer in before.modules():
            if isinstance(layer, ds_moe_ep.MoE):
                layer.set_deepspeed_parallelism()
        start = distance(logits_of(before), logits_of(source))
        found.append((start, logits_of(engine)))
        ds_moe_ep.save_pretrained(engine, folder / family)
    return found


def test_models_of_autoep_and_the_own_one_leave_as_folders_with_their_logits(
    pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rank = pool.run(4, exported_by_autoep, tmp_path, timeout_s=200)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    for found in by_rank:
        assert distance(found[-1], by_rank[0][-1]) <= BOUND
    own_model.check_exported(tmp_path, by_rank[0][-1])
    for index, (family, *_) in enumerate(AUTOEP):
        model = load(tmp_path / family)
        for found in by_rank:
            assert distance(found[index], logits_of(model)) <= BOUND, family
        assert distance(logits_of(make_model(family)), logits_of(model)) > 1e-3, f"{family} was not trained"
        assert not (tmp_path / f"{family}.part").exists()
    index_file = json.loads((tmp_path / "mixtral/model.safetensors.index.json").read_text())
    files = set(index_file["weight_map"].values())
    assert {path.name for path in (tmp_path / "mixtral").glob("*.safetensors")} == files
    assert len(files) > 4, "shards are cut at 20 kB"
    swap_two_experts(tmp_path / "mixtral", index_file["weight_map"])
    assert distance(by_rank[0][0], logits_of(load(tmp_path / "mixtral"))) > 1e-3  # the control


@pytest.mark.slow
def test_more_models_of_autoep_leave_as_folders_with_their_logits(pool: RankPool, tmp_path: Path) -> None:
    by_rank = pool.run(4, each_exported_by_autoep, tmp_path, MORE_AUTOEP, timeout_s=200)
    for index, (family, *_) in enumerate(MORE_AUTOEP):
        model = load(tmp_path / family)
        for found in by_rank:
            assert distance(found[index], logits_of(model)) <= BOUND, family
        assert distance(logits_of(make_model(family)), logits_of(model)) > 1e-3, f"{family} was not trained"


def swap_two_experts(folder: Path, file_of: dict[str, str]) -> None:
    """Gives expert 1 of the first layer the down projection of expert 6, and the reverse."""
    one, other = (f"model.layers.0.block_sparse_moe.experts.{index}.w2.weight" for index in (1, 6))
    weights = {name: load_file(folder / file_of[name])[name] for name in (one, other)}
    for name, value in ((one, weights[other]), (other, weights[one])):
        tensors = load_file(folder / file_of[name]) | {name: value}
        save_file(tensors, folder / file_of[name], {"format": "pt"})


@pytest.mark.parametrize("cases", [OWN, pytest.param(MORE_OWN, marks=pytest.mark.slow)], ids=["some", "others"])
def test_folders_train_as_layers_of_the_package_and_leave_as_folders(
    pool: RankPool, tmp_path: Path, cases: Own
) -> None:
    by_rank = pool.run(4, loaded_and_exported, tmp_path, cases, timeout_s=200)
    for index, (family, *_) in enumerate(cases):
        model = load(tmp_path / family)
        values = json.loads((tmp_path / f"source_{family}/config.json").read_text())
        assert differences(values, tmp_path / family).keys() <= {"transformers_version", "auto_map"}, family
        for found in by_rank:
            start, after = found[index]
            assert start <= BOUND, family
            assert distance(after, logits_of(model)) <= BOUND, family
        assert distance(logits_of(load(tmp_path / f"source_{family}")), logits_of(model)) > 1e-3, family


def exported_with_adapters(folder: Path) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Logits of a model with adapters on experts, attention and a whole head: at first, trained, and behind its export;
    and whether each of its weights is what it was before that."""
    from peft import LoraConfig, get_peft_model

    if dist.get_rank() == 0:
        make_model("mixtral").save_pretrained(folder / "source")
    dist.barrier()
    torch.manual_seed(dist.get_rank())  # experts' adapters differ on the ranks; DeepSpeed makes the others alike
    lora = LoraConfig(
        r=4, target_modules=["down", "up", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = get_peft_model(ds_moe_ep.from_pretrained(folder / "source", 2), lora)
    engine = train_one_step(model, ds_config(1))
    trained = logits_of(engine)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    ds_moe_ep.save_pretrained(engine, folder / "merged")
    after = engine.module.state_dict()
    is_kept = before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    again = logits_of(engine)
    with engine.module.disable_adapter():
        return logits_of(engine), trained, again, is_kept


def test_adapters_on_experts_leave_as_a_part_of_the_weights_and_stay_in_the_engine(
    pool: RankPool, tmp_path: Path
) -> None:
    by_rank = pool.run(2, exported_with_adapters, tmp_path, timeout_s=200)
    model = load(tmp_path / "merged")
    for without, trained, again, is_kept in by_rank:
        assert is_kept and torch.equal(trained, again)
        assert distance(trained, logits_of(model)) <= BOUND
        assert distance(without, logits_of(model)) > 1e-2, "the control: adapters that do not leave are seen"


def refusals(folder: Path) -> list[str]:
    """Errors on this rank when an export cannot be made."""
    engine = train_one_step(make_model("mixtral"), ds_config(0, {"autoep_size": 2, "preset_model": "mixtral"}))
    told = []

    def told_by(*args: Any) -> str:
        with pytest.raises(EngineError) as error:
            ds_moe_ep.save_pretrained(*args)
        return str(error.value)

    told.append(told_by(engine, folder / "there"))
    told.append(told_by(engine, folder / "file" / "under_a_file"))
    engine.module.config.model_type = "granite"
    with pytest.raises(ConfigError) as unknown:
        ds_moe_ep.save_pretrained(engine, folder / "new")
    return [*told, str(unknown.value)]


def test_exports_that_cannot_be_made_are_refused_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for exists, cannot_write, unknown in pool.run(2, refusals, tmp_path, timeout_s=120):
        assert "there: exists, and an export overwrites nothing" in exists
        assert "rank 0 cannot write the folder" in cannot_write
        assert "config.model_type='granite': files of this family are not known" in unknown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_models_files_have_its_own_names_and_no_place_for_weights_around_it() -> None:
    from ds_moe_ep.engine.hugging_face.adapters import unwrapped

    model = make_model("olmoe")
    compiled: Any = torch.compile(model, backend="eager")
    for around in (model, compiled, Around(model), Around(compiled)):
        assert unwrapped(around) is model
    with pytest.raises(ExportError, match=r"model=Around: head.weight lies outside of language_model \(OlmoeFor"):
        unwrapped(Around(model, torch.nn.Linear(2, 1)))


def test_the_configuration_names_the_type_of_the_written_weights(tmp_path: Path) -> None:
    from ds_moe_ep.engine.hugging_face.export import describe

    model = make_model("olmoe").bfloat16()
    before = model.config.to_dict()
    tmp_path.joinpath("folder").mkdir()
    describe(model, tmp_path / "folder")
    assert json.loads((tmp_path / "folder/config.json").read_text())["dtype"] == "bfloat16"
    assert model.config.to_dict() == before, "the engine's model keeps its own"


def test_files_of_fewer_bits_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """Before a weight is read: the folder holds a configuration alone."""
    from transformers import GptOssConfig

    GptOssConfig(quantization_config={"quant_method": "mxfp4"}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config.quantization_config: .*gpt-oss.*Mxfp4Config\(dequantize=True\)"):
        ds_moe_ep.from_pretrained(tmp_path)


def test_stacks_of_experts_with_other_bounds_than_the_configuration_says_are_not_exported() -> None:
    from ds_moe_ep.engine.hugging_face.blocks import blocks_of
    from ds_moe_ep.engine.hugging_face.families import FAMILIES
    from ds_moe_ep.engine.hugging_face.stacks import BlockStacks
    from ds_moe_ep.kernels.activation import Clamp

    config = ds_moe_ep.MoEConfig(num_experts=2, gate_bias=True)
    experts = (ds_moe_ep.ClampedSwiGLU(8, 16, limit=6.0), ds_moe_ep.SwiGLU(8, 16))
    for expert, told in zip(experts, ("an expert computes with Clamp", "an expert computes swiglu"), strict=True):
        model = torch.nn.ModuleDict({"mlp": ds_moe_ep.MoE(8, expert, config=config)})
        (block,) = blocks_of(model, FAMILIES["gpt_oss"])
        with pytest.raises(ExportError, match=told):
            BlockStacks(block).check(Clamp(1.702, 7.0))


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "olmoe"
    make_model("olmoe").save_pretrained(folder)
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def refusal() -> str:
        with pytest.raises(EngineError) as error:
            ds_moe_ep.from_pretrained(folder)
        return str(error.value)

    save_file({key: value for key, value in whole.items() if key != name}, file)
    assert f"has no {name}" in refusal()
    save_file(whole | {"model.layers.1.mlp.experts.8.up_proj.weight": whole[name].clone()}, file)
    assert "1 tensors have no place in the model, model.layers.1.mlp.experts.8.up_proj.weight first" in refusal()
    save_file(whole | {name: whole[name][:3].clone()}, file)
    assert f"{name} is (3, 32)" in refusal()
    file.write_bytes(file.read_bytes()[:1000])
    assert "holds neither a whole" in refusal()
    file.unlink()
    assert "name a Hugging Face folder with safetensors files" in refusal()


def test_routers_that_the_layer_does_not_have_are_refused(tmp_path: Path) -> None:
    make_model("mixtral", router_jitter_noise=0.1).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ConfigError, match=r"router_jitter_noise multiplies the experts' input; .* attach_overlap"):
        ds_moe_ep.from_pretrained(tmp_path / "mixtral")
    make_model("deepseek_v3").save_pretrained(tmp_path / "deepseek_v3")
    with pytest.raises(ConfigError, match=r"moe_ep\.balance='aux_loss': the router of deepseek_v3 chooses with a bias"):
        ds_moe_ep.from_pretrained(tmp_path / "deepseek_v3", balance="aux_loss")
    make_model("olmoe").save_pretrained(tmp_path / "olmoe")
    with pytest.raises(ConfigError, match=r"moe_ep\.top_k=1: the folder's config decides it"):
        ds_moe_ep.from_pretrained(tmp_path / "olmoe", top_k=1)


def test_the_bias_of_a_family_stands_still_unless_it_is_given_a_step(tmp_path: Path) -> None:
    source = make_model("deepseek_v3")
    source.save_pretrained(tmp_path)
    expected_E = source.model.layers[1].mlp.gate.e_score_correction_bias
    for step in (0.0, 0.5):
        model = ds_moe_ep.from_pretrained(tmp_path, bias_step=step, balance="bias_and_aux_loss", dtype=torch.bfloat16)
        balance = model.model.layers[1].mlp.moe.balance
        assert torch.equal(balance.bias_E, expected_E)
        model.train()(input_ids=token_ids())
        balance.step(lambda values: values)
        assert torch.equal(balance.bias_E, expected_E) == (step == 0)
        assert (balance.bias_E - expected_E).abs().max() <= step + 1e-6
        assert ds_moe_ep.balance_loss(model) > 0


def test_the_balance_loss_of_a_model_is_the_sum_of_its_blocks(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    model = ds_moe_ep.from_pretrained(tmp_path, balance="aux_loss", aux_loss_weight=0.5).train()
    model(input_ids=token_ids())
    blocks = [module.l_aux for module in model.modules() if hasattr(module, "l_aux") and hasattr(module, "moe")]
    assert len(blocks) == 2
    loss = ds_moe_ep.balance_loss(model)
    assert loss.item() == pytest.approx(sum(block.item() for block in blocks))
    assert loss.item() > 0.5  # the least of each is its weight
    loss.backward()
    assert model.model.layers[0].mlp.moe.deepspeed_moe.gate.wg.weight.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="has no block"):
        ds_moe_ep.balance_loss(torch.nn.Linear(2, 2))


def test_an_expert_that_computes_something_else_is_not_exported_as_silu() -> None:
    from ds_moe_ep.engine.hugging_face.blocks import blocks_of
    from ds_moe_ep.engine.hugging_face.families import FAMILIES

    config = ds_moe_ep.MoEConfig(num_experts=2)
    model = torch.nn.ModuleDict({"mlp": ds_moe_ep.MoE(8, ds_moe_ep.GeluMLP(8, 16), config=config)})
    (block,) = blocks_of(model, FAMILIES["olmoe"])
    with pytest.raises(ExportError, match="an expert computes gelu"):
        list(block.experts(0))
