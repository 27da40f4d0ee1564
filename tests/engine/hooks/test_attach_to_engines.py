"""`attach_overlap` on engines that somebody else made: the package's own layers, DeepSpeed's, and both in one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ds_moe_ep.comm.callbacks import TransferCallback
from tests.engine.test_doors import BIAS, Net, deepspeeds_layer, ds_config, own_layer, plain_engine, refusal, tokens
from tests.ranks import RankPool

Trace = list[tuple[float, list[int] | None]]
KNOBS = {"schedule": "chunks", "chunks": 2, "transport": "collective"}


class Messages(TransferCallback):
    """Counts what is sent."""

    def __init__(self) -> None:
        self.count = 0

    def before_send(self, message: Any) -> None:
        self.count += 1


def train(engine: Any, first: int = 0, count: int = 4) -> Trace:
    """Loss and bias of each micro-batch."""
    trace: Trace = []
    for index in range(first, first + count):
        loss = engine(tokens(index))
        engine.backward(loss)
        engine.step()
        balance = getattr(engine.module.layers[0], "balance", None)
        trace.append((float(loss), None if balance is None else balance.steps_E.tolist()))
    return trace


def own_engine(**section: Any) -> Any:
    """With a schedule of its own: "auto" measures again after remove(), and may choose another."""
    section = {"schedule": "peers", "meter_every": 1, **section}
    return plain_engine(own_layer(**BIAS), own_layer(), gas=2, moe_ep=section)


def mixed_engine(**section: Any) -> Any:
    section = {"schedule": "peers", **section}
    return plain_engine(own_layer(**BIAS), deepspeeds_layer(), gas=2, moe_ep=section)


def shape_of(engine: Any) -> dict[str, Any]:
    """Changes by attaching, and what removing gives back."""
    from ds_moe_ep.engine.extensions.engine_extensions import METHODS
    from ds_moe_ep.engine.extensions.install import ATTRIBUTES

    links = [getattr(layer, "dispatcher", None) for layer in engine.module.layers]
    return {
        "attributes": {name: vars(engine).get(name) for name in (*METHODS, *ATTRIBUTES)},
        "classes": [type(module).__qualname__ for module in engine.module.modules()],
        "configs": [getattr(layer, "config", None) for layer in engine.module.layers],
        "schedules": [
            each and (str(each.connection.forward), type(each.connection.transport).__name__) for each in links
        ],
        "recorders": [each and (type(each.recorder).__name__, each.is_blocking) for each in links],
    }


def attach_cases(folder: str) -> dict[str, Any]:
    import deepspeed

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for name, make in {"own": own_engine, "mixed": mixed_engine}.items():
        alone, engine, messages = train(make(), count=8), make(), Messages()
        before, seen = shape_of(engine), train(engine, count=2)
        handle = ds_moe_ep.attach_overlap(engine, KNOBS, callbacks=[messages])
        found[f"{name}, layers"] = str(handle), list(engine.moe_ep_layers), [vars(c) for c in configs(handle)]
        seen += train(engine, 2, 4)
        if name == "own":
            found["measured"] = engine.moe_ep_meter.last is not None
            found["incomplete"] = load_without_an_expert(engine, folder)
        found["again"] = refusal(lambda engine=engine: ds_moe_ep.attach_overlap(engine))
        handle.remove()
        handle.remove()
        count, seen = messages.count, seen + train(engine, 6, 2)
        found[f"{name}, messages"] = count > 0, messages.count == count
        found[f"{name}, traces"] = seen, alone
        after = shape_of(engine)
        found[f"{name}, changed"] = [part for part in before if after[part] != before[part]]
        found[f"{name}, recorder"] = after["recorders"][0]
    found["first after our door"] = refusal(after_our_door)
    found["knob"] = refusal(lambda: ds_moe_ep.attach_overlap(own_engine(), {"shedule": "serial"}))
    found["no engine"] = refusal(lambda: ds_moe_ep.attach_overlap(own_engine().module))
    found["section of hooks"] = sections_of_hooks()
    return found


def configs(handle: Any) -> list[Any]:
    return [layer.config for layer in handle.layers.values()]


def load_without_an_expert(engine: Any, folder: str) -> str:
    """Error of loading a checkpoint that lacks an expert's file."""
    engine.save_checkpoint(folder, tag="one")
    if dist.get_rank() == 0:
        (Path(folder) / "one" / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()
    dist.barrier()
    return refusal(lambda: engine.load_checkpoint(folder))


def after_our_door() -> None:
    import ds_moe_ep

    engine = ds_moe_ep.initialize(model=Net(own_layer()), config=ds_config())[0]
    ds_moe_ep.attach_overlap(engine)


def sections_of_hooks() -> tuple[str, str, str, str]:
    """Effects of a section for hooks on an engine with DeepSpeed's layers alone, and what of it is refused."""
    import ds_moe_ep

    engine = plain_engine(deepspeeds_layer(), moe_ep={"schedule": "chunks", "depth": 1, "num_experts": 4})
    with ds_moe_ep.attach_overlap(engine, {"depth": 0}) as handle:
        (config,) = configs(handle)
    misspelt = plain_engine(deepspeeds_layer(), moe_ep={"epsize": 2} if dist.get_rank() == 1 else {})
    contrary = plain_engine(deepspeeds_layer(), moe_ep={"top_k": 2})
    return (
        config.schedule,
        str(config.depth),
        refusal(lambda: ds_moe_ep.attach_overlap(misspelt)),
        refusal(lambda: ds_moe_ep.attach_overlap(contrary)),
    )


@pytest.fixture(scope="module")
def found(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = pool.run(2, attach_cases, str(tmp_path_factory.mktemp("checkpoint")), timeout_s=150)
    assert {name for name in first if first[name] != second[name]} <= {"own, traces", "mixed, traces"}  # the losses
    return first


@pytest.mark.parametrize("name", ["own", "mixed"])
def test_attached_engines_train_as_plain_ones_and_their_bias_moves_once_a_step(
    name: str, found: dict[str, Any]
) -> None:
    seen, alone = found[f"{name}, traces"]
    assert seen == alone
    steps = [steps for _, steps in seen]
    assert steps[0] == [0] * 4 and steps[1] == steps[2] != steps[0] and steps[3] == steps[4] != steps[1]
    assert max(map(abs, steps[7])) <= 4, "one step at a time"


@pytest.mark.parametrize("name", ["own", "mixed"])
def test_every_layer_takes_the_knobs_and_remove_gives_all_back(name: str, found: dict[str, Any]) -> None:
    text, layers, knobs = found[f"{name}, layers"]
    assert "layers.0: ds_moe_ep.MoE, schedule 'chunks'" in text and layers[0] == "layers.0" and len(layers) == 2
    assert all(all(config[knob] == value for knob, value in KNOBS.items()) for config in knobs)
    assert found[f"{name}, messages"] == (True, True), "the callbacks heard messages, and none after remove()"
    assert found[f"{name}, changed"] == [] and found[f"{name}, recorder"] == ("Off", False)


def test_own_layers_get_the_meter_and_the_safe_checkpoints(found: dict[str, Any]) -> None:
    assert found["measured"]
    assert "layer_1_expert_3_*" in found["incomplete"] and found["incomplete"].startswith("EngineError")


def test_what_cannot_be_attached_is_refused_by_name(found: dict[str, Any]) -> None:
    assert "remove() the earlier handle" in found["again"]
    assert "from ds_moe_ep.initialize" in found["first after our door"] and "leave this one out" in found["again"]
    assert "config.shedule='serial'" in found["knob"] and "did you mean 'schedule'" in found["knob"]
    assert "pass that" in found["no engine"]


def test_hooks_on_an_engine_read_its_section(found: dict[str, Any]) -> None:
    schedule, depth, misspelt, contrary = found["section of hooks"]
    assert (schedule, depth) == ("chunks", "0"), "attach_overlap's own knobs go before the section's"
    assert "did you mean 'ep_size'" in misspelt, "on the rank without the typing error too"
    assert "moe_ep.top_k=2: the hooked layer layers.0 has 1" in contrary
