"""``python -m arsd``."""

import sys

from arsd.cli import main

if __name__ == "__main__":
    sys.exit(main())
