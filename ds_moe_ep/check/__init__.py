"""check-config: what a ds_config would run, or why it cannot."""
