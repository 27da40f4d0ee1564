"""Predicts from stated numbers and never measures; each number has a unit, a source and a range.

In the order in which it is best read:

cluster/     devices, links and a host as data, read from JSON (cluster, write), or as resources that the engine of
             events shares out (machine); collectives of a group of ranks (all_reduce)
step/        one job on one cluster, and what its simulation says (setup); closed forms (formulas), and made of them
             what the parts of a layer cost (costs); the experts' part of a layer by its schedule (moe_pass);
             gradients, optimizer and weights (data_parallel); whole steps of both layouts (ep_step;
             pipeline_schedule, pipeline_step); a step with its bar (predict), its numbers by name (measures, source)
job/         a ds_config as a job (job, options), what each rank receives (routing), the schedule that "auto" would
             take (choose), whether it fits (fit)
plan/        all that is predicted of a job: what bounds it, what else fits and is faster
sweep/       the same job on 1 to 1,024 devices and more
audit/       the reference job's figures, simulated, with their verdicts
calibrate/   a cluster's numbers from Records of `bench probe` and `bench overlap`, with the error on what was held out

In plan, sweep and audit: `command` runs it, `tables` prints what it found, `records` writes it.
"""
