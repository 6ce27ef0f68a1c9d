"""Print the lowest allowed version of every direct dependency of some extras, for pip install.

python .ci/lowest.py train jax
"""

import re
import sys
import tomllib
from pathlib import Path


def lowest(requirements: list[str], extras: dict[str, list[str]]) -> list[str]:
    """Requirements ``name>=version`` as ``name==version``, those of the package's extras too."""
    pinned = []
    for requirement in requirements:
        if inner := re.fullmatch(r"directpred\[(.+)\]", requirement):
            for extra in inner[1].split(","):
                pinned += lowest(extras[extra], extras)
        else:
            name, bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement).groups()
            pinned.append(f"{name}=={bound}")
    return pinned


project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
chosen = [f"directpred[{','.join(sys.argv[1:])}]"] if sys.argv[1:] else []
print(*dict.fromkeys(lowest(project["dependencies"] + chosen, extras)))
