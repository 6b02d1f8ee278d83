"""``python -m kfqn``."""

import sys

from kfqn.race.cli import main

if __name__ == "__main__":
    sys.exit(main())
