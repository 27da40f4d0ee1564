"""Reading a ds_config: its file, its section "moe_ep", and what DeepSpeed makes of the rest."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.config import deepspeed_keys
from ds_moe_ep.config.knobs import SMALL, SPECIFICATION, Layout, MoEConfig
from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.config.training import check_keys, read_training
from ds_moe_ep.errors import ConfigError, TopologyError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_and_a_mapping_load_equally_and_the_mapping_is_copied(tmp_path: Path) -> None:
    values = {"train_batch_size": 4, "moe_ep": {"top_k": 2}}
    path = write(tmp_path, json.dumps(values))
    loaded = load_ds_config(values)
    assert loaded == load_ds_config(path) == load_ds_config(str(path)) == values
    assert loaded is not values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', r"line 1, column \d+ is not JSON"),
        ("{\n// comment\n}", "line 2, column 1 is not JSON .*remove comments"),
        ("[1]", "holds a list; a ds_config is an object"),
        ('{"moe_ep": {"top_k": 1, "top_k": 2}}', "top_k=2: the key stands twice"),
        ("", "line 1, column 1 is not JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ds_config(write(tmp_path, text))


def test_a_missing_file_and_a_binary_one_are_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config='.*none\.json': cannot be read \(No such file"):
        load_ds_config(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.json': is not UTF-8"):
        load_ds_config(tmp_path / "binary.json")


def test_the_section_tells_which_knobs_were_given() -> None:
    section = read_section({"moe_ep": {"ep_size": 4, "top_k": 2, "model": "small"}})
    assert section.moe == MoEConfig(ep_size=4, top_k=2)
    assert section.model is SMALL
    assert section.given == {"ep_size", "top_k"}


def test_without_a_section_nothing_is_given() -> None:
    section = read_section({"train_batch_size": 4})
    assert (section.moe, section.model, section.given) == (MoEConfig(), None, frozenset())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("specification", SPECIFICATION),
        ({"name": "small"}, SMALL),
        ({"hidden_size": 8192}, SPECIFICATION),
        (None, None),
    ],
)
def test_a_model_is_a_name_or_knobs(model: Any, expected: Any) -> None:
    assert read_section({"moe_ep": {"model": model}}).model == expected


def test_a_named_model_is_changed_by_the_other_knobs() -> None:
    model = read_section({"moe_ep": {"model": {"name": "small", "num_layers": 2}}}).model
    assert model is not None
    assert (model.num_layers, model.hidden_size) == (2, SMALL.hidden_size)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"tp_size": 8, "pp_size": 2}, Layout(tp_size=8, pp_size=2)),
        ({"pp_size": 4}, Layout(pp_size=4)),
        ({}, Layout()),
        (None, Layout()),
    ],
)
def test_a_layout_is_an_object_of_knobs_and_no_layer_knob(layout: Any, expected: Layout) -> None:
    section = read_section({"moe_ep": {"top_k": 2, "layout": layout, "model": "small"}})
    assert (section.layout, section.given) == (expected, {"top_k"})


@pytest.mark.parametrize(
    ("ds_config", "message"),
    [
        ({"moe_ep": {"layout": {"tp_sise": 2}}}, "moe_ep.layout.tp_sise=2: unknown key; did you mean 'tp_size'?"),
        ({"moe_ep": {"layout": {"tp_size": 16}, "model": "small"}}, "tp_size=16 does not divide .*num_heads=8"),
        ({"moe_ep": 3}, "moe_ep=3: expected an object"),
        ({"moe_ep": {"epsize": 4}}, "moe_ep.epsize=4: unknown key; did you mean 'ep_size'?"),
        ({"moe-ep": {}}, "moe-ep={}: DeepSpeed would ignore this key; did you mean 'moe_ep'?"),
        ({"MoE_EP": {}}, "did you mean 'moe_ep'?"),
        ({"moe_ep": {"model": {"name": "smal"}}}, "moe_ep.model.name='smal' is no known model"),
        ({"moe_ep": {"model": {"name": 1}}}, "moe_ep.model.name=1: names the model"),
        ({"moe_ep": {"model": {"name": "small", "width": 1}}}, "moe_ep.model.width=1: unknown key"),
        ({"moe_ep": {"model": 3}}, "moe_ep.model=3: expected an object"),
    ],
)
def test_a_bad_section_is_refused_by_path(ds_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_section(ds_config)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_ds_config_of_the_repository_loads(path: Path) -> None:
    ds_config = load_ds_config(path)
    section = read_section(ds_config)
    training = read_training(ds_config, section.moe.ep_size, layout=section.layout)
    assert training.batch == ds_config["train_batch_size"]


@pytest.mark.parametrize(
    ("batch", "micro_batch", "accumulation", "expected"),
    [
        (64, 2, 8, (2, 8)),
        (64, 2, None, (2, 8)),
        (64, None, 8, (2, 8)),
        (None, 2, 8, (2, 8)),
        (64, None, None, (16, 1)),
        (None, 2, None, (2, 1)),
    ],
)
def test_missing_batch_sizes_are_derived_as_deepspeed_does(
    batch: int | None, micro_batch: int | None, accumulation: int | None, expected: tuple[int, int]
) -> None:
    ds_config = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    training = read_training(ds_config, ep_size=2, world_size=4)
    assert (training.micro_batch, training.accumulation) == expected


def test_the_world_is_what_the_batch_sizes_imply_else_one_expert_group() -> None:
    whole = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    assert read_training(whole, ep_size=4).world_size == 8
    assert read_training({"train_micro_batch_size_per_gpu": 2}, ep_size=4).world_size == 4


def test_a_layouts_batch_counts_copies_of_the_model_and_not_ranks() -> None:
    layout = Layout(tp_size=2, pp_size=4)
    whole = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}
    training = read_training(whole, ep_size=1, layout=layout)
    assert (training.world_size, training.num_copies, training.batch) == (32, 4, 64)
    fewer = read_training({"train_batch_size": 64}, ep_size=1, world_size=16, layout=layout)
    assert (fewer.micro_batch, fewer.accumulation, fewer.num_copies) == (32, 1, 2)
    assert read_training({"train_micro_batch_size_per_gpu": 2}, ep_size=1, layout=layout).world_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 100}, r"train_batch_size=100: must be .* = 2 \* 2 \* 4 = 16; use a multiple of 8"),
        ({"train_batch_size": 64}, "train_batch_size=64: must be .*set gradient_accumulation_steps to 8"),
        ({"train_batch_size": None, "train_micro_batch_size_per_gpu": None}, "train_batch_size=null: .* give one"),
        ({"train_batch_size": 2, "gradient_accumulation_steps": None}, "train_batch_size=2: must be"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0: .*at least 1"),
        ({"train_batch_size": "auto"}, "train_batch_size='auto': needs a whole number"),
        ({"zero_optimization": {"stage": 3}}, "stage=3: DeepSpeed refuses .* use stage 1 or 2"),
        ({"zero_optimization": {"stage": 4}}, "stage=4: a ZeRO stage is"),
        ({"zero_optimization": True}, "zero_optimization=True: expected an object"),
        ({"zero_optimization": {"overlap_com": 1}}, "overlap_com=1: unknown key; did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}, "reduce_bucket_size=0: needs"),
        ({"zero_optimisation": {}}, "zero_optimisation={}: .*did you mean 'zero_optimization'?"),
        ({"elasticity": {}}, r"elasticity={}: DeepSpeed 0\.19\.8 has removed this"),
        ({"autotuning": {"enabled": True}}, "autotuning.enabled=true: .*set it to false"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled=true with bf16.enabled=true"),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled='auto': needs true or false"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype='fp8': unknown"),
        ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}}, "only under ZeRO"),
        ({"optimizer": {"type": 1}}, "optimizer.type=1: names an optimizer"),
    ],
)
def test_what_cannot_train_is_refused_by_path(changes: dict[str, Any], message: str) -> None:
    ds_config: dict[str, Any] = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
    }
    assert read_training(ds_config, ep_size=2, world_size=4).batch == 16  # the control: only the change is wrong
    with pytest.raises(ConfigError, match=message):
        read_training({**ds_config, **changes}, ep_size=2, world_size=4)


@pytest.mark.parametrize(("ep_size", "world_size"), [(16, 24), (16, 8)])
def test_a_world_that_ep_size_does_not_divide_is_refused(ep_size: int, world_size: int) -> None:
    with pytest.raises(TopologyError, match="ep_size=16"):
        read_training({"train_micro_batch_size_per_gpu": 1}, ep_size, world_size)


@pytest.mark.parametrize(
    ("ds_config", "states"),
    [
        ({}, 2),
        ({"optimizer": {"type": "AdamW"}}, 2),
        ({"optimizer": {"type": "Lion"}}, 1),
        ({"optimizer": {"type": "SGD"}}, 0),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, 1),
    ],
)
def test_an_optimizers_states_are_counted(ds_config: dict[str, Any], states: int) -> None:
    training = read_training({"train_micro_batch_size_per_gpu": 1, **ds_config}, ep_size=1)
    assert training.optimizer_states == states


@pytest.mark.parametrize(
    ("release", "key", "where"),
    [
        ("0.17.6", "elasticity", "known"),
        ("0.17.6", "datastates_ckpt", "later"),
        ("0.17.6", "quantize_training", "unknown"),
        ("0.18.0", "datastates_ckpt", "known"),  # it may have it: what either neighbour knows passes
        ("0.18.9+local", "datastates_ckpt", "known"),
        ("0.18.9", "expert_parallel", "later"),
        ("0.19.3", "expert_parallel", "known"),
        ("0.19.3", "elasticity", "known"),  # it may have it still
        ("0.19.8", "elasticity", "removed"),
        ("0.19.8", "quantize_training", "removed"),
        ("0.20.0", "elasticity", "removed"),
        ("0.20.0", "expert_parallel", "known"),
    ],
)
def test_a_key_is_known_by_the_releases_that_read_it(release: str, key: str, where: str) -> None:
    keys = deepspeed_keys.keys_of(deepspeed_keys.TOP_LEVEL, release)
    places = {"known": keys.known, "later": keys.later, "removed": keys.removed}
    assert [name for name, found in places.items() if key in found] == ([] if where == "unknown" else [where])


@pytest.mark.parametrize(
    ("release", "changes", "message"),
    [
        ("0.18.9", {"expert_parallel": {"enabled": True}}, r"0\.18\.9 does not read it.*'deepspeed>=0\.19\.8'"),
        ("0.17.6", {"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op='sum': DeepSpeed 0\.17\.6 does not read"),
        ("0.17.6", {"zero_optimization": {"leaf_module": {}}}, r"zero_optimization.leaf_module=.*0\.18\.9 does"),
        ("0.19.8", {"zero_optimization": {"mics_shard_size": 2}}, r"mics_shard_size=2: DeepSpeed 0\.19\.8 has removed"),
        ("0.17.6", {"zero_optimization": {"mics_shard_sise": 2}}, "did you mean 'mics_shard_size'"),
        ("0.17.6", {"expert_parallel": {"enabled": False}}, None),
        ("0.17.6", {"elasticity": {}, "zero_optimization": {"mics_shard_size": 2}}, None),
        ("0.19.8", {"expert_parallel": {"enabled": True}}, None),
    ],
)
def test_a_key_is_refused_by_the_release_that_is_installed(
    release: str, changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        check_keys(changes, release)
        return
    with pytest.raises(ConfigError, match=message):
        check_keys(changes, release)


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    """Read from DeepSpeed's sources, since importing it takes seconds."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("deepspeed is not installed")
    root = Path(found.origin).parent
    release = deepspeed_keys.installed_release()
    top_keys, zero_keys = (
        deepspeed_keys.keys_of(table, release) for table in (deepspeed_keys.TOP_LEVEL, deepspeed_keys.ZERO)
    )
    top = ast.parse((root / "runtime/config.py").read_text())
    removed = [
        set(ast.literal_eval(ast.Tuple(node.value.keys, ast.Load())))
        for node in top.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) in ("_REMOVED_TOP_LEVEL_CONFIG_KEYS", "_REMOVED_ZERO_CONFIG_KEYS")
        and isinstance(node.value, ast.Dict)
    ]
    assert removed == [keys for keys in (top_keys.removed, zero_keys.removed) if keys]
    zero = ast.parse((root / "runtime/zero/config.py").read_text())
    names = {
        ast.unparse(field.target).removeprefix("stage3_")
        for node in zero.body
        if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig"
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }
    assert names == zero_keys.known
    sources = "\n".join(path.read_text() for path in root.rglob("*.py"))

    def read(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if f'"{key}"' in sources or f"'{key}'" in sources]

    assert sorted(read(top_keys.known)) == sorted(top_keys.known)
    assert read(top_keys.later) == []
