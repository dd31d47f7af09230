"""The oldest pandas, NumPy, pyarrow and matplotlib that are allowed read and draw the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# with what the oldest pandas needs and the newest does not
OLDEST = ("pandas==2.2.3", "numpy==1.26.0", "pyarrow==17.0.0", "matplotlib==3.9.4", "pytz")
# no warning of a change to come: it would stand above every table
CHECKED = """
import sys, pandas, pytest
assert pandas.__version__ == "2.2.3"
options = ["-q", "-p", "no:cacheprovider", "-W", "error::FutureWarning"]
sys.exit(pytest.main([*options, "-m", "not slow", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_oldest_pandas_passes_too(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path), *OLDEST], check=True)
    names = ("analysis_load", "analysis_command", "figures", "models", "page", "pooled")
    tests = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    python = [sys.executable, "-c", CHECKED, *map(str, tests)]
    subprocess.run(python, check=True, env=os.environ | {"PYTHONPATH": paths})
