"""Names of Records, as benchmarks, the probe and the simulator write them, and their titles for a reader.

A name is a dotted path; its parts are slugs without dots. Bench and simulate write these names, report reads them.

    system.<place>.<mode>.<system>.<what>           tps, tpot, step, busy, ratio_to_<system>
    system.<place>.<mode>.<system>.breakdown.<part> a step of the mean rank, cut into parts that sum to it
    system.<place>.<mode>.<system>.hidden           share of the experts' traffic that ran behind compute
    system.<place>.<mode>.<system>.memory.<kind>    bytes of the fullest rank
    system.<place>.training.<system>.loss.step<n>   of the n-th step of the run, the same batches for every system
    system.<place>.training.<system>.load.step<n>.layer<l>.expert<e>   rows of all ranks
    system.<place>.traffic.<what>                   ratio (of EP16's traffic alone to its compute), compute, link
    layouts.<place>.traffic<percent>.<system>.<what>   tps, over_best (in layouts of one job); the percent as of traffic
    scaling.<total>.ep<n>.<what>                  tps, tpot, busy, memory_per_expert
    scaling.<total>.fit.<law>.<what>              r2, coefficient
    sweep.<place>.<total>.ep<n>.dp<m>.<what>        tps, tpot, busy, memory_per_expert, mfu, hidden, memory (simulated)
    sweep.<place>.<total>.fit.<law>.<what>          r2, coefficient; of the points with the fewest copies
    audit.<place>.<figure>.<what>.<column>          stated, derived, simulated
    layer.<case>.<side>.<what>                    one layer against DeepSpeed's; with audit's and the probe's, what the
                                                  report has no place for
    soak.run<r>.memory.step<n>                    resident bytes, the middle of the ranks between the least and the most
    soak.run<r>.<what>                            peak.memory, growth.<held>; <count>.start, .steady, .end, .after
    soak.load.step<n>, soak.fullest.step<n>       fullest expert's rows over the mean, and which expert that is
    soak.loss.step<n>, soak.hash.step<n>          loss; how many runs have the first run's hash of all that was computed
    soak.weather.<what>                           how often routing burst, ranks idled, experts led
    soak.verdict.<what>                           1 where it holds; its note says of what and by how much
    overlap.<device>.<shaping>.<side>.<phase>.<what>   of one layer; shaping is "<ratio> of <phase>", "<rate> mbit" or
                                                  "unshaped", phase forward, backward or step; what time (ms), hidden,
                                                  to_serial, to_native, traffic, traffic_ratio, over_limit
    probe.matmul.<precision>.rows<n>              GFLOP/s of an expert's two products on so many rows
    probe.attention.<precision>, probe.memory     GFLOP/s of causal attention, both ways; GB/s of elementwise work
    probe.launch, probe.sync                      us of the host, to issue a kernel and to read its number
    probe.<way>.<load>.bytes<n>                   us of an exchange; way near or far, load one (pair) or all
    probe.<way>.senders                           ranks of a node that send at once under load all
    probe.host.<what>                             cores; core time of a message: pairwise, collective (us), byte (us/MB)

Units: tps in tokens/s; tpot in us (of a token); step and breakdown in ms; memory in bytes; load in rows; loss in nats;
busy, hidden, traffic's ratio, ratio_to and r2 in ratio (1 is all, or equal). A coefficient has its law's unit. Readers
convert within a kind (us, ms, s; ratio, percent; bytes, MB, GB) and refuse the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

SYSTEMS: Mapping[str, str] = {
    "tp8_pp2": "TP8/PP2",
    "ep16_serial": "EP16 serial",
    "ep16": "EP16 overlapped",
    "native_ep16": "DeepSpeed MoE EP16",
    "autoep_ep16": "DeepSpeed AutoEP EP16",
    "pp2_ep8": "PP2/EP8",
    "tp2_ep8": "TP2/EP8",
    "tp2_pp2_ep4": "TP2/PP2/EP4",
}
BASELINE = "tp8_pp2"
LAYOUTS = ("ep16", BASELINE, "pp2_ep8", "tp2_ep8", "tp2_pp2_ep4")  # of one model by this package: which is fastest?
MODES: Mapping[str, str] = {"training": "training", "forward": "forward only"}
PARTS: Mapping[str, str] = {
    "compute": "compute",
    "experts_traffic": "expert send/recv, exposed",
    "tensor_traffic": "tensor-parallel all-reduce",
    "pipeline": "pipeline: waiting for the other stage",
    "gradients": "gradient reduction and optimizer",
    "rest": "rest",
}
SIMULATED_PARTS: Mapping[str, str] = {"sequence_traffic": "sequence-parallel all-to-all"}  # and all of PARTS
KINDS: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "buffers": "buffers",
}
TOTALS: Mapping[str, str] = {"constant_rank": "constant tokens per rank", "constant_total": "constant tokens in total"}
LAWS: Mapping[str, str] = {  # of EP, as the specification states them (section 4.3)
    "tps": "TPS ~ EP",
    "tpot": "TPOT ~ 1/EP",
    "busy": "utilization ~ 1 - 1/EP",
    "memory_per_expert": "memory per expert ~ 1/EP",
}

SOAK_VERDICTS: Mapping[str, str] = {
    "memory": "resident memory is flat",
    "allocated": "allocated memory is flat",
    "tensors": "no tensor is kept",
    "objects": "no Python object is kept",
    "handles": "no handle, socket or thread is left open",
    "same": "all runs computed the same bits",
    "finite": "every loss is a number",
}


DEVICES: Mapping[str, str] = {"emulated": "emulated devices", "real": "real compute"}  # of the overlap benchmark
SIDES: Mapping[str, str] = {
    "serial": "serial",
    "auto": "auto",
    "peers": "peers",
    "peers, 2 cuts": "peers, 2 cuts",
    "2 chunks": "2 chunks",
    "4 chunks": "4 chunks",
    "8 chunks": "8 chunks",
    "hooked native": "DeepSpeed's layer, hooked",
    "native": "DeepSpeed's layer",
    "autoep": "DeepSpeed's AutoEP",
    "wire": "traffic alone",
}


def title_of(system: str) -> str:
    """Title of a system, also of one of other sizes than the specification's."""
    if system in SYSTEMS:
        return SYSTEMS[system]
    if system.startswith(("tp", "pp", "sp")):
        return system.removesuffix("_serial").upper().replace("_", "/") + " serial" * system.endswith("_serial")
    size, _, serial = system.upper().partition("_")
    return f"{size} {'serial' if serial else 'overlapped'}"


SIMULATED = "simulated_"  # environments that were never built: this, and the name of a cluster's file


def environment_title(environment: str) -> str:
    """Title of an environment: `loopback`, `unshaped`, `cluster`, `traffic<percent>` or `simulated_<cluster>`."""
    if environment.startswith(SIMULATED):
        return f"simulated on {environment.removeprefix(SIMULATED)}, not measured"
    if environment == "loopback":
        return "loopback, real compute"
    if environment == "unshaped":
        return "loopback, emulated devices"
    if environment == "cluster":
        return "links as in the specification's cluster"
    return f"links on which EP16's traffic takes {int(environment.removeprefix('traffic')) / 100:g} of its compute"
