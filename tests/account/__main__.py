"""Prints the account of one layer at the specification's sizes: python -m tests.account"""

from __future__ import annotations

from dataclasses import asdict, replace

from tests.account.layer import count
from tests.account.summary import DEEPSEEK, DEEPSEEK_EP8, EP8, QWEN3, SPECIFICATION, TOP_2, figures, memory_ms_by_place

BEFORE = {  # with sums over blocks, rows stacked by source, plain torch beside the products, kept active rows
    "serial": {"weight_gradient_gb": 22.5, "forward_products": 2},
    "peers": {"weight_gradient_gb": 22.5, "forward_products": 22, "memory_ms": 13.8, "peak_gb": 8.16},
    "chunks": {"weight_gradient_gb": 22.5, "forward_products": 128},
}


def main() -> None:
    """The figures of each schedule, before and now, and where the memory time goes."""
    cases = {name: replace(SPECIFICATION, schedule=name) for name in ("serial", "peers", "chunks")}
    cases["peers, k=2"] = TOP_2
    cases["peers, 4 weight blocks"] = replace(SPECIFICATION, knobs={"weight_blocks": 4})
    many = {"64 experts, EP=8": EP8, "Qwen3": QWEN3, "DeepSeek": DEEPSEEK, "DeepSeek, EP=8": DEEPSEEK_EP8}
    for name, sizes in many.items():
        cases |= {f"{name}: {how}": replace(sizes, knobs={"grouped_products": how}) for how in ("off", "auto")}
    for name, sizes in cases.items():
        print(name)
        for figure, value in asdict(figures(sizes)).items():
            before = BEFORE.get(name, {}).get(figure)
            was = f"  (before: {before:g})" if before is not None else ""
            print(f"  {figure:20} {value:10.4g}{was}")
    for sizes in (SPECIFICATION, TOP_2):
        print(f"memory time of peers, k={sizes.top_k}, in ms by part:")
        for where, ms in memory_ms_by_place(count(sizes)).items():
            print(f"  {where:20} {ms:6.3f}")


main()
