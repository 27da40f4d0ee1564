"""Bytes and flops of a job before anything is built."""
