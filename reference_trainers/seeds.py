"""Every random number of a run comes from its seed, and from what it is drawn for."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What random numbers are drawn for."""

    WEIGHTS = 0
    ORDER = 1
    VIEWS = 2
    CROPS = 3


def seed_of(seed: int, use: Use, count: int = 0, rank: int = 0) -> int:
    """The seed of one stream of random numbers, such as that of the views of step ``count``.

    With a stream for every step, a resumed run needs no state of a random generator to go on as
    if it had never stopped, and no run depends on what ran before it.
    """
    return int(np.random.SeedSequence((seed, use, count, rank)).generate_state(1, np.uint64)[0])
