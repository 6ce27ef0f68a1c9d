import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "directpred",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("directpred")


@dataclass(frozen=True)
class Backend:
    """An array library and a device: all that a test of the core needs of it."""

    module: str
    asarray: Callable[[Any, np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray] = np.asarray

    def array(self, x: Any, dtype: str = "float64") -> Any:
        x = np.asarray(x)
        return self.asarray(importlib.import_module(self.module), x.astype(dtype))

    @property
    def kind(self) -> type:
        return type(self.array([1.0]))


BACKENDS = {
    "numpy": Backend("numpy", lambda np, x: np.asarray(x)),
    "array-api-strict": Backend(
        "array_api_strict", lambda xp, x: xp.asarray(x), lambda x: np.from_dlpack(x)
    ),
    "torch-cpu": Backend("torch", lambda torch, x: torch.from_numpy(x)),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen = BACKENDS[request.param]
    pytest.importorskip(chosen.module)
    return chosen


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
