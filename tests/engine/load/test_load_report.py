"""The load that reports tell, on real ranks: the same counts as the layers' own, gathered by one all-reduce."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.folder import RunFolder, SeenRun
from ds_moe_ep.live.lines import RunReport
from ds_moe_ep.live.load import fullest_over_mean, quantile
from tests.ranks import RankError, RankPool

EXPERTS, WIDTH, TOKENS, ACCUMULATION, RANKS = 4, 8, 12, 2, 2
# Each case: arguments of the layer, and whether its passes are recomputed backward.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "dropless": ({"k": 2, "drop_tokens": False}, False),
    "recomputed": ({"k": 1, "drop_tokens": False}, True),
    "with a capacity": ({"k": 1, "capacity_factor": 0.5, "min_capacity": 1}, False),
    "hooked": ({"k": 1, "capacity_factor": 0.5, "min_capacity": 1, "use_rts": False}, False),
}


class Model(nn.Module):
    """Two MoE layers, the second of which may be recomputed; keeps the counts of each forward pass."""

    def __init__(self, case: str) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as Native

        from ds_moe_ep import GeluMLP, MoE

        arguments, self.recomputes = CASES[case]
        kind = Native if case == "hooked" else MoE
        self.layers = nn.ModuleList(
            kind(WIDTH, GeluMLP(WIDTH, 16), num_experts=EXPERTS, ep_size=RANKS, **arguments) for _ in range(2)
        )
        self.seen: list[list[Tensor]] = [[], []]

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for index, layer in enumerate(self.layers):
            run = layer if not self.recomputes else lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)
            y, l_aux, counts_E = run(x)
            if self.training:
                self.seen[index].append(counts_E.detach().clone().long())
            x, total = x + y, total + l_aux
        return x.square().mean() + total


def train(case: str, folder: str | None, steps: int, **config: Any) -> tuple[Any, list[float]]:
    import ds_moe_ep

    torch.manual_seed(0)
    section = {"attach": case == "hooked", **({"watch": folder, "report_every": 2} if folder else {})}
    ds_config = {
        "train_micro_batch_size_per_gpu": TOKENS,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "moe_ep": {**section, **config.pop("moe_ep", {})},
        **config,
    }
    engine, *_ = ds_moe_ep.initialize(model=Model(case), config=ds_config)
    losses = []
    for index in range(steps * ACCUMULATION):
        seed = 100 * index + dist.get_rank()
        loss = engine(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        engine.eval()
        with torch.no_grad():  # passes of evaluation are no load
            engine(torch.zeros(TOKENS, WIDTH))
        engine.train()
    return engine, losses


def all_cases(folder: str) -> dict[str, tuple[list[list[list[int]]], list[float]]]:
    """Of each case: this rank's counts by layer, pass and expert, and its losses."""
    from contextlib import nullcontext

    from ds_moe_ep.engine.load.report import LoadReport

    found = {}
    for case in CASES:
        engine, losses = train(case, f"{folder}/{case}", steps=4)
        found[case] = ([[counts_E.tolist() for counts_E in layer] for layer in engine.module.seen], losses)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadReport, "paused", nullcontext)
        train("recomputed", f"{folder}/recomputed and counted", steps=2)
    return found


def only_run(folder: Path) -> SeenRun:
    reader = RunFolder(folder)
    reader.refresh()
    (run,) = reader.runs.values()
    assert reader.num_skipped == 0
    return run


def reports_of(folder: Path) -> list[RunReport]:
    found = [entry.read() for entry in only_run(folder).entries]
    return [report for report in found if report is not None]


