import sys

from experiments.converge.run import main

if __name__ == "__main__":
    sys.exit(main())
