"""What `stateful-gpt-analysis` starts: `python -m analysis`, which by itself knows no library."""

import sys

from analysis.__main__ import main as analysis
from stateful_gpt.console import run_command


def main() -> int:
    return run_command("analysis", analysis)


if __name__ == "__main__":
    sys.exit(main())
