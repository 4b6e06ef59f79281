"""How often a 95 % interval of recovery holds the truth, in simulated studies of 40 examples.

``python tests/metrics/interval_coverage.py`` prints the table of quail/metrics/README.md, in a minute or two.
"""

import numpy as np

from quail.metrics.intervals import recovery

EXAMPLES, TRUTH = 40, 0.3
# Standard deviations of the share that comes back, by example and by seed, and of the noise of one measurement.
KINDS = {"examples": (0.3, 0.0, 0.05), "seeds only": (0.0, 0.1, 0.05), "both": (0.3, 0.05, 0.05), "noise": (0, 0, 0.2)}


def covered(kind: str, seeds: int, studies: int, resamples: int = 500) -> float:
    """The share of studies whose interval holds ``TRUTH``; one without an interval does not."""
    by_example, by_seed, noise = KINDS[kind]
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(studies):
        share = TRUTH + rng.normal(0, by_example, EXAMPLES) + rng.normal(0, by_seed, (seeds, 1))
        unlearned = 0.2 + rng.normal(0, 0.1, EXAMPLES)
        values = (unlearned + 0.7 * share, unlearned, unlearned + 0.7)
        found = recovery(*(arm + rng.normal(0, noise, (seeds, EXAMPLES)) for arm in values), resamples=resamples)
        held += found.value is not None and found.low <= TRUTH <= found.high
    return held / studies


if __name__ == "__main__":
    print(f"| seeds | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for seeds in (1, 2, 3, 5, 10):
        print(f"| {seeds} | {' | '.join(f'{covered(kind, seeds, 400):.2f}' for kind in KINDS)} |", flush=True)
