"""The oldest version of transformers that pyproject.toml allows says the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# with what it needs in older versions than the newest transformers does
OLDEST = ("transformers==4.56.2", "tokenizers==0.22.2", "huggingface_hub==0.36.2")


@pytest.mark.slow
def test_the_oldest_transformers_passes_too(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path), *OLDEST], check=True)
    tests = [Path(__file__).with_name(f"test_hugging_face{part}.py") for part in PARTS]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    python = [sys.executable, "-c", CHECKED, *map(str, tests)]
    subprocess.run(python, check=True, env=os.environ | {"PYTHONPATH": paths})


PARTS = ("", "_folder", "_lyapunov", "_tokenizer")
CHECKED = """
import sys, pytest, transformers
assert transformers.__version__ == "4.56.2"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
