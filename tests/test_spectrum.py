import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import directpred as dp
import oracle

RULES = [
    (dp.Eq18(), lambda s: oracle.eq18(s, 0.1)),
    (dp.Eq18(eps=0.0), lambda s: oracle.eq18(s, 0.0)),
    (dp.Eq18(normalize=False), lambda s: oracle.eq18(s, 0.1, normalize=False)),
    (dp.DirectSet(), lambda s: oracle.directset(s, 0.5, 0.1)),
    (dp.DirectSet(alpha=0.25, eps=0.0), lambda s: oracle.directset(s, 0.25, 0.0)),
    (dp.DirectSet(alpha=2, eps=0.3), lambda s: oracle.directset(s, 2, 0.3)),
    (dp.DirectCopy(), lambda s: oracle.directcopy(s, 0.3)),
    (dp.BoostScale(), lambda s: oracle.boost_scale(s, 0.01, 0.5, False, 1e-4)),
    (dp.BoostScale(eps=-0.2), lambda s: oracle.boost_scale(s, -0.2, 0.5, False, 1e-4)),
    (dp.BoostScale(eps=0.1, inside=True), lambda s: oracle.boost_scale(s, 0.1, 0.5, True, 1e-4)),
    (
        dp.BoostScale(eps=-0.1, power=0.8, inside=True, floor=1e-2),
        lambda s: oracle.boost_scale(s, -0.1, 0.8, True, 1e-2),
    ),
]


def named(value):
    """An id that is the same in every process: a function's has its address."""
    return None if callable(value) and not hasattr(value, "eps") else str(value)


spectra = st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=20).map(sorted)


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=named)
@settings(max_examples=30)
@given(s=spectra)
def test_rules_equal_the_oracle(backend, rule, expected, s):
    p = backend.to_numpy(rule(backend.array(s)))
    np.testing.assert_allclose(p, expected(s), rtol=1e-12)


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=named)
def test_rules_keep_library_and_dtype(backend, rule, expected):
    s = backend.array([0.0, 0.5, 2.0], "float32")
    p = rule(s)
    assert type(p) is type(s)
    assert p.dtype == s.dtype
    np.testing.assert_allclose(backend.to_numpy(p), expected([0.0, 0.5, 2.0]), rtol=1e-6)


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_rules_are_finite_on_a_spectrum_of_zeros(backend, rule):
    assert np.isfinite(backend.to_numpy(rule(backend.array([0.0, 0.0])))).all()


def test_rules_are_frozen_and_comparable():
    assert dp.Eq18(0.1) == dp.Eq18(eps=0.1) != dp.Eq18(0.2)
    assert hash(dp.DirectCopy()) == hash(dp.DirectCopy(0.3))
    with pytest.raises(AttributeError):
        dp.Eq18().eps = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dp.Eq18(eps=-0.1), "eps must be ≥ 0, got -0.1"),
        (lambda: dp.Eq18(eps=float("nan")), "eps must be ≥ 0, got nan"),
        (lambda: dp.DirectSet(alpha=0), "alpha must be > 0, got 0"),
        (lambda: dp.DirectSet(eps=-1), "eps must be ≥ 0"),
        (lambda: dp.DirectCopy(eps=float("inf")), "eps must be ≥ 0, got inf"),
        (lambda: dp.BoostScale(eps=float("nan")), "eps must be a finite number"),
        (lambda: dp.BoostScale(power=-1), "power must be > 0"),
        (lambda: dp.BoostScale(floor=0), "floor must be > 0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
