"""``python -m aqnsim.cli``."""

import sys

from aqnsim.cli import main

if __name__ == "__main__":
    sys.exit(main())
