"""`python -m limbeck` is the `limbeck` command."""

import sys

from limbeck.cli import main

if __name__ == "__main__":
    sys.exit(main())
