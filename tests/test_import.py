import subprocess
import sys


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
