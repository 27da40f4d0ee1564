"""Training of a ds_config: precision, ZeRO stage, optimizer and batch, by DeepSpeed's rules.

Refuses what DeepSpeed or the layer would refuse later, on every rank and after minutes of starting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ds_moe_ep.config import deepspeed_keys
from ds_moe_ep.config.knobs import Layout
from ds_moe_ep.config.parallel_keys import UNCUT, DenseCut, cut_of_mpu, read_dense_cut, read_sequence_size
from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.config.shipped import shipped_ds_configs
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.errors import ConfigError, TopologyError, nearest

Precision = Literal["fp16", "bf16", "fp32"]

BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
DTYPE_NAMES: dict[str, Precision] = {
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
}
# fp32 numbers that an optimizer keeps for a parameter, beside the master weight
STATES = {"adam": 2, "adamw": 2, "lamb": 2, "muadam": 2, "muadamw": 2, "adagrad": 1, "lion": 1, "muon": 1}
WHOLE = Layout()  # every rank has the whole model, but for the experts of others
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training job: what DeepSpeed makes of a ds_config on a world of ranks."""

    world_size: int
    ep_size: int
    micro_batch: int  # sequences of one rank in one forward pass
    accumulation: int  # micro-batches of one optimizer step
    precision: Precision
    gradient_precision: Precision  # in which micro-batches are summed
    zero_stage: int
    optimizer: str
    optimizer_states: int  # fp32 numbers beside the master weight of a parameter
    offload: bool  # optimizer states lie in the host's memory
    bucket_elements: int  # numbers in DeepSpeed's buffers of gradients on their way; 0 without ZeRO
    layout: Layout = WHOLE
    dense_cut: DenseCut = UNCUT  # AutoTP's, or an mpu's
    sequence_ranks: int = 1  # that share a copy's sequences

    @property
    def sharing_ranks(self) -> int:
        """Ranks that share a copy's sequences: tensor ranks, and those of sequence parallelism."""
        return self.dense_cut.size * self.sequence_ranks

    @property
    def num_copies(self) -> int:
        """Ranks, or layouts of ranks, that train on sequences of their own: DeepSpeed's data-parallel size."""
        return self.world_size // self.layout.size // self.sharing_ranks

    @property
    def batch(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.micro_batch * self.accumulation * self.num_copies

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same experts: they share the experts' optimizer states under ZeRO."""
        return self.world_size // self.layout.pp_size // self.ep_size


def read_training(
    ds_config: Mapping[str, Any],
    ep_size: int,
    world_size: int | None = None,
    layout: Layout = WHOLE,
    tensor_ranks: int = 1,
) -> Training:
    """The job of `ds_config`, by default on the ranks that its batch sizes imply, else on the fewest that hold it.

    `tensor_ranks` are those of an mpu, which no ds_config names. DeepSpeed counts the batch over the data-parallel
    ranks of an mpu, and beside AutoTP over its tensor ranks too, though these have the same sequences. Raises
    ConfigError or TopologyError for what cannot work.
    """
    check_keys(ds_config, deepspeed_keys.installed_release())
    dense_cut, sequence_ranks = read_dense_cut(ds_config, world_size), read_sequence_size(ds_config, world_size)
    if tensor_ranks > 1:
        dense_cut = cut_of_mpu(ds_config, tensor_ranks, world_size)
    sharing_ranks = dense_cut.size * sequence_ranks
    counted_once = sharing_ranks if tensor_ranks > 1 else sequence_ranks
    if world_size is None:
        fewest = -(-ep_size // (layout.tp_size * sharing_ranks))  # copies on whose ranks of a stage all experts lie
        implied = _implied_copies(ds_config)
        world_size = layout.size * (implied * counted_once if implied else fewest * sharing_ranks)
        read_dense_cut(ds_config, world_size)  # does it divide that?
    try:
        num_counted = _count_copies(world_size, layout) // counted_once
        RankGrid(world_size=world_size, ep_size=ep_size, num_stages=layout.pp_size)
        micro_batch, accumulation = _read_batch(ds_config, num_counted, "ranks" if layout == WHOLE else "copies")
    except (ConfigError, TopologyError) as error:
        implied = _implied_copies(ds_config)
        is_about_world = isinstance(error, TopologyError) or implied is not None
        if not is_about_world or implied == world_size // layout.size // counted_once:
            raise
        raise type(error)(f"{error}{_shipped_for(world_size)}") from None
    precision = _read_precision(ds_config)
    zero = _section(ds_config, "zero_optimization")
    _check_engine(ds_config, zero, layout)
    stage = _read_stage(zero)
    name, states = _read_optimizer(ds_config)
    offload = stage > 0 and _section(zero, "offload_optimizer").get("device", "none") != "none"
    return Training(
        world_size=world_size,
        ep_size=ep_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        precision=precision,
        gradient_precision=_read_gradient_precision(ds_config, precision, stage),
        zero_stage=stage,
        optimizer=name,
        optimizer_states=states,
        offload=offload,
        bucket_elements=_read_bucket(zero, may_overlap=layout == WHOLE) if stage else 0,
        layout=layout,
        dense_cut=dense_cut,
        sequence_ranks=sequence_ranks,
    )


def micro_batch_fix(training: Training, fits: Callable[[Training], bool]) -> str | None:
    """The change that cuts the same batch into smaller micro-batches, the largest that fit; None where none does."""
    sequences = training.micro_batch * training.accumulation
    for micro_batch in range(training.micro_batch - 1, 0, -1):
        smaller = replace(training, micro_batch=micro_batch, accumulation=sequences // micro_batch)
        if sequences % micro_batch == 0 and fits(smaller):
            return (
                f"train_micro_batch_size_per_gpu={micro_batch} with gradient_accumulation_steps="
                f"{smaller.accumulation} fits"
            )
    return None


def most_sequences(fits: Callable[[int], bool]) -> int:
    """The largest number of sequences that fits, where fewer fit as well; 0 when one does not."""
    smallest_refused = 1
    while fits(smallest_refused):
        smallest_refused *= 2
    largest = smallest_refused // 2
    while smallest_refused - largest > 1:
        middle = (largest + smallest_refused) // 2
        largest, smallest_refused = (middle, smallest_refused) if fits(middle) else (largest, middle)
    return largest


def check_keys(ds_config: Mapping[str, Any], release: str) -> None:
    """Refuses keys that a release of DeepSpeed has removed or does not read yet, and those close to one it knows.

    Others pass: DeepSpeed ignores them, and another library may read them.
    """
    keys = deepspeed_keys.keys_of(deepspeed_keys.TOP_LEVEL, release)
    known = keys.known | {"moe_ep"}
    for key, value in ds_config.items():
        _check_release(key, key, value, keys, release)
        if key in known or key in keys.later:
            continue
        hint = nearest(key, known)
        if hint.startswith("did you mean"):
            raise ConfigError(f"{key}={value!r}: DeepSpeed would ignore this unknown key; {hint}")
    keys = deepspeed_keys.keys_of(deepspeed_keys.ZERO, release)
    for key, value in _section(ds_config, "zero_optimization").items():
        name = f"zero_optimization.{key}"
        _check_release(name, key, value, keys, release)
        if key not in keys.known and not key.startswith("stage3_"):
            hint = nearest(key, keys.known)
            raise ConfigError(f"{name}={value!r}: unknown key; {hint}")
    if _section(ds_config, "autotuning").get("enabled"):
        raise ConfigError(
            "autotuning.enabled=true: the autotuner restarts the job with other batch sizes and ZeRO stages, "
            "among them stage 3, which refuses MoE layers; set it to false"
        )


def _check_release(path: str, key: str, value: Any, keys: deepspeed_keys.Keys, release: str) -> None:
    """Refuses a key that other releases read."""
    if key in keys.removed:
        raise ConfigError(f"{path}={value!r}: DeepSpeed {release} has removed this; delete it")
    if key in keys.later and not _is_off(value):
        raise ConfigError(
            f"{path}={value!r}: DeepSpeed {release} does not read it, and {keys.later[key]} does; "
            f"pip install 'deepspeed>={keys.later[key]}', or delete it"
        )


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, Mapping) and not value.get("enabled", True))


def _check_engine(ds_config: Mapping[str, Any], zero: Mapping[str, Any], layout: Layout) -> None:
    """Refuses what DeepSpeed's pipeline engine, which runs a layout, does not take."""
    if layout == WHOLE:
        return
    cut = f"moe_ep.layout={layout.tp_size}x{layout.pp_size}"
    stage = zero.get("stage", 0)
    if stage in (2, 3):
        raise ConfigError(
            f"zero_optimization.stage={stage} with {cut}: DeepSpeed's pipeline engine keeps whole gradients and "
            "refuses ZeRO-2 and ZeRO-3; use stage 1"
        )
    if ds_config.get("managed_gradient_accumulation") is False:
        raise ConfigError(
            f"managed_gradient_accumulation=false with {cut}: DeepSpeed's pipeline engine counts the micro-batches "
            "itself; remove the key"
        )


def _count_copies(world_size: int, layout: Layout) -> int:
    if layout != WHOLE and (world_size < layout.size or world_size % layout.size):
        raise TopologyError(
            f"moe_ep.layout={layout.tp_size}x{layout.pp_size}: the world of {world_size} ranks is no multiple of "
            f"{layout.size}; start {layout.size} processes or change the layout"
        )
    return world_size // layout.size


def _shipped_for(world_size: int) -> str:
    """A clause that names the shipped ds_configs for so many ranks; empty where there are none."""
    fitting = [f"{name}.json" for name, ranks in shipped_sizes().items() if ranks == world_size]
    if not fitting:
        return ""
    verb, noun = "fits" if len(fitting) == 1 else "fit", "rank" if world_size == 1 else "ranks"
    return f", or take {' or '.join(fitting)}, which {verb} {world_size} {noun}"


def shipped_sizes() -> dict[str, int]:
    """The ranks that each shipped ds_config is for, by its name."""
    sizes: dict[str, int] = {}
    for name, path in shipped_ds_configs().items():
        ds_config = load_ds_config(path)
        section = read_section(ds_config)
        fewest = -(-section.moe.ep_size // section.layout.tp_size)
        sizes[name] = (_implied_copies(ds_config) or fewest) * section.layout.size
    return sizes


def _implied_copies(ds_config: Mapping[str, Any]) -> int | None:
    batch, micro_batch, accumulation = (ds_config.get(key) for key in BATCH_KEYS)
    whole = [value for value in (batch, micro_batch, accumulation) if isinstance(value, int) and value > 0]
    if len(whole) < 3 or whole[0] % (whole[1] * whole[2]):
        return None
    return whole[0] // (whole[1] * whole[2])


def _read_batch(ds_config: Mapping[str, Any], num_copies: int, copies: str) -> tuple[int, int]:
    """Micro-batch size and accumulation steps, with the missing ones derived as DeepSpeed does.

    `copies` says what each has sequences of its own.
    """
    batch, micro_batch, accumulation = (_positive(ds_config, key) for key in BATCH_KEYS)
    if batch is None and micro_batch is None:
        raise ConfigError(
            "train_batch_size=null: DeepSpeed needs it or train_micro_batch_size_per_gpu; give one of them"
        )
    if batch is not None:
        if micro_batch is None:
            micro_batch = batch // num_copies // (accumulation or 1)
        accumulation = accumulation or (batch // max(micro_batch, 1) // num_copies)
    assert micro_batch is not None
    accumulation = accumulation or 1
    product = micro_batch * accumulation * num_copies
    if batch is not None and (batch != product or not product):
        raise ConfigError(
            f"train_batch_size={batch}: must be train_micro_batch_size_per_gpu * gradient_accumulation_steps "
            f"* {copies} = {micro_batch} * {accumulation} * {num_copies} = {product}; "
            f"{_batch_fix(batch, micro_batch, num_copies)}"
        )
    return micro_batch, accumulation


def _batch_fix(batch: int, micro_batch: int, num_copies: int) -> str:
    whole, rest = divmod(batch, max(micro_batch, 1) * num_copies)
    if whole and not rest:
        return f"set gradient_accumulation_steps to {whole}"
    return f"use a multiple of {max(micro_batch, 1) * num_copies}, or start another number of ranks"


def _read_precision(ds_config: Mapping[str, Any]) -> Precision:
    bf16 = "bf16" if "bf16" in ds_config else "bfloat16"
    fp16_on, bf16_on = (_flag(ds_config, name) for name in ("fp16", bf16))
    if fp16_on and bf16_on:
        raise ConfigError(f"fp16.enabled=true with {bf16}.enabled=true: DeepSpeed trains in one; set one to false")
    return "fp16" if fp16_on else "bf16" if bf16_on else "fp32"


def _read_stage(zero: Mapping[str, Any]) -> int:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
        raise ConfigError(f"zero_optimization.stage={stage!r}: a ZeRO stage is 0, 1 or 2; choose one")
    if stage == 3:
        raise ConfigError(
            "zero_optimization.stage=3: DeepSpeed refuses its MoE class, and with it this layer, under stage "
            "3, which cuts every parameter over all ranks, experts too; use stage 1 or 2"
        )
    return stage


def _read_gradient_precision(ds_config: Mapping[str, Any], precision: Precision, stage: int) -> Precision:
    given = _section(ds_config, "data_types").get("grad_accum_dtype")
    if given is None:
        return precision
    if not isinstance(given, str) or given not in DTYPE_NAMES:
        raise ConfigError(f"data_types.grad_accum_dtype={given!r}: unknown; choose fp16, bf16 or fp32")
    if DTYPE_NAMES[given] != precision and stage == 0:
        raise ConfigError(
            f"data_types.grad_accum_dtype={given!r} with {precision} weights: DeepSpeed sums in another "
            "precision only under ZeRO; set zero_optimization.stage to 1 or 2, or remove it"
        )
    return DTYPE_NAMES[given]


def _read_optimizer(ds_config: Mapping[str, Any]) -> tuple[str, int]:
    """The optimizer's name and its states a parameter; one that is made in code is taken for Adam's like."""
    optimizer = _section(ds_config, "optimizer")
    name = optimizer.get("type")
    if name is None:
        return "given in code (taken as Adam)", 2
    if not isinstance(name, str):
        raise ConfigError(f"optimizer.type={name!r}: names an optimizer; write a string such as 'AdamW'")
    if name.lower() == "sgd":
        return name, int(bool(_section(optimizer, "params").get("momentum")))
    return name, STATES.get(name.lower(), 2)


def _read_bucket(zero: Mapping[str, Any], may_overlap: bool) -> int:
    size = zero.get("reduce_bucket_size", 5e8)
    if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
        raise ConfigError(f"zero_optimization.reduce_bucket_size={size!r}: needs a number above 0, in elements")
    if not zero.get("contiguous_gradients", True):
        return 0
    return int(size) * (2 if may_overlap and zero.get("overlap_comm") else 1)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name}={section!r}: expected an object; write {{...}}")
    return section


def _flag(ds_config: Mapping[str, Any], name: str) -> bool:
    value = _section(ds_config, name).get("enabled", False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}.enabled={value!r}: needs true or false; write one")
    return value


def _positive(ds_config: Mapping[str, Any], key: str) -> int | None:
    value = ds_config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{key}={value!r}: needs a whole number of at least 1; write one or remove the key")
    return value
