import subprocess
import sys

import pytest


def fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def test_import_touches_no_framework():
    loaded = fresh("import sys, directpred; print(*sys.modules)")
    assert "directpred.predictor" in loaded
    assert not {"torch", "jax", "cupy", "scipy", "array_api_compat.torch"} & set(loaded)


def test_numpy_use_touches_no_framework():
    loaded = fresh(
        "import sys, numpy, directpred\n"
        "directpred.DirectPred(2).update(numpy.eye(2))\n"
        "print(*sys.modules)"
    )
    assert not {"torch", "jax", "cupy"} & set(loaded)


def test_types_ship():
    from importlib.resources import files

    assert files("directpred").joinpath("py.typed").is_file()


def test_importing_the_head_changes_nothing_elsewhere():
    """No registration with dynamo, which imports it, and modules load again."""
    pytest.importorskip("torch")
    printed = fresh(
        "import importlib, sys, torch, array_api_compat\n"
        "known = 'torch._dynamo' in sys.modules\n"
        "before = {k: v for k, v in vars(array_api_compat).items() if callable(v)}\n"
        "precision = torch.get_float32_matmul_precision()\n"
        "import directpred.torch\n"
        "assert known or 'torch._dynamo' not in sys.modules\n"
        "assert all(getattr(array_api_compat, k) is v for k, v in before.items())\n"
        "assert torch.get_float32_matmul_precision() == precision\n"
        "for name in [m for m in sys.modules if m.startswith('directpred')]:\n"
        "    importlib.reload(sys.modules[name])\n"
        "head = directpred.torch.DirectPredHead(4)\n"
        "torch.compile(head, fullgraph=True, backend='eager')(torch.randn(8, 4))\n"
        "head.step()\n"
        "print(int(head.step_count))"
    )
    assert printed == ["1"]


def test_the_import_paths_before_the_rooms_still_work():
    pytest.importorskip("torch")
    from directpred.correlation import check_features, describe_nonfinite
    from directpred.predictor import NonFinite, Options, advance, check_dim
    from directpred.ranks import several, sum_over_ranks

    assert all([check_features, describe_nonfinite, NonFinite, Options, advance, check_dim])
    assert all([several, sum_over_ranks])
