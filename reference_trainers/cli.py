"""The ``directpred`` command line.

Torch, Lightning and the rest are imported by the commands that need them, so that ``--help`` is
quick and works without them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .errors import Interrupted, UsageError, UserError, number_of
from .grids import ABLATIONS, Grid, parse
from .recipe import COMPARED, PREDICTORS, Recipe, descriptions
from .signals import sigterm_interrupts
from .theory.knobs import CLAIMS, KNOBS

_CONFIGS = Path(__file__).parent / "configs"
_TRAIN_EXTRA = {
    "kornia",
    "lightning",
    "matplotlib",
    "rich",
    "scipy",
    "sklearn",
    "safetensors",
    "threadpoolctl",
    "timm",
    "torch",
    "torchvision",
    "yaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status: 0, 1 for an error, 2 for wrong usage, and for a signal that ended it 128
        more than its number: 130 for Ctrl-C, 143 for SIGTERM, which acts as Ctrl-C does.
    """
    with sigterm_interrupts():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
        options.command(options)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    except UsageError as error:
        return _fail(2, error)
    except UserError as error:
        return _fail(1, error)
    except Interrupted as error:
        return _fail(128 + error.number, error)
    except KeyboardInterrupt as interrupt:
        return _fail(128 + number_of(interrupt), "interrupted")
    except OSError as error:
        return _fail(1, error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_EXTRA:
            raise
        return _fail(1, f'{package} is missing: pip install "directpred[train]"')
    return 0


def _fail(status: int, message: object) -> int:
    print(f"directpred: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """A parser that tells a wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="directpred",
        description="Set the predictor of BYOL and SimSiam instead of training it.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> _Parser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    compare = command("compare", _compare, "Train every predictor on real images and compare.")
    compare.add_argument(
        "--predictors",
        type=_predictors,
        default=COMPARED,
        metavar="A,B",
        help=f"which, of {', '.join(PREDICTORS)}; default: {','.join(COMPARED)}",
    )
    compare.add_argument("--seeds", type=_count, default=2, help="how many; default: 2")
    _add_workers(compare, min(8, os.cpu_count() or 1), "as many as cores, at most 8")
    _add_config(compare)
    _add_data(compare)
    _add_out(compare)
    _add_recipe(compare, without=("predictor", "seed"))

    sweep = command("sweep", _sweep, "Train with all combinations of some options, or ablate.")
    grids = sweep.add_mutually_exclusive_group(required=True)
    grids.add_argument(
        "--vary",
        action="append",
        metavar="OPTION=X,Y",
        help="values of an option of the recipe; once for each option that varies",
    )
    grids.add_argument(
        "--ablations",
        nargs="?",
        type=_ablations,
        const=ABLATIONS,
        metavar="A,B",
        help=f"the paper's, all of them or some of {', '.join(grid.name for grid in ABLATIONS)}",
    )
    sweep.add_argument("--seeds", type=_count, default=2, help="how many; default: 2")
    _add_workers(sweep, os.cpu_count() or 1, "as many as cores")
    sweep.add_argument(
        "--keep-checkpoints", action="store_true", help="keep those of runs that are finished"
    )
    _add_config(sweep)
    _add_data(sweep)
    _add_out(sweep)
    _add_recipe(sweep, without=("seed",))

    train = command("train", _train, "Train one predictor by a recipe.")
    _add_config(train)
    train.add_argument(
        "--resume", type=Path, metavar="PATH", help="checkpoint or run to go on with"
    )
    _add_data(train)
    train.add_argument(
        "--workers", type=int, default=0, help="processes that decode images from files; default: 0"
    )
    train.add_argument("--devices", type=_count, default=1, help="processes a node; default: 1")
    train.add_argument("--nodes", type=_count, default=1, help="default: 1")
    train.add_argument(
        "--keep-every",
        type=_count,
        default=0,
        metavar="N",
        help="keep a checkpoint every N epochs; the last one is always there",
    )
    _add_out(train)
    _add_recipe(train)

    evaluate = command("evaluate", _evaluate, "Linear probe and k-NN of a checkpoint.")
    evaluate.add_argument("--checkpoint", type=Path, required=True, metavar="PATH")
    _add_data(evaluate)
    evaluate.add_argument(
        "--workers", type=int, default=0, help="processes that decode images from files; default: 0"
    )
    evaluate.add_argument(
        "--epochs", type=_count, default=80, help="of the linear probe on ImageNet; default: 80"
    )
    evaluate.add_argument(
        "--features", type=Path, metavar="PATH", help="write the encoder's features to this .npz"
    )
    evaluate.add_argument(
        "--backbone",
        type=Path,
        metavar="PATH",
        help="write the encoder's weights to this .safetensors; a ResNet's are torchvision's",
    )
    report = command("report", _report, "Compare runs on one page, report.html and report.png.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="default: that of the run; of several, this one"
    )

    dynamics = command("dynamics", _dynamics, "Watch the theory's claims: predicted and measured.")
    claims = ", ".join(CLAIMS)
    dynamics.add_argument(
        "claim", nargs="?", choices=CLAIMS, metavar="claim", help=f"{claims}; default: all of them"
    )
    _add_out(dynamics)
    _add_knobs(dynamics)
    return parser


def _add_config(parser: _Parser) -> None:
    names = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.yaml")))
    parser.add_argument("--config", help=f"YAML file, or one of {names}")


def _add_workers(parser: _Parser, count: int, text: str) -> None:
    parser.add_argument(
        "--workers",
        type=_count,
        default=count,
        help=f"processes; the numbers do not depend on it; default: {text}",
    )


def _add_data(parser: _Parser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the images are")
    parser.add_argument("--download", action="store_true", help="download what is missing there")


def _add_out(parser: _Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--name", help="directory in --out; default: command, date and time")


def _add_recipe(parser: _Parser, without: Sequence[str] = ()) -> None:
    group = parser.add_argument_group("recipe")
    for name, text in descriptions().items():
        if name not in without:
            group.add_argument(
                f"--{name.replace('_', '-')}",
                f"--{name}",
                dest=name,
                metavar="X",
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
            )


def _add_knobs(parser: _Parser) -> None:
    group = parser.add_argument_group(
        "knobs", "A claim has those that it depends on, and tells which; simulate has all."
    )
    for name, (kind, text) in KNOBS.items():
        shown: dict[str, Any] = {} if "action" in kind else {"metavar": "X"}
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind, **shown)


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the recipe that were given on the command line."""
    given = vars(options)
    return {field.name: given[field.name] for field in fields(Recipe) if field.name in given}


def _predictors(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PREDICTORS:
            raise argparse.ArgumentTypeError(
                f"unknown predictor {name!r}; known are {', '.join(PREDICTORS)}"
            )
    return names


def _ablations(text: str) -> tuple[Grid, ...]:
    known = {grid.name: grid for grid in ABLATIONS}
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"unknown ablation {name!r}; known are {', '.join(known)}"
            )
    return tuple(known[name] for name in dict.fromkeys(text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)


def _config(name: str) -> dict[str, Any]:
    """The options in a YAML file, given by its path or as the name of a bundled one."""
    import yaml

    bundled = {path.name: path for path in _CONFIGS.glob("*.yaml")}
    path = Path(name)
    if not path.is_file():
        if name.removesuffix(".yaml") + ".yaml" not in bundled:
            known = ", ".join(sorted(bundled))
            raise UserError(f"no config {name!r}: neither a file nor one of the bundled {known}")
        path = bundled[name.removesuffix(".yaml") + ".yaml"]
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise UsageError(f"{path}: not a list of 'option: value'")
        Recipe.parse(options)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return options


def _compare(options: argparse.Namespace) -> None:
    recipe = (_config(options.config) if options.config else {}) | _recipe(options)
    recipe = {name: value for name, value in recipe.items() if name not in ("predictor", "seed")}
    Recipe.parse(recipe)
    from .compare import compare
    from .train import Machine

    machine = Machine(options.data, options.download)
    names, seeds = options.predictors, options.seeds
    compare(recipe, names, seeds, options.out, options.name, options.workers, machine)


def _sweep(options: argparse.Namespace) -> None:
    given = _recipe(options)
    grids = options.ablations or (parse(options.vary),)
    for name in given:
        if any(name in grid.vary or name in grid.given for grid in grids):
            raise UsageError(f"--{name.replace('_', '-')} is given, and the sweep sets it")
    recipe = (_config(options.config) if options.config else {}) | given
    recipe = {name: value for name, value in recipe.items() if name != "seed"}
    Recipe.parse(recipe)
    from .sweep import sweep
    from .train import Machine

    machine = Machine(options.data, options.download)
    seeds, workers, keep = options.seeds, options.workers, options.keep_checkpoints
    sweep(recipe, grids, seeds, options.out, options.name, workers, keep, machine)


def _train(options: argparse.Namespace) -> None:
    if options.config and options.resume:
        raise UsageError("--resume goes on with the run's own recipe; leave out --config")
    recipe = (_config(options.config) if options.config else {}) | _recipe(options)
    Recipe.parse(recipe)
    from .train import Machine, train

    names = ("data", "download", "workers", "devices", "nodes", "keep_every")
    machine = Machine(**{name: getattr(options, name) for name in names})
    train(recipe, options.out, options.name, options.resume, machine)


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import evaluate

    given = options.data, options.download, options.workers, options.features, options.backbone
    evaluate(options.checkpoint, *given, options.epochs)


def _report(options: argparse.Namespace) -> None:
    from .report.command import report

    report(options.runs, options.out)


def _dynamics(options: argparse.Namespace) -> None:
    from .theory.command import dynamics

    knobs = {name: value for name, value in vars(options).items() if name in KNOBS}
    dynamics(options.claim, knobs, options.out, options.name)
