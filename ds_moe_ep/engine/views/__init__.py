"""MoE layers of a running engine in one form, and their passes as they ran."""
