"""Everything that is measured against each other: layers, the parts that stand in for devices, and their inputs."""
