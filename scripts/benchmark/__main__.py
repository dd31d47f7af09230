"""Benchmarks, each of which prints ratios against a peer, with their range.

python -m scripts.benchmark sweep          # the whole study against a naive loop
python -m scripts.benchmark generation     # text with feedback against transformers' plain text
python -m scripts.benchmark cuda           # a sweep's passes on a GPU
python -m scripts.benchmark load           # reading many saved runs
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib import import_module

import torch

from experiments.runs.provenance import provenance
from scripts._command import command


@command("benchmark")
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=("sweep", "generation", "cuda", "load"))
    parser.add_argument("--quick", action="store_true", help="at most two minutes, on less")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY", help="some rows")
    options = parser.parse_args()
    measures = import_module(f"scripts.benchmark.{options.name}").ROWS
    there = [key for keys in measures for key in keys]
    if unknown := set(options.only).difference(there):
        parser.error(f"--only: {options.name} has {', '.join(there)}, not {min(unknown)}")
    machine = hardware()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    done = []
    for keys, measure in measures.items():
        if options.only and set(options.only).isdisjoint(keys):
            continue
        for row in measure(quick=options.quick):
            mark = ("met" if row.met else "MISSED") if row.target else ""
            spread = f"{row.value:8.2f}  ({row.low:.2f} to {row.high:.2f})"
            print(f"{row.key:22} {spread:30} {row.target:8} {mark:6}  {row.note}", flush=True)
            done.append(row)
    if options.json:
        about = {**machine, "quick": options.quick, "rows": list(map(asdict, done))}
        print(json.dumps({row.key: row.value for row in done} | about))


def hardware() -> dict[str, object]:
    found = provenance(torch.device("cpu"))
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": found["device"],
        **gpu,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        **{key: found[key] for key in ("threads", "commit", "dirty")},
    }


if __name__ == "__main__":
    sys.exit(main())
