"""DirectPred in float64 NumPy, written from the equations and not from the package.

The spectrum of F̂ comes from the singular values of the stacked, weighted features, so √s is exact
to rounding also where s is 0; the package decomposes the correlation itself.
"""

import numpy as np


def eq18(s, eps, normalize=True):
    if not normalize:  # the printed equation
        return np.array([value**0.5 + eps * max(s) for value in s])
    return np.array([value**0.5 + eps for value in over_largest(s)])


def over_largest(s):
    return [value / max(s) if max(s) > 0 else 1.0 for value in s]


def directset(s, alpha, eps):
    powered = np.array([value**alpha for value in s])
    return powered + eps * powered.max()


def directcopy(s, eps):
    return directset(s, 1.0, eps)


def boost_scale(s, eps, power, inside, floor):
    p = []
    for value in over_largest(s):
        if inside:
            p.append(max(value + eps, floor) ** power)
        else:
            p.append(max(value**power + eps, floor))
    return np.array(p)


def step_weights(steps, rho):
    """Share of each step's batch correlation in F̂ of Eq. 19, the first batch initialising."""
    weights = [1.0]
    for _ in range(steps - 1):
        weights = [w * rho for w in weights] + [1 - rho]
    return weights


def correlation(batches, rho):
    """F̂ after all batches; a batch is a list of views (n, dim)."""
    total = 0.0
    for weight, views in zip(step_weights(len(batches), rho), batches, strict=True):
        rows = np.concatenate([np.asarray(v, dtype=np.float64) for v in views])
        total = total + weight * np.mean([np.outer(row, row) for row in rows], axis=0)
    return total


def mean(batches, rho):
    total = 0.0
    for weight, views in zip(step_weights(len(batches), rho), batches, strict=True):
        rows = np.concatenate([np.asarray(v, dtype=np.float64) for v in views])
        total = total + weight * rows.mean(axis=0)
    return total


def weight(batches, rho, rule):
    """W_p after all batches, for a rule in NumPy on (dim,) eigenvalues in any order."""
    stacked = []
    for share, views in zip(step_weights(len(batches), rho), batches, strict=True):
        rows = np.concatenate([np.asarray(v, dtype=np.float64) for v in views])
        stacked.append(np.sqrt(share / len(rows)) * rows)
    stacked = np.concatenate(stacked)
    dim = stacked.shape[1]
    _, sigma, vt = np.linalg.svd(stacked, full_matrices=True)
    s = np.zeros(dim)
    s[: len(sigma)] = sigma**2
    return vt.T @ np.diag(rule(s)) @ vt
