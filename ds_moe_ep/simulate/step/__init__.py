"""One step of a job on a cluster."""
