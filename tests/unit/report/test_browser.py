"""The page in a real browser, where one is installed: the policy lets its script run, and a click sorts a table."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_comparison import comparison_input, few_cells, seeded

from rayalign.report.merge import merge
from rayalign.report.points import ComparisonRecord
from rayalign.report.render import render_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync --enable-logging=stderr"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")


MEASURE = """
const [width, widest] = [document.documentElement.clientWidth, document.documentElement.scrollWidth];
const over = [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll, svg")
  && one.getBoundingClientRect().right > width + 1).map((one) => one.outerHTML.slice(0, 60).replace(/"/g, "'"));
parent.postMessage([`${widest - width} pixels`, ...over].join("; "), "*");
"""


def opened(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The document after its scripts ran, and the browser's log."""
    return browse(page, profile, "--dump-dom", *flags)


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), *flags, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def oracle_column(document: str) -> list[float]:
    table = document.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)
    return [float(re.findall(r'data-value="([^"]*)"', row)[2]) for row in rows]


def test_the_page_loads_without_a_complaint_and_sorts_on_a_click(tmp_path: Path) -> None:
    report = render_report(ComparisonRecord.model_validate(few_cells()), tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("shape", ["many", "seeded", "merged"])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int, shape: str) -> None:
    """In a frame of that width, as a window cannot be made narrower than 500 pixels; tables scroll by themselves."""
    given = {"many": comparison_input(), "seeded": seeded(few_cells()), "merged": few_cells()}[shape]
    comparison = ComparisonRecord.model_validate(given)
    if shape == "merged":
        comparison = merge([("a", comparison), ("b", comparison)])
    page = render_report(comparison, tmp_path)
    text = page.read_text().replace("<details>", "<details open>")
    page.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{MEASURE}</script></body>")
    )
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.name}" width="{width}" height="3000" '
        'style="border:0"></iframe><script>addEventListener("message", (event) => '
        "document.body.dataset.found = event.data)</script></body>"
    )
    document, _ = opened(frame, tmp_path / "profile", "--virtual-time-budget=5000")
    found = re.search(r'data-found="([^"]*)"', document)
    assert found and found[1] == "0 pixels"
    shot = tmp_path / "shot.png"
    browse(frame, tmp_path / "profile", f"--screenshot={shot}", f"--window-size={max(width, 500)},3000")
    assert shot.stat().st_size > 20_000
