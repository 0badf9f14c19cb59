"""The statistics that an answer needs: pure functions on arrays of results.

Accuracies, differences and rates are shares (0 to 1), not percentage points.
"""

from training.statistics.paired import (
    Interval,
    PairedDifference,
    mcnemar_exact,
    minimum_detectable_effect,
    paired_difference,
    tango,
    wilson,
)
from training.statistics.power import (
    detectable_over_seeds,
    equivalence_power,
    power_over_seeds,
    seeds_for_difference,
    seeds_for_equivalence,
    spread_over_seeds,
)
from training.statistics.seeds import (
    Components,
    SeedTest,
    crossed_bootstrap,
    equivalence,
    holm,
    seed_test,
    sign_flip,
    variance_components,
)

__all__ = [
    "Components",
    "Interval",
    "PairedDifference",
    "SeedTest",
    "crossed_bootstrap",
    "detectable_over_seeds",
    "equivalence",
    "equivalence_power",
    "holm",
    "mcnemar_exact",
    "minimum_detectable_effect",
    "paired_difference",
    "power_over_seeds",
    "seed_test",
    "seeds_for_difference",
    "seeds_for_equivalence",
    "sign_flip",
    "spread_over_seeds",
    "tango",
    "variance_components",
    "wilson",
]