@pytest.fixture(scope="module")
def ran(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, pool.run(RANKS, all_cases, str(folder), timeout_s=120)


@pytest.mark.parametrize("case", CASES)
def test_a_report_has_the_counts_of_the_layers_summed_over_ranks_and_passes(
    ran: tuple[Path, list[Any]], case: str
) -> None:
    folder, by_rank = ran
    reports = reports_of(folder / case)
    assert [report.step for report in reports] == [2, 4]
    counts_RLPE = torch.tensor([by_rank[rank][case][0] for rank in range(RANKS)])
    passes = 2 * ACCUMULATION
    for number, report in enumerate(reports):
        window_RLPE = counts_RLPE[:, :, number * passes : (number + 1) * passes]
        for index, layer in enumerate(report.layers):
            assert layer.name.startswith(f"layers.{index}")
            assert layer.num_passes == passes, "recomputed passes and those of evaluation are none"
            assert list(layer.rows_E) == window_RLPE[:, index].sum((0, 1)).tolist()
            assert list(layer.rows_E) != window_RLPE[:, index].sum((0, 1)).roll(1).tolist()
        losses = torch.tensor([by_rank[rank][case][1] for rank in range(RANKS)])
        assert report.loss == pytest.approx(float(losses[:, number * passes : (number + 1) * passes].mean()), rel=1e-6)


def test_recomputed_passes_would_count_twice_if_nobody_looked(ran: tuple[Path, list[Any]]) -> None:
    once, twice = (reports_of(ran[0] / name)[0].layers[0] for name in ("recomputed", "recomputed and counted"))
    assert twice.num_passes == 2 * once.num_passes and sum(twice.rows_E) == 2 * sum(once.rows_E)


@pytest.mark.parametrize("case", ["dropless", "recomputed"])
def test_rows_per_rank_are_those_that_its_experts_got_pass_by_pass(ran: tuple[Path, list[Any]], case: str) -> None:
    folder, by_rank = ran
    report = reports_of(folder / case)[0]
    for index, layer in enumerate(report.layers):
        counts_PE = torch.tensor([by_rank[rank][case][0][index] for rank in range(RANKS)]).sum(0)[: 2 * ACCUMULATION]
        rows_PR = counts_PE.view(len(counts_PE), RANKS, -1).sum(2)
        means_R = rows_PR.double().mean(0)
        assert layer.rank_rows_R == pytest.approx(means_R.tolist(), abs=0.006), "a log keeps hundredths"
        assert layer.rank_rows_R != pytest.approx(means_R.flip(0).tolist(), abs=0.006)
        ratios = [fullest_over_mean(rows_R) for rows_R in rows_PR.tolist()]
        assert (layer.p50, layer.p95) == pytest.approx((quantile(ratios, 0.5), quantile(ratios, 0.95)))


def test_a_capacity_drops_what_is_beyond_it_on_each_rank(ran: tuple[Path, list[Any]]) -> None:
    folder, by_rank = ran
    for case in ("with a capacity", "hooked"):
        capacity = 2  # of 12 tokens to 4 experts, times 0.5, rounded up
        counts_RLPE = torch.tensor([by_rank[rank][case][0] for rank in range(RANKS)])[:, :, : 2 * ACCUMULATION]
        dropped_LE = (counts_RLPE - capacity).clamp(min=0).sum((0, 2))
        layers = reports_of(folder / case)[0].layers
        assert [list(layer.dropped_E) for layer in layers] == dropped_LE.tolist() and dropped_LE.sum() > 0
        assert all(layer.rank_rows_R == (RANKS * EXPERTS // RANKS * capacity,) * RANKS for layer in layers), "padded"


def test_the_head_of_a_log_names_ranks_and_layers(ran: tuple[Path, list[Any]]) -> None:
    head = only_run(ran[0] / "dropless").head
    assert len(head.hosts_R) == RANKS and head.every == 2
    assert [(shape.num_experts, shape.ep_size, shape.top_k) for shape in head.layers] == [(EXPERTS, RANKS, 2)] * 2


def listening_job(folder: str) -> dict[str, Any]:
    """What a run costs and tells by who listens: all-reduces of reports, observers, files."""
    import ds_moe_ep
    from ds_moe_ep.engine.load import gather

    found: dict[str, Any] = {}
    real, calls = gather.sum_over_shares, []
    gather.sum_over_shares = lambda values: calls.append(1) or real(values)  # type: ignore[func-returns-value]
    try:
        csv_monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}, "steps_per_print": 2}
        listeners: dict[str, tuple[str | None, Any]] = {
            "nobody": (None, {}),
            "monitor": (None, csv_monitor),
            "page": (f"{folder}/page", {}),
        }
        for name, (watch, config) in listeners.items():
            calls.clear()
            engine, _ = train("dropless", watch, steps=4, **config)
            observers = [layer.dispatcher._observer for layer in engine.moe_ep_layers.values()]
            found[name] = (len(calls), all(observer is not None for observer in observers))
        extensions = engine.moe_ep_extensions
        extensions.uninstall(list(extensions.callbacks))
        found["removed"] = all(layer.dispatcher._observer is None for layer in engine.module.layers)
        try:
            ds_moe_ep.initialize(
                model=Model("dropless"), config={"train_batch_size": RANKS, "moe_ep": {"watch": "/dev/null/no"}}
            )
        except ConfigError as error:
            found["refused"] = str(error)
    finally:
        gather.sum_over_shares = real
    return found


def test_who_listens_decides_what_a_run_gathers_and_nobody_costs_nothing(pool: RankPool, tmp_path: Path) -> None:
    ours, theirs = pool.run(RANKS, listening_job, str(tmp_path), timeout_s=120)
    assert ours == theirs
    assert (ours["nobody"], ours["monitor"], ours["page"]) == ((0, False), (2, True), (2, True))
    assert ours["removed"] and only_run(tmp_path / "page").is_ended
    assert "moe_ep.watch='/dev/null/no': cannot be written by rank 0" in ours["refused"]
    told = {path.stem.removeprefix("Train_moe_ep_layers.0_"): path for path in (tmp_path / "job").glob("*layers.0*")}
    for name in (
        "load_max_over_mean", "expert_load_rows_expert_003", "expert_load_share_expert_000", "expert_load_entropy_bits",
        "expert_load_dead_experts", "expert_load_dropped_percent", "rank_load_rows_rank_001", "replicas_in_use",
        "rank_load_p50_max_over_mean", "rank_load_p95_max_over_mean",
    ):  # fmt: skip
        with told[name].open() as file:
            assert [int(row[0]) for row in csv.reader(file) if row[0].isdigit()] == [
                step * TOKENS * ACCUMULATION * RANKS for step in (2, 4)
            ], name


def full_disk_job(folder: str) -> tuple[int, bool]:
    """A run whose log cannot be written after its first report; the steps that it made."""
    from ds_moe_ep.engine.load import report

    engine, _ = train("dropless", folder, steps=2)
    (callback,) = [each for each in engine.moe_ep_extensions.callbacks if isinstance(each, report.LoadReport)]
    if callback._log is not None:
        callback._log._folder = Path("/dev/null/gone")
    for index in range(2 * ACCUMULATION):
        engine.backward(engine(torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(index))))
        engine.step()
    return engine.global_steps, callback._log is None


def test_a_log_that_cannot_be_written_ends_and_the_training_goes_on(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(RANKS, full_disk_job, str(tmp_path / "run")) == [(4, True)] * RANKS
    assert [report.step for report in reports_of(tmp_path / "run")] == [2]


def test_two_ranks_that_watch_differently_are_refused(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="differs from that on rank 0"):
        pool.run(RANKS, differing_job, str(tmp_path))


def differing_job(folder: str) -> None:
    train("dropless", f"{folder}/{dist.get_rank()}", steps=1)
