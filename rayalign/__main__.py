"""``python -m rayalign`` is the command line."""

from rayalign.cli import main

main()
