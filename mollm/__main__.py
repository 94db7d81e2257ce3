"""`python -m mollm`."""

import sys

from mollm.cli import main

if __name__ == "__main__":
    sys.exit(main())
