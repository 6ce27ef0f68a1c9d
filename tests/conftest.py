import os
from collections.abc import Iterator

# The matrices are small, and the threads of several libraries in one process hold each other up.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from backends import BACKENDS, Backend

settings.register_profile(
    "directpred",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("directpred")


PARAMS = [
    pytest.param(name, marks=[pytest.mark.gpu] if name in ("torch-cuda", "cupy") else [])
    for name in BACKENDS
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip where a backend is missing: here, and not in the fixture, so one line tells of all."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for fixture in {"backend", "source"} & params.keys():
        chosen = BACKENDS[params[fixture]]
        if missing := chosen.missing(pytest.importorskip(chosen.module)):
            pytest.skip(f"{params[fixture]}: {missing}")


@pytest.fixture(params=PARAMS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every test with this fixture runs over all array libraries installed."""
    chosen = BACKENDS[request.param]
    with chosen.mode(chosen.library):
        yield chosen


source = backend
"""Another backend, for tests of two."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
