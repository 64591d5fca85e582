"""``rayalign`` and ``python -m rayalign``: the command line, which Ctrl-C ends without a traceback from the start."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from rayalign.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
