"""Predicts from stated numbers and never measures; each number has a unit, a source and a range.

In the order in which they are best read:

the cluster     cluster.py            devices, links and a host as data, read from JSON; `ends` are its error bar
                write_cluster.py      the same, written
the job         step.py               Setup, one job on one cluster; Step, what its simulation says
                routing.py            what each rank receives over the mean
costs           costs.py              closed forms of one product, attention and elementwise work
                layer_costs.py        the parts of a layer, made of these
                machine.py            a cluster as the resources that ../events.py shares out
                all_reduce.py         collectives of a group of ranks: rings, trees, and what they cost a host
the step of EP  moe_pass.py           the experts' part of a layer, by its schedule
                data_parallel.py      gradients, optimizer and weights, once a step
                ep_step.py            all of it: micro-batches, then the end
of TP and PP    pipeline_schedule.py  1F1B as data
                pipeline_step.py      its tasks
answers         predict.py            a step with its bar
                measures.py           its numbers by name, with units
                choose.py             the schedule that "auto" would take
                fit_memory.py         whether a job fits, and the largest micro-batch
                bounds.py             what bounds a step
                alternatives.py       what else fits, and is faster
                source.py             a number with its bar as a Record
`plan`          jobs.py, plan.py      a ds_config as a job, and all that is predicted of it; plan_command.py runs it
                plan_options.py       what its command line says
`plan --sweep`  sweep.py              the same job on 1 to 1,024 devices and more; sweep_command.py runs it
`audit`         audit_runs.py, audit.py  the specification's figures, simulated, with their verdicts
`calibrate`     probe_samples.py, fit_probe.py      numbers of a cluster from Records of `bench probe`
                overlap_case.py, search.py, overlap_fit.py  a host's costs from Records of `bench overlap`
                calibrate.py          both, with the error on what was held out

What a command finds is printed by its *_tables.py; Records and JSON come from its *_records.py (a plan's JSON from
plan_values.py).
"""
