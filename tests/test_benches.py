"""The report of the benches: what its tables say, and that what they need is measured."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # where `benches` is

from benches import report  # noqa: E402


def results(*entries: dict[str, Any], gpu: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "device": gpu or "2 CPU threads",
        "cpu": "a processor",
        "cores": 2,
        "busy": 0.0,
        "threads": 2,
        "gpu": gpu,
        "versions": {"python": "3.11", "jax": "not installed"},
        "date": "2026-01-01",
        "command": "python benches/run.py",
        "seconds": 1,
        "entries": list(entries),
        "left_out": {"no CUDA device": ["test_update[a]", "test_update[b]"]},
    } | more


def timed(name: str, ratio: float, **entry: Any) -> dict[str, Any]:
    size = {"dim": 256, "rows": 512, "views": 1}
    return {"group": "step", "name": name, "median_s": 0.0123, "ratio": ratio} | size | entry


def closing(name: str, dim: int, freq: int, device_s: float) -> dict[str, Any]:
    times = {"device_s": device_s, "host_s": 1e-4, "forward_s": 2e-4}
    return {"group": "closing", "name": name, "dim": dim, "freq": freq, "rows": 512} | times


def targets(*entries: dict[str, Any], gpu: str | None = None) -> dict[str, list[str]]:
    """Goal, measured and met, by figure."""
    lines = report.markdown(results(*entries, gpu=gpu)).splitlines()
    cells = [
        [c.strip() for c in x.split("|")[1:-1]] for x in lines if x[:6] in ("| GPU:", "| CPU:")
    ]
    return {figure: rest for figure, *rest in cells}


def test_a_target_is_judged_by_the_ratio_of_its_entry() -> None:
    found = targets(
        timed("published", 23.0), timed("2-layer", 7.9), timed("DirectPred", 1.1, group="bare")
    )
    assert found["CPU: published ÷ DirectPred, 256 × 512"] == ["≥ 16×", "**23.0×**", "yes"]
    assert found["CPU: 2-layer ÷ DirectPred, 256 × 512"] == ["≥ 8×", "**7.90×**", "no"]
    assert found["CPU: whole step ÷ bare operations, 256 × 512"] == ["≤ 1.1×", "**1.10×**", "yes"]


def test_of_several_figures_the_worst_counts() -> None:
    update = {"group": "update", "solver": "eigh"}
    found = targets(
        timed("torch, CPU", 1.3, dim=128, **update),
        timed("torch, CPU", 1.05, dim=256, **update),
        timed("torch, CPU", 1.2, dim=512, **update),
        timed("NumPy", 9.0, dim=256, **update),
        timed("DirectCopy", 0.1, dim=512, group="norm"),
        timed("DirectCopy", 0.05, dim=1024, group="norm"),
    )
    assert found["CPU: update ÷ bare operations, dim ≥ 256"][1:] == ["**1.20×** dim 512", "no"]
    assert found["CPU: DirectCopy ÷ squarings, dim ≥ 512"][1:] == ["**0.100×** dim 512", "yes"]
    found = targets(timed("2-layer", 1.5), timed("2-layer", 1.2, views=2), gpu="a GPU")
    whole = found["GPU: 2-layer ÷ DirectPred, whole step, 256 × 512"]
    assert whole == ["≥ 1.3×", "**1.20×** both views", "no"]


def test_on_a_gpu_the_heads_closing_is_judged_by_the_devices_time() -> None:
    found = targets(
        closing("DirectPred", 256, 1, 180e-6),
        closing("DirectPred, no graph", 256, 1, 2000e-6),
        closing("DirectPred", 2048, 1, 4.4e-3),
        closing("DirectPred", 2048, 5, 0.9e-3),
        timed("CuPy", 1.0, group="update", solver="matmul", median_s=350e-6),
        timed("CuPy", 1.0, group="update", solver="eigh", median_s=3e-3),
        timed(
            "DirectPred", 1.008, group="training", dim=128, ratio_iqr=0.04, rounds=100, alone_s=1e-3
        ),
        gpu="a GPU",
    )
    assert found["GPU: head, dim 256: the closing"] == ["≤ 200 µs", "**180 µs**", "yes"]
    assert found["GPU: head, dim 2048: the closing"] == ["≤ 4 ms", "**4.40 ms**", "no"]
    assert found["GPU: head, dim 2048, freq 5: a closing"] == ["≤ 1 ms", "**0.900 ms**", "yes"]
    assert found["GPU: `dp.DirectPred` on CuPy, dim 256: an update"][1:] == ["**350 µs**", "yes"]
    added = found["GPU: added to the eager ResNet-18 step"]
    assert added == ["≤ 1 %", "**0.800 %** ± 0.372", "yes"]


def test_gpu_targets_are_not_measured_without_one() -> None:
    found = targets(timed("2-layer", 20.0), closing("DirectPred", 256, 1, 180e-6))
    gpu = [rest for figure, rest in found.items() if figure.startswith("GPU")]
    assert len(gpu) == 6
    assert all(measured == "not measured" for _, measured, _ in gpu)


def test_cpu_figures_are_no_gpu_figures() -> None:
    found = targets(timed("published", 23.0), gpu="a GPU")
    cpu = [rest for figure, rest in found.items() if figure.startswith("CPU")]
    assert len(cpu) == 5
    assert all(measured == "not measured" for _, measured, _ in cpu)


def test_what_was_left_out_shows_in_its_cell_or_as_a_line() -> None:
    skipped = {"group": "step", "name": "published", "dim": 256, "rows": 512, "left_out": "9 GB"}
    text = report.markdown(results(skipped))
    assert "*9 GB*" in text
    assert "- no CUDA device: 2 of `test_update`" in text


def test_tables_have_as_many_cells_in_every_line() -> None:
    update = {"group": "update", "solver": "eigh"}
    training = {"group": "training", "alone_s": 1e-3, "ratio_iqr": 0.1, "rounds": 9}
    entries = [
        timed("published", 23.0),
        timed("published", 23.0, views=2),
        closing("DirectPred", 256, 1, 180e-6),
        timed("loss", 0.1, group="part"),
        timed("NumPy", 1.1, **update),
        timed("DirectPred", 1.0, **training),
        {"group": "memory", "name": "published", "rows": 512, "bytes": 10},
    ]
    blocks = report.markdown(results(*entries)).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 7
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1


def test_figures_of_a_busy_machine_say_so() -> None:
    assert "busy" not in report.markdown(results())
    assert "was busy" in report.markdown(results() | {"busy": 2.5})


def test_a_run_without_recorded_closings_says_so() -> None:
    assert "DIRECTPRED_GRAPHS" not in report.markdown(results(graphs=True))
    assert "DIRECTPRED_GRAPHS=0" in report.markdown(results(graphs=False))


def test_sections_that_the_targets_do_not_need_are_no_gaps() -> None:
    assert "Peak memory" in report.markdown(results())
    assert "Peak memory" not in report.markdown(results(only_targets=True))


@pytest.mark.parametrize("path", sorted(ROOT.glob("benches/results/*.json")), ids=lambda p: p.stem)
def test_committed_results_can_be_printed_once_more(path: Path) -> None:
    text = report.markdown(json.loads(path.read_text()))
    assert text.startswith("# Benches: ")


def test_the_bare_operations_are_those_of_a_step() -> None:
    """Count the operations: no more products and decompositions than the note says."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from benches import bare

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    run = bare.step(8, 16)
    with Counting() as counting:
        run()
    assert counting.calls.count("mm") == 4
    assert sum("eigh" in name for name in counting.calls) == 1
    with Counting() as counting:
        bare.update(torch, torch.randn(16, 8))
    assert counting.calls.count("mm") == 2


def test_loops_with_something_odd_hold_and_would_not_without_the_head_s_care() -> None:
    torch = pytest.importorskip("torch")
    from benches import loops

    assert [held for _, held, _ in loops.rows(2)] == [2] * 10
    loop = loops.Loop(0, loops.sgd)
    loop.micro_batches()
    loop.head.gather(torch.full((4, loops.DIM), 9.0))  # rows that no gradient has reached
    loop.step()
    assert not loop.holds()
