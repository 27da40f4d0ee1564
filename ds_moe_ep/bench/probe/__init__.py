"""The numbers of a cluster, measured."""
