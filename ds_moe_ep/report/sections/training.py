"""The sections on a training run: the load of the experts, and the loss."""

from __future__ import annotations

from collections.abc import Mapping

from ds_moe_ep.records.names import BASELINE, SYSTEMS, environment_title
from ds_moe_ep.records.quantity import convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import number_in, short_environment
from ds_moe_ep.report.page import Block, PageSection, Picture, basis_of
from ds_moe_ep.report.plots.lines import Curve, draw_losses
from ds_moe_ep.report.plots.load import HOTTEST, LayerLoad, Unevenness, draw_load, draw_unevenness

OURS = "ep16"
Rows = Mapping[int, Mapping[int, Mapping[int, float]]]  # by layer, step, expert


def loss(findings: Findings) -> PageSection | None:
    """The loss of every system over the same batches."""
    used: list[Record] = []
    environments = []
    for environment in findings.environments:
        curves = []
        for system in findings.systems("loss", environment=environment):
            records = findings.below("system", environment, "training", system, "loss")
            used += records.values()
            values = {number_in(step, "step"): convert(record, "loss").value for step, record in records.items()}
            curves.append(Curve(system, SYSTEMS[system], values))
        if curves:
            emulated = " (emulated)" if used[-1].emulated else ""
            environments.append((short_environment(environment) + emulated, curves))
    if not environments:
        return None
    caption = (
        "Training loss at each step; every system sees the same batches, so the curves must fall alike (DeepSpeed's "
        "MoE has no z-loss, AutoEP has SwiGLU experts and no auxiliary loss). Lower panel: "
        f"each system's loss minus that of {SYSTEMS[BASELINE]} at the same step."
    )
    picture = Picture("loss", "Loss", caption, draw_losses(environments, BASELINE), basis_of(used))
    return PageSection("Loss", (picture,))


def load(findings: Findings) -> PageSection | None:
    """Load of the experts, and how even it is."""
    blocks: list[Block] = []
    for environment in findings.environments:
        systems = findings.systems("load", environment=environment)
        if systems:
            blocks += _load_of_environment(findings, environment, systems)
    return PageSection("Load of the experts", tuple(blocks)) if blocks else None


def _load_of_environment(findings: Findings, environment: str, systems: tuple[str, ...]) -> list[Block]:
    shown = OURS if OURS in systems else systems[0]
    records = {system: findings.below("system", environment, "training", system, "load") for system in systems}
    layers = {system: _layers(_rows(of_system)) for system, of_system in records.items()}
    blocks: list[Block] = []
    if layers[shown]:
        caption = (
            f"{SYSTEMS[shown]} on {environment_title(environment)}: rows that all ranks sent to an expert in a step, "
            f"over the mean of the layer's experts. Colours end at {number(HOTTEST)} times the mean. The line "
            "above: the fullest expert."
        )
        basis = basis_of(records[shown].values())
        blocks.append(Picture(f"load_{environment}", "Load of the experts", caption, draw_load(layers[shown]), basis))
    uneven = [Unevenness(system, SYSTEMS[system], _fullest(layers[system])) for system in systems if layers[system]]
    if len(uneven) > 1:
        caption = "The fullest expert of all layers at each step, over the mean of its layer's experts. 1 is even."
        basis = basis_of(record for of_system in records.values() for record in of_system.values())
        drawing = draw_unevenness(uneven)
        blocks.append(Picture(f"load_of_systems_{environment}", "Load of the fullest expert", caption, drawing, basis))
    return blocks


def _rows(records: Mapping[str, Record]) -> Rows:
    rows: dict[int, dict[int, dict[int, float]]] = {}
    for name, record in records.items():
        step, layer, expert = name.split(".")
        of_layer = rows.setdefault(number_in(layer, "layer"), {})
        of_step = of_layer.setdefault(number_in(step, "step"), {})
        of_step[number_in(expert, "expert")] = convert(record, "rows").value
    return rows


def _layers(rows: Rows) -> list[LayerLoad]:
    """Each layer's loads at the steps at which all of its experts have a Record, and some got rows."""
    layers = []
    for layer, of_layer in sorted(rows.items()):
        experts = tuple(sorted({expert for of_step in of_layer.values() for expert in of_step}))
        whole = {step: e for step, e in sorted(of_layer.items()) if len(e) == len(experts) and sum(e.values()) > 0}
        over_mean = {
            (step, expert): rows_of_expert * len(experts) / sum(of_step.values())
            for step, of_step in whole.items()
            for expert, rows_of_expert in of_step.items()
        }
        if whole:
            layers.append(LayerLoad(layer, tuple(whole), experts, over_mean))
    return layers


def _fullest(layers: list[LayerLoad]) -> dict[int, float]:
    at_step: dict[int, float] = {}
    for layer in layers:
        for step, times in zip(layer.steps, layer.fullest(), strict=True):
            at_step[step] = max(times, at_step.get(step, 0.0))
    return at_step
