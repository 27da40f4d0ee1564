"""Changes that fit and may train faster: the ds_config with one thing changed, simulated like the job itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ds_moe_ep.records.quantity import Quantity, Row
from ds_moe_ep.simulate.job.fit import MemoryFit, fit_memory, with_micro_batch
from ds_moe_ep.simulate.step.predict import Prediction, predict
from ds_moe_ep.simulate.step.setup import Setup


def alternatives(prediction: Prediction, fit: MemoryFit) -> tuple[Row, ...]:
    """Changes after which the job fits, the fastest first: `spare_bytes`, `throughput_tokens_per_s`, and `tps_ratio`.

    The ratio is of tokens per second over the job's, both at the same end.
    """
    found = []
    for change, setup in _changes(prediction.step.setup, fit):
        its_fit = fit_memory(setup)
        if its_fit.fits:
            its = predict(setup)
            spare = Quantity.of(its_fit.spare_bytes, unit="bytes", name="spare")
            numbers = (spare, its.tps.named("throughput"), its.over(prediction).named("tps"))
            found.append(Row({"change": change}, numbers))
    return tuple(sorted(found, key=lambda alternative: -alternative["tps_ratio"].value))


def _changes(setup: Setup, fit: MemoryFit) -> Iterator[tuple[str, Setup]]:
    """The largest micro-batch of the same batch; no recomputation; both."""
    training, model = setup.training, setup.model
    if fit.largest_of_batch > training.micro_batch:
        yield _micro_batch(fit.largest_of_batch), _with_micro_batch(setup, fit.largest_of_batch)
    if not model.recompute or setup.mode == "forward":
        return
    stored = replace(setup, model=replace(model, recompute=False))
    yield STORED, stored
    largest = fit_memory(stored).largest_of_batch
    if largest not in (0, training.micro_batch):
        yield f"{STORED} and {_micro_batch(largest)}", _with_micro_batch(stored, largest)


STORED = "moe_ep.model.recompute=false"


def _micro_batch(size: int) -> str:
    return f"train_micro_batch_size_per_gpu={size}"


def _with_micro_batch(setup: Setup, size: int) -> Setup:
    return replace(setup, training=with_micro_batch(setup.training, size))
