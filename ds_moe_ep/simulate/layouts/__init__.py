"""The layouts of a job that fit a cluster, best first."""
