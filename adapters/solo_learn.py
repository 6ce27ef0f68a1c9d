"""solo-learn (https://github.com/vturrisi/solo-learn): the method ``directpred``.

Importing this module in solo-learn's ``main_pretrain.py`` adds it to `solo.methods.METHODS`. It is
solo-learn's own BYOL or SimSiam with a `DirectPredHead` in place of the learned predictor:

    method: "directpred"  # or "directpred_head", in a fork that has a "directpred" of its own
    method_kwargs:
      proj_hidden_dim: 4096
      proj_output_dim: 256
      base: byol  # or simsiam; all from here on may be left out
      rule: eq18  # or directset, directcopy, boost_scale
      eps: 0.1  # the other fields of the rule (alpha, power, inside, floor) likewise
      rho: 0.3  # and freq, between, center, solver, nonfinite, graphs: of DirectPredHead
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from solo.methods import METHODS, BaseMethod

from directpred.spectrum import BoostScale, DirectCopy, DirectSet, Eq18
from directpred.torch import replace_predictor, restore

from .lightning import DirectPredCallback

__all__ = ["DirectPred", "replace_predictor", "restore"]

RULES = {"eq18": Eq18, "directset": DirectSet, "directcopy": DirectCopy, "boost_scale": BoostScale}
HEAD = ("rho", "freq", "between", "center", "solver", "nonfinite", "graphs")
# What solo-learn's YAML files for BYOL and SimSiam hold: theirs need no other change.
SOLO = ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim", "temperature")


class DirectPred(BaseMethod):  # type: ignore[misc]
    """solo-learn's BYOL or SimSiam, as ``method_kwargs.base`` says, with a `DirectPredHead`.

    A callback that the method brings along closes the steps of the head.

    Args:
        cfg: solo-learn's configuration; the docstring of this module has its ``method_kwargs``.

    Raises:
        ValueError: Among ``method_kwargs``: an unknown key, base or rule, or a wrong value.
    """

    def __new__(cls, cfg: Any = None) -> Any:
        """Make the subclass for the base; copies are of a subclass and come without `cfg`."""
        if cls is DirectPred:
            cls = _choose("base", cfg.method_kwargs.get("base", "byol"), BASES)
        return super().__new__(cls)

    def __init__(self, cfg: Any) -> None:
        # Of the predictor that is thrown away. In place: main_pretrain.py goes on with this cfg.
        cfg.method_kwargs.setdefault("pred_hidden_dim", 1)
        super().__init__(cfg)
        try:
            replace_predictor(self, name="predictor", **_head_options(cfg.method_kwargs))
        except TypeError as error:
            raise ValueError(f"wrong value among {cfg.method_kwargs}: {error}") from error

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; the predictor's is empty unless between="train".

        Empty, it needs no static learning rate. solo-learn keeps one by a function in the state of
        the schedule, and that state cannot be loaded from a checkpoint with torch >= 2.6.
        """
        groups: list[dict[str, Any]] = super().learnable_params
        for group in groups:
            if group["name"] == "predictor" and not list(self.predictor.parameters()):
                group.pop("static_lr", None)
        return groups

    def configure_callbacks(self) -> list[Any]:
        """Add the callback that closes the steps of the head."""
        return [*super().configure_callbacks(), DirectPredCallback()]


BASES = {
    base: type(f"DirectPred{METHODS[base].__name__}", (DirectPred, METHODS[base]), {})
    for base in ("byol", "simsiam")
    if base in METHODS  # a fork may have dropped one
}
globals().update({kind.__name__: kind for kind in BASES.values()})  # where pickle looks for them

NAME = "directpred"
if getattr(METHODS.get(NAME), "__module__", __name__) != __name__:
    NAME = "directpred_head"  # a fork has a method of that name, which stays
METHODS[NAME] = DirectPred


def _head_options(given: Mapping[str, Any]) -> dict[str, Any]:
    name = given.get("rule", "eq18")
    rule = _choose("rule", name, RULES)
    of_rule = [field.name for field in fields(rule)]
    known = ["base", "rule", *of_rule, *HEAD, *SOLO]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"unknown in method_kwargs: {unknown}; known with rule {name}: {known}")
    options = {key: given[key] for key in HEAD if key in given}
    return {"rule": rule(**{key: given[key] for key in of_rule if key in given}), **options}


def _choose(key: str, name: Any, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(f"unknown method_kwargs.{key} {name!r}; known: {', '.join(choices)}")
    return choices[name]
