import sys

from experiments.help import answered

if __name__ == "__main__":
    if answered("converge"):
        sys.exit()
    from experiments.converge.run import main  # imports torch

    sys.exit(main())
