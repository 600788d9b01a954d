"""The device mesh and the table from dimension names to mesh axes."""
