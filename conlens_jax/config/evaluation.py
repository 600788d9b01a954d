"""Settings of the evaluation."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Measuring a lens; docs/evaluation.md describes the suites."""

    suite: str = "basic"  # or "full", "interventions"
    # Held-out rows: "validation", or "test" (dump.n_test_samples), which training never reads.
    split: str = "validation"
    rows: int = 1024  # rows of the split; 0: all
    batch_size: int = 128  # rows per pass
    bootstrap: int = 2000  # resamples of the documents
    n_examples: int = 24  # rows shown at equal distances, besides the best, median and worst
    kl_horizon: int = 4  # h of kl_cont: predictions from P on
    seed: int = 0  # of sampled texts, resamples and changes of a text
    # Training steps of the audit encoder, which reads the text without knowing the lens, on windows
    # of true text in batches of the warm start's size.
    audit_steps: int = 300
    audit_seed: int = 1  # of its order of rows
    audit_shift: int = 0  # its windows are up to so many tokens before or after the warm start's
    best_of: int = 16  # K: the most texts per row that the full suite samples
    # Sampled texts per row of the main lens whose claims are calibrated by how many of them agree
    # (Lens.claims); 0: none.
    claim_samples: int = 16
