"""`python -m learnit_r8` is `r8`."""

from __future__ import annotations

import sys

from learnit_r8.cli import main

if __name__ == "__main__":
    sys.exit(main())
