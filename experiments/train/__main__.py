import sys

from experiments.train.run import main

if __name__ == "__main__":
    sys.exit(main())
