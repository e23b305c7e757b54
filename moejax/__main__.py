"""`python -m moejax` is the same as the `moejax` command."""

import sys

from moejax.commands import main

if __name__ == "__main__":
    sys.exit(main())
