"""The order of an engine's callbacks, the outermost first: where each stands, and why there.

What stands further out sees what stands further in: its scopes hold the others' collectives and errors, and it acts
before them on the way in and after them on the way out.
"""

from __future__ import annotations

from ds_moe_ep.engine.checkpoint.choices import ChoiceKeeper, SavedChoices
from ds_moe_ep.engine.checkpoint.folders import IncompleteCheckpoints
from ds_moe_ep.engine.checkpoint.load import SavedEpSize
from ds_moe_ep.engine.checkpoint.loading.frozen import FrozenExperts
from ds_moe_ep.engine.checkpoint.loading.mapped import MappedFiles
from ds_moe_ep.engine.checkpoint.loading.random_states import RandomStates
from ds_moe_ep.engine.checkpoint.loading.stacked import StackedExperts
from ds_moe_ep.engine.checkpoint.preflight import Preflight
from ds_moe_ep.engine.checkpoint.save import FinishedSaves, SafeSaver
from ds_moe_ep.engine.checkpoint.whole_files import ModelFiles
from ds_moe_ep.engine.explain_errors import Supervision
from ds_moe_ep.engine.extensions.balance_steps import BalanceSteps
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.extensions.clipping import GradientClipping, WrapperClipping
from ds_moe_ep.engine.extensions.loss_scale import LossScale
from ds_moe_ep.engine.extensions.nonfinite import SkippedSteps
from ds_moe_ep.engine.extensions.replica_windows import ReplicaWindows
from ds_moe_ep.engine.extensions.reports import MeterReport
from ds_moe_ep.engine.layouts.expert_files import ExpertFiles
from ds_moe_ep.engine.layouts.sequence import ExpertGradients
from ds_moe_ep.engine.load.report import LoadReport
from ds_moe_ep.engine.older_engines import OlderEngine
from ds_moe_ep.engine.shadow.shadow import Shadow

ORDER: tuple[type[EngineCallback], ...] = (
    # Names the causes of failed collectives, those of the callbacks below too. A step is over for the watch when all of
    # them have reported.
    Supervision,
    # Reports behind the meter, whose step has ended then: what was measured in this step is told with its load. Hears
    # the loss as the model gave it.
    LoadReport,
    # Ends the meter's step behind all that is further in: nothing of it must be in the time of the next step.
    MeterReport,
    # A save that goes on in the background has ended before anybody looks into the folder.
    FinishedSaves,
    # Takes the choices from the client state when all is loaded.
    ChoiceKeeper,
    # Refuses a checkpoint before anything of it is written.
    ExpertFiles,
    # Missing files are told before any is opened; all are read as tensors before the sizes are, which are in one.
    IncompleteCheckpoints,
    Preflight,
    SavedEpSize,
    # Next to what DeepSpeed itself reads; states that are cut anew are mapped anyway.
    MappedFiles,
    # Takes what the mapped files hold.
    StackedExperts,
    # Inside of the load alone: it changes what the engine takes from a file that is read.
    FrozenExperts,
    # Innermost of those that save: it calls the engine's own method with a folder of its own.
    SafeSaver,
    # Inside of it: the saver knows what to say of a rank that does not come to these exchanges either.
    SavedChoices,
    RandomStates,
    # Hears of a skipped step first, before anything is reported of it; hears the loss as the model gave it.
    SkippedSteps,
    # Around the pass alone: its own collectives are in nobody's backward pass but the engine's.
    Shadow,
    # Next to the engine: what it scales is what the engine gets.
    LossScale,
    # These act at points of their own, or on the optimizer and the model alone: no other callback can come between.
    GradientClipping,
    WrapperClipping,
    BalanceSteps,
    ReplicaWindows,
    ExpertGradients,
    OlderEngine,
    ModelFiles,
)
