"""Benchmarks, each of which prints ratios against a peer, with their range.

    python -m scripts.benchmark sweep          # the whole study against a naive loop
    python -m scripts.benchmark generation     # text with feedback against transformers' plain text
    python -m scripts.benchmark cuda           # a sweep's passes on a GPU
    python -m scripts.benchmark load           # reading many saved runs

``--quick`` takes at most two minutes, ``--json`` prints an object as the last line.
"""

import sys
from importlib import import_module

NAMES = ("sweep", "generation", "cuda", "load")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(__doc__, file=sys.stderr)
        return 2
    module = import_module(f"scripts.benchmark.{sys.argv.pop(1)}")
    code: int = module.main()
    return code


if __name__ == "__main__":
    sys.exit(main())
