"""What a run will need, from shapes alone: no weights, no devices."""
