"""Top operations and the time of each phase of a profile, without TensorFlow.

python -m conlens_jax.train --config=configs/quickstart.py --config.profile.steps="(850,855)"
python scripts/profile_summary.py runs/quickstart/profile/joint
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path

from benchmark.profile_reading import phase_of, scopes_of, time_by_operation
from conlens_jax.config import ConfigError
from conlens_jax.tracking.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="<run_dir>/profile/<stage>")
    parser.add_argument("--top", type=int, default=15, help="how many operations")
    flags = parser.parse_args()
    try:
        seconds = time_by_operation(flags.folder)
        scopes = scopes_of(flags.folder)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    total = sum(seconds.values())
    phases: collections.Counter[str] = collections.Counter()
    for name, value in seconds.items():
        phases[phase_of(scopes.get(name, ""), name)] += value
    share = lambda value: [f"{value * 1e3:.2f}", f"{value / total:.1%}"]
    console = Console(sys.stdout)
    rows = [[name, *share(value)] for name, value in phases.most_common()]
    console.table("phases, over all threads or streams", ["phase", "ms", "share"], rows)
    top = collections.Counter(seconds).most_common(flags.top)
    rows = [[name, *share(value), scopes.get(name, "")[-70:]] for name, value in top]
    console.table("operations, the longest first", ["operation", "ms", "share", "where"], rows)


if __name__ == "__main__":
    main()
