"""The only door to DeepSpeed: the layer that its engine recognises, and the way in."""

from ds_moe_ep.engine import recorders, seams, step_seams

# On import, since a script may start its process groups, or its engine, before it makes its first layer.
seams.keep_shm_build_away()
recorders.mend_autoep()
step_seams.let_all_experts_be_frozen(seams.is_expert_parameter)
