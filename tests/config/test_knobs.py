"""The configurations: what they refuse, in which words, and what they answer before anything is built."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from ds_moe_ep.config.knobs import MODELS, SMALL, SPECIFICATION, Layout, ModelConfig, MoEConfig
from ds_moe_ep.errors import ConfigError, EngineError, MoEError, TopologyError, nearest

CONFIGS = (MoEConfig, ModelConfig, Layout)
FIELDS = [(config, field) for config in CONFIGS for field in dataclasses.fields(config)]
FIELD_IDS = [f"{config.__name__}.{field.name}" for config, field in FIELDS]


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=FIELD_IDS)
def test_every_knob_has_a_help_text_and_a_legal_default(config: Any, field: dataclasses.Field[Any]) -> None:
    assert field.metadata["help"]
    assert getattr(config(), field.name) == field.default


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=FIELD_IDS)
def test_every_knob_refuses_a_list_by_its_path(config: Any, field: dataclasses.Field[Any]) -> None:
    with pytest.raises(ConfigError, match=rf"\.{field.name}=\[1\]: "):
        config.from_dict({field.name: [1]})


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=FIELD_IDS)
def test_every_knob_takes_each_of_its_choices_or_refuses_values_below_its_minimum(
    config: Any, field: dataclasses.Field[Any]
) -> None:
    hint = get_type_hints(config)[field.name]
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            assert getattr(config.from_dict({field.name: choice}), field.name) == choice
        with pytest.raises(ConfigError, match="choose one of"):
            config.from_dict({field.name: "nonsense"})
    elif field.metadata["minimum"] is not None:
        below = field.metadata["minimum"] - 1
        with pytest.raises(ConfigError, match=f"{field.name}={below}: .* at least {field.metadata['minimum']}"):
            config.from_dict({field.name: below})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topk": 2}, "moe_ep.topk=2: unknown key; did you mean 'top_k'?"),
        ({"capacity": 1.0}, "did you mean 'min_capacity'|did you mean 'capacity_factor'"),
        ({"zzz": 1}, "moe_ep.zzz=1: unknown key; known keys: async_save, attach, "),
        ({"num_experts": 60, "ep_size": 16}, "num_experts=60 cannot be shared by ep_size=16: .*64"),
        ({"num_experts": 4, "top_k": 5}, "top_k=5: a token cannot visit more experts than num_experts=4"),
        ({"drop_policy": "random", "top_k": 2}, "drop_policy='random' with top_k=2"),
        ({"sample_second": True}, "sample_second=true with top_k=1"),
        ({"top_k": True}, "top_k=True: .*needs int"),
        ({"top_k": 1.0}, "top_k=1.0: .*needs int"),
        ({"top_k": "1"}, "top_k='1': .*needs int"),
        ({"renormalize": 1}, "renormalize=1: .*needs bool or null"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"top_k": None}, "top_k=None: .*needs int"),
        ({"replicas": "all"}, "replicas='all': .*needs int or 'auto'"),
        ({"replicas": True}, "replicas=True: .*needs int or 'auto'"),
        ({"replicas": 13, "ep_size": 4}, "replicas=13: other ranks have only 12 experts to copy; lower it, or"),
    ],
)
def test_a_bad_layer_knob_is_refused_with_path_rule_and_way_out(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("smal", "moe_ep.model='smal' is no known model; did you mean 'small'?"),
        ({"num_head": 2}, "moe_ep.model.num_head=2: unknown key; did you mean 'num_heads'?"),
        ({"hidden_size": 10, "num_heads": 4}, "hidden_size=10 is no multiple of num_heads=4"),
        ([], r"moe_ep.model=\[\]: expected an object"),
    ],
)
def test_a_bad_model_is_refused_with_path_rule_and_way_out(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("layout", "model", "moe", "message"),
    [
        ({"tp_size": 3}, {}, {}, r"layout.tp_size=3 does not divide moe_ep.model.num_heads=16: .*change one of them"),
        ({"tp_size": 16}, {"expert_width": 24}, {}, r"layout.tp_size=16 does not divide moe_ep.model.expert_width=24"),
        ({"tp_size": 4}, {"shared_expert_width": 6}, {}, r"tp_size=4 does not divide .*shared_expert_width=6"),
        ({"pp_size": 3}, {}, {}, r"layout.pp_size=3 does not divide moe_ep.model.num_layers=4: .*change one of them"),
        ({"tp_size": 2}, {}, {"ep_size": 3, "num_experts": 3}, r"ep_size=3 with moe_ep.layout.tp_size=2: .*take sizes"),
        (
            {"tp_size": 2},
            {"expert_bias": True},
            {},
            r"expert_bias=true with moe_ep.layout.tp_size=2: .*set it to false",
        ),
        ({"pp_size": 2}, {}, {"replicas": "auto"}, r"replicas='auto' with moe_ep.layout: .*set it to 0"),
        ({"pp_size": 2}, {}, {"balance": "bias"}, r"balance='bias' with .*ep_size=1: .*set it to 'aux_loss'"),
        ({"tp_size": 2}, {}, {"noise": "jitter"}, r"noise='jitter' with moe_ep.layout.tp_size=2: .*set it to 'none'"),
    ],
)
def test_a_model_that_a_layout_cannot_cut_is_refused_with_path_rule_and_way_out(
    layout: dict[str, int], model: dict[str, Any], moe: dict[str, Any], message: str
) -> None:
    Layout().check(ModelConfig(**model), MoEConfig(**moe))  # the control: whole, it is legal
    with pytest.raises(ConfigError, match=message):
        Layout(**layout).check(ModelConfig(**model), MoEConfig(**moe))


@pytest.mark.parametrize("replicas", [0, 1, 12, "auto"])
def test_replicas_are_a_number_of_slots_or_auto(replicas: int | str) -> None:
    assert MoEConfig.from_dict({"replicas": replicas, "ep_size": 4}).replicas == replicas


def test_a_layout_counts_the_ranks_of_one_copy_of_the_model() -> None:
    assert (Layout().size, Layout(tp_size=8, pp_size=2).size) == (1, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tpsize": 2}, r"moe_ep.layout.tpsize=2: unknown key; did you mean 'tp_size'\?"),
        ([8, 2], r"moe_ep.layout=\[8, 2\]: expected an object"),
        ({"pp_size": True}, r"moe_ep.layout.pp_size=True: .*needs int"),
    ],
)
def test_a_bad_layout_is_refused_with_path_and_rule(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.from_dict(values)


def test_configurations_are_frozen_and_take_keywords_alone() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig().top_k = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        MoEConfig(16)  # type: ignore[misc]


def test_a_whole_number_is_taken_where_a_float_is_asked() -> None:
    assert MoEConfig.from_dict({"capacity_factor": 2}).capacity_factor == 2


@pytest.mark.parametrize(
    ("top_k", "renormalize", "expected"), [(1, None, False), (2, None, True), (1, True, True), (2, False, False)]
)
def test_weights_are_renormalised_as_deepspeed_does_unless_told(
    top_k: int, renormalize: bool | None, expected: bool
) -> None:
    assert MoEConfig(top_k=top_k, renormalize=renormalize).renormalizes is expected


@pytest.mark.parametrize(
    ("tokens", "factor", "top_k", "minimum", "expected"),
    [
        (64, 1.0, 1, 4, 4),  # 64 tokens over 16 experts
        (65, 1.0, 1, 4, 5),  # rounded up
        (64, 1.25, 2, 4, 10),
        (16, 1.0, 1, 4, 4),  # the minimum
        (0, 1.0, 1, 0, 0),  # an empty batch
        (64, 0.0, 1, 0, 0),
    ],
)
def test_capacity_is_the_rounded_up_share_but_at_least_the_minimum(
    tokens: int, factor: float, top_k: int, minimum: int, expected: int
) -> None:
    config = MoEConfig(capacity_factor=factor, top_k=top_k, min_capacity=minimum)
    assert config.capacity(tokens, training=True) == expected


def test_capacity_follows_the_mode_and_is_absent_when_nothing_is_dropped() -> None:
    config = MoEConfig(eval_capacity_factor=2.0)
    assert config.capacity(64, training=True) is None
    assert config.capacity(64, training=False) == 8


def another_value(field: dataclasses.Field[Any]) -> Any:
    """A legal value of the knob that is not its default."""
    hint = get_type_hints(MoEConfig)[field.name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != field.default)
    kind = next(kind for kind in (bool, int, float, str) if kind in (get_args(hint) or (hint,)))
    return not field.default if kind is bool else kind((field.default or 0) + 1)


def test_the_fingerprint_changes_with_every_knob() -> None:
    prints = {MoEConfig().fingerprint(), MoEConfig(top_k=2).fingerprint()}
    for field in dataclasses.fields(MoEConfig):
        if field.name != "top_k":
            needs = {"sample_second": {"top_k": 2}, "topk_group": {"n_group": 2}}.get(field.name, {})
            prints.add(MoEConfig(**{field.name: another_value(field)}, **needs).fingerprint())
    assert len(prints) == 1 + len(dataclasses.fields(MoEConfig))


def test_equal_configurations_have_equal_fingerprints() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(MoEConfig(top_k=2))))
    assert MoEConfig.from_dict(values).fingerprint() == MoEConfig(top_k=2).fingerprint()


def test_the_specifications_model_has_its_shapes_and_537_million_parameters_an_expert() -> None:
    assert MODELS["specification"] is SPECIFICATION
    assert (SPECIFICATION.num_layers, SPECIFICATION.hidden_size, SPECIFICATION.num_heads) == (4, 8192, 16)
    assert (SPECIFICATION.expert_width, SPECIFICATION.sequence_length) == (32768, 10000)
    assert SPECIFICATION.expert_params == 536_870_912


@pytest.mark.parametrize(
    ("expert", "bias", "expected"),
    [("gelu", False, 24), ("gelu", True, 32), ("swiglu", False, 36), ("swiglu", True, 50)],
)
def test_parameters_of_an_expert_count_matrices_and_biases(expert: Any, bias: bool, expected: int) -> None:
    # by hand for D=2, F=6: GELU 2*2*6 and biases of 6 + 2, SwiGLU 3*2*6 and biases of 6 + 6 + 2
    model = ModelConfig(hidden_size=2, num_heads=1, expert_width=6, expert=expert, expert_bias=bias)
    assert model.expert_params == expected


def test_the_small_model_is_the_specifications_but_for_its_size() -> None:
    assert (SMALL.num_layers, SMALL.expert, SMALL.expert_width) == (4, "gelu", 4 * SMALL.hidden_size)


def test_a_capacity_is_rounded_as_deepspeed_rounds_it() -> None:
    """DeepSpeed multiplies in fp32 and takes the ceiling: a last bit decides over a row."""
    rows = {factor: MoEConfig(capacity_factor=factor, min_capacity=0).capacity(1600, True) for factor in (1.1, 1.2)}
    assert rows == {1.1: 110, 1.2: 121}


def test_errors_are_also_the_builtins_that_they_specialise() -> None:
    for error, builtin in ((ConfigError, ValueError), (TopologyError, ValueError), (EngineError, RuntimeError)):
        assert issubclass(error, MoEError) and issubclass(error, builtin)


def test_nearest_lists_all_names_when_none_is_close() -> None:
    assert nearest("zzz", ["b", "a"]) == "known keys: a, b"
    assert nearest("topk", ["top_k", "x"]) == "did you mean 'top_k'?"
