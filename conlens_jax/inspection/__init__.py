"""A trained lens in the hands of its user: load, explain, swap, compare, steer, show, share."""
