"""Work that the fork server of `tests.ranks` does once, so that no rank does it: tables that torch makes at first use.

And what all ranks have: a short measurement where a layer's schedule is "auto", since few tests ask what it chooses.
Those take `full_measurement()`. What is imported stays as long as a rank does: no garbage collection looks at it, which
would take half a second each time and copy every page that ranks share. Of what ranks make themselves little is garbage
in cycles: they look for it after 20,000 objects, not after 700.
"""

import gc

import torch
from torch.overrides import get_overridable_functions, get_testing_overrides

from ds_moe_ep.moe import tuner
from ds_moe_ep.schedule import race

get_testing_overrides()
get_overridable_functions()
with torch.random.fork_rng():  # ranks that set no seed begin with torch's own
    torch.fx.symbolic_trace(torch.nn.Linear(1, 1))

gc.collect()
gc.freeze()
gc.set_threshold(20_000, *gc.get_threshold()[1:])

FULL = (tuner.PROBES, race.STAGES, tuner.MOST)
tuner.PROBES, race.STAGES, tuner.MOST = 1, (1, 1), 3


def full_measurement() -> None:
    """Lets layers of this rank measure as long as a user's do."""
    tuner.PROBES, race.STAGES, tuner.MOST = FULL
