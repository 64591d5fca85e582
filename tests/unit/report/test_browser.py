"""The page in a real browser, where one is installed: the policy lets its script run, and a click sorts a table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_comparison import few_cells

from rayalign.report.points import Comparison
from rayalign.report.render import render

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync --enable-logging=stderr"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")


def opened(page: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts ran, and the browser's log."""
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def oracle_column(document: str) -> list[float]:
    table = document.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)
    return [float(re.findall(r'data-value="([^"]*)"', row)[2]) for row in rows]


def test_the_page_loads_without_a_complaint_and_sorts_on_a_click(tmp_path: Path) -> None:
    report = render(Comparison.model_validate(few_cells()), tmp_path)
    _, log = opened(report, tmp_path / "profile")
    assert "CONSOLE" not in log

    clicking = report.with_name("clicking.html")
    html = re.sub(r"<meta http-equiv[^>]*>", "", report.read_text())
    click = "<script>document.querySelectorAll('#glance th[aria-sort]')[2].querySelector('button').click()</script>"
    clicking.write_text(html.replace("</body>", click + "</body>"))
    document, log = opened(clicking, tmp_path / "profile")
    assert "CONSOLE" not in log
    values = oracle_column(document)
    assert values == sorted(values)
    assert values != oracle_column(html)
    assert 'aria-sort="ascending"' in document
