"""Studies of the full suite: audit, truth, interventions, baselines."""
