"""What a run will take, from shapes alone: no weights, no devices."""
