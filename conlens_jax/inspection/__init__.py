"""Using a trained lens: load, explain, swap, compare, steer, show, share."""
