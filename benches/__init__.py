"""What things cost: everything that measures, and its report.

`run.py` measures speed and memory (`test_*.py`, one file a group) and writes `results/`; `soak.py`
and `faults.py` run long and break things; `throughput.py` looks into a training step; `device.sh`
runs the tests and benches of a GPU on a rented machine.
"""
