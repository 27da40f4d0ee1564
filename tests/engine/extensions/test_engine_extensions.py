"""Each method of an engine is wrapped once, however many callbacks act in it; uninstalling gives back its own."""

from __future__ import annotations

from typing import Any

from tests.engine.test_doors import BIAS, Net, deepspeeds_layer, ds_config, own_layer, plain_engine, seeded, tokens
from tests.ranks import RankPool

# "scale" is wrapped where DeepSpeed forgets the loss scale, and its own clipping where it clips fp32 gradients.
ALWAYS = ["forward", "backward", "step", "save_checkpoint", "load_checkpoint"]
OF_OWN_LAYERS = {"fp32": ["clip_fp32_gradients", "_take_model_step"], "fp16": ["backward", "scale", "_take_model_step"]}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}


def num_wrappers(owner: Any, name: str) -> int:
    """Functions around the class's own method."""
    method, number = getattr(owner, name), 0
    while getattr(method, "__func__", None) is not getattr(type(owner), name):
        method, number = method.__wrapped__, number + 1
    return number


def wrapped(engine: Any) -> dict[str, int]:
    from ds_moe_ep.engine.extensions.engine_extensions import METHODS

    methods = [name for name in METHODS if hasattr(type(engine), name)]  # some are of a pipeline's engine
    return {name: number for name in methods if (number := num_wrappers(engine, name))}


def wrapped_optimizer(engine: Any) -> dict[str, int]:
    names = ("step", "unscale_and_clip_grads", "check_overflow")
    return {
        name: number
        for name in names
        if name in vars(engine.optimizer) and (number := num_wrappers(engine.optimizer, name))
    }


def counts() -> dict[str, Any]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    get_accelerator().is_fp16_supported = lambda: True  # the wrapper of fp16 is made; nothing is trained with it here
    meter = {"meter_every": 1}
    made = {
        "fp32": lambda: plain_engine(own_layer(**BIAS), deepspeeds_layer(), gas=2, moe_ep=meter),
        "fp16": lambda: plain_engine(own_layer(**BIAS), moe_ep=meter, **FP16),
        "ZeRO-1": lambda: plain_engine(own_layer(**BIAS), stage=1, moe_ep=meter),
        "DeepSpeed's": lambda: plain_engine(deepspeeds_layer(), moe_ep=meter),
    }
    found: dict[str, Any] = {}
    for name, make in made.items():
        engine = make()
        before, optimizer, attributes = wrapped(engine), wrapped_optimizer(engine), dict(vars(engine))
        handle = ds_moe_ep.attach_overlap(engine)
        extended, its_optimizer = wrapped(engine), wrapped_optimizer(engine)
        if name == "fp32":
            found["after a step"] = stepped(engine)
        handle.remove()
        same = [
            each for each in attributes if callable(attributes[each]) and vars(engine)[each] is not attributes[each]
        ]
        found[name] = before, extended, wrapped(engine), optimizer, its_optimizer, wrapped_optimizer(engine), same
    config = ds_config(moe_ep={"attach": True, **meter})
    engine = ds_moe_ep.initialize(model=seeded(0, Net(own_layer(**BIAS), deepspeeds_layer())), config=config)[0]
    found["our door"] = wrapped(engine)
    engine.step = wrap(engine.step)
    found["control"] = wrapped(engine)["step"]
    return found


def stepped(engine: Any) -> dict[str, int]:
    engine.backward(engine(tokens(0)))
    engine.step()
    return wrapped(engine)


def wrap(method: Any) -> Any:
    import functools

    return functools.wraps(method)(lambda *args: method(*args))


def once(names: list[str]) -> dict[str, int]:
    return dict.fromkeys(sorted(names), 1)


def test_each_method_is_wrapped_once_and_gets_its_original_back(pool: RankPool) -> None:
    for found in pool.run(2, counts, timeout_s=120):
        every = {name: dict(sorted(each.items())) for name, each in found.items() if isinstance(each, dict)}
        fp32 = once([*ALWAYS, *OF_OWN_LAYERS["fp32"]])
        assert every == {"after a step": fp32, "our door": fp32}
        assert found["control"] == 2, "the count must see a second wrapper"
        for name, own in {**OF_OWN_LAYERS, "ZeRO-1": ["_take_model_step"], "DeepSpeed's": []}.items():
            before, extended, after, *optimizers, changed = found[name]
            gets = [*own, *(["clip_fp32_gradients"] if name == "DeepSpeed's" else [])]
            assert dict(sorted(before.items())) == once(own), name
            assert dict(sorted(extended.items())) == once([*{*ALWAYS, *gets}]), name
            assert after == before and changed == [], name
            expected = once(["step", "unscale_and_clip_grads"]) if name == "fp16" else {}
            assert optimizers == [expected] * 3, name


def test_every_callback_has_one_place_in_the_order() -> None:
    from ds_moe_ep.engine.extensions.callback import EngineCallback
    from ds_moe_ep.engine.extensions.order import ORDER

    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == set(EngineCallback.__subclasses__())
