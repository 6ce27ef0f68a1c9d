"""What people put around an optimizer, and the optimizer within that really steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["layers", "unwrapped"]

CURES = {
    "fastai": "leave the head unattached and call head.step() in a callback's after_step, or give "
    "the Learner opt_func=partial(OptimWrapper, opt=torch.optim.AdamW) and attach that",
    "keras": "leave the head unattached, whose steps then end by themselves, or take "
    "directpred.adapters.keras",
}
"""By the package of an optimizer that is none of torch's: what to do in place of attaching."""


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer whose step hooks run at every step of a wrapper around it.

    Looks through accelerate's and Lightning's optimizers, LARC, SAM, Lookahead, mmengine's,
    fastai's and apex's wrappers, and any other that keeps one torch optimizer in an attribute.

    Args:
        optimizer: A `torch.optim.Optimizer` or a wrapper, also of another wrapper.

    Raises:
        TypeError: There is no torch optimizer in it, or more than one.
    """
    last: Optimizer = layers(optimizer)[-1]
    return last


def layers(optimizer: Any) -> list[Any]:
    """Return a wrapper, what it wraps and so on, down to the optimizer whose step hooks run.

    Args:
        optimizer: As for `unwrapped`.

    Raises:
        TypeError: As `unwrapped`.
    """
    chain = [optimizer]
    while True:
        inner = _inner(chain[-1])
        inside = [x for x in inner.values() if all(x is not each for each in chain)]
        if _runs_hooks(chain[-1]) and not (len(inside) == 1 and _drives(chain[-1], inside[0])):
            return chain
        if len(inside) != 1:
            raise TypeError(_not_one(optimizer, list(inner)))
        chain += inside


def _inner(wrapper: Any) -> dict[str, Any]:
    """The optimizers and wrappers of them in the attributes of a wrapper, each once, by name."""
    found: dict[str, Any] = {}
    for name, x in getattr(wrapper, "__dict__", {}).items():
        stepping = isinstance(x, Optimizer) or (
            hasattr(type(x), "step") and hasattr(x, "param_groups")
        )
        if stepping and all(x is not each for each in found.values()):
            found[name] = x
    return found


def _runs_hooks(optimizer: Any) -> bool:
    """Tell whether `step` is the method that torch wraps: some subclasses never call `__init__`."""
    return (
        isinstance(optimizer, Optimizer)
        and "_optimizer_step_post_hooks" in optimizer.__dict__
        and bool(getattr(type(optimizer).step, "hooked", False))
    )


def _drives(outer: Optimizer, inner: Any) -> bool:
    """Tell whether the inner one steps all that the outer has: SAM's base, and no rank's shard."""
    outside, inside = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (outer, inner)
    )
    return outside <= inside


def _not_one(optimizer: Any, inner: list[str]) -> str:
    kind = type(optimizer)
    cure = next(
        (cure for name, cure in CURES.items() if kind.__module__.split(".")[0].startswith(name)),
        "leave the head unattached, or call head.step() after each step of this optimizer"
        if hasattr(kind, "step")
        else "pass the optimizer that trains the features",
    )
    if inner:
        cure = f"it holds several ({', '.join(inner)}): pass the one that trains the features"
    return (
        "expected a torch.optim.Optimizer, or a wrapper that keeps one in an attribute, got "
        f"{kind.__name__} of {kind.__module__}; {cure}"
    )
