"""Jobs that are simulated: layout, batch, routing."""
