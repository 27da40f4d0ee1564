"""The doctor's options, in a file that the command line can read without what the doctor needs."""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.config.options import option

HOSTFILE = "a hostfile whose hosts are asked over ssh: names, versions, launchers, variables that would not reach them"


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The command line's values."""

    config: str | None = option(None, "a ds_config whose run should work here", metavar="DS_CONFIG")
    hostfile: str | None = option(None, HOSTFILE, metavar="FILE")
    world_size: int | None = option(None, "ranks of its job, as in check-config", least=1, metavar="RANKS")
    ranks: int | None = option(None, "ranks started here for links (default: ep_size of the config, up to 4)", least=1)
    seconds: float = option(5.0, "time that all links together take", above=0, most=3600)
    wait: float = option(60.0, "seconds for ranks to come up", above=0, most=3600, metavar="SECONDS")
    links: bool = option(True, "start no ranks and send nothing")
    verbose: bool = option(False, "print also what cannot matter on this machine")
    json: bool = option(False, "print JSON instead of tables")
