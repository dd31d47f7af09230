import sys

from experiments.state_tracking.run import main

if __name__ == "__main__":
    sys.exit(main())
