"""`python -m fastmt`: the commands of fastmt."""

import sys

from fastmt.cli import main

if __name__ == "__main__":
    sys.exit(main())
