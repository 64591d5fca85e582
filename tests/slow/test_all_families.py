"""All causal types of the installed transformers: each is right in every column, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from causal_zoo import TYPES
from family_cells import COLUMNS, Cell, row

from rayalign.engine.model.loading import quiet_transformers

FEW = ("cohere2", "deepseek_v3", "jamba", "laguna", "llama4_text", "phimoe", "qwen3_next", "trocr")
"""What was wrong once, each in another way."""
RIGHT = {"load": 110, "LoRA": 100, "LoRA on experts": 35, "sampler": 100}
"""How many types are right at least, so that refusals do not grow in silence."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "cache"))
    with quiet_transformers():
        yield


@pytest.mark.parametrize(
    "model_type",
    [own if own in ("jamba", "deepseek_v3") else pytest.param(own, marks=pytest.mark.slow) for own in FEW],
)
def test_a_family_is_right_in_every_column(model_type: str, tmp_path: Path) -> None:
    cells = row(model_type, tmp_path)
    assert [(column, own.outcome) for column, own in cells.items() if not own.outcome.startswith("ok")] == []


@pytest.mark.slow
def test_no_family_is_wrong_in_silence(tmp_path: Path) -> None:
    table: dict[str, dict[str, Cell]] = {model_type: row(model_type, tmp_path / model_type) for model_type in TYPES}
    print(f"\n{'':24}" + "".join(f"{column:26}" for column in COLUMNS))
    for model_type, cells in table.items():
        shown = (cells[column].outcome[:24] if column in cells else "" for column in COLUMNS)
        print(f"{model_type:24}" + "".join(f"{text:26}" for text in shown))
    reasons = {f"{name}, {column}: {own.outcome}" for name, cells in table.items() for column, own in cells.items()}
    print("\n".join(sorted(reason for reason in reasons if ": refused" in reason)))
    assert [name for name, cells in table.items() if not all(own.right for own in cells.values())] == []
    counts = {
        column: sum(cells[column].outcome.startswith("ok") for cells in table.values() if column in cells)
        for column in COLUMNS
    }
    print(counts, f"of {len(table)} types")
    assert all(counts[column] >= least for column, least in RIGHT.items())
