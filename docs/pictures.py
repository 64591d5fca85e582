"""The pictures of README.md, from a report: ``python -m docs.pictures runs/pictures/report`` (`make pictures`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 870
"""Pixels of the report's head, down to the end of its first table."""


def browser() -> str:
    """The first browser on the path.

    Raises:
        SystemExit: none of ``BROWSERS`` is installed.
    """
    for name in BROWSERS:
        if shutil.which(name):
            return name
    raise SystemExit(f"no browser found; install one of {', '.join(BROWSERS)}")


def photograph(page: Path, target: Path) -> None:
    """Write the head of ``page`` to ``target``, a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={target}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, stderr=subprocess.DEVNULL)


def main(report: Path) -> None:
    """Write ``report.png`` and ``frontier.svg``."""
    IMAGES.mkdir(exist_ok=True)
    photograph(report / "report.html", IMAGES / "report.png")
    [drawing] = report.glob("frontier-*.svg")
    shutil.copyfile(drawing, IMAGES / "frontier.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
