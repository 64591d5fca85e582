"""The committed reference is what the code says, and the code says something of everything."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from pages import REPOSITORY
from pydantic.fields import FieldInfo

import docs.generate as generate
from rayalign.config.compare import CompareConfig
from rayalign.config.run import RunConfig
from rayalign.methods import METHODS, resolve

TITLES = {
    "reward_model": "Reward model",
    "robust_dpo": "Robust DPO",
    "hinge": "Hinge",
    "reinforce_pp": "REINFORCE++",
    "slic": "SLiC",
    "wpo": "WPO",
}
"""What the page calls methods that its text does not name as a setting."""


@pytest.mark.parametrize("name", ["cli.md", "configuration.md", "files.md"])
def test_a_page_is_what_is_generated(name: str) -> None:
    path = REPOSITORY / "docs" / "reference" / name
    assert path.read_text(encoding="utf-8") == generate.pages()[path], "run: python -m docs.generate"


def every_setting() -> dict[str, FieldInfo]:
    models = [*generate.walk(RunConfig, ""), *generate.walk(CompareConfig, "")]
    models += [(f"method: {name}", resolve(name).config) for name in METHODS]
    found: dict[str, FieldInfo] = {}
    for title, model in models:
        found |= {f"{title}.{key}": field for key, field in model.model_fields.items()}
    return found


def test_every_setting_says_what_it_means() -> None:
    assert [name for name, field in every_setting().items() if not generate.meaning(field)] == []


def test_every_setting_is_read_somewhere() -> None:
    files = (REPOSITORY / "rayalign").rglob("*.py")
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    read = set(re.findall(r"\.(\w+)\b(?!\()", code))
    silent = {name: field for name, field in every_setting().items() if name.rpartition(".")[2] not in read}
    # A setting that has one value says what is so, and is not read.
    assert [name for name, field in silent.items() if len(get_args(field.annotation)) != 1] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained_with_its_paper(name: str) -> None:
    page = (REPOSITORY / "docs" / "explanation" / "methods.md").read_text(encoding="utf-8")
    [paper] = re.findall(r"arXiv:([\d.]+)", resolve(name).paper)
    assert f"`{name}`" in page or f"`method: {name}`" in page or name in TITLES and f"**{TITLES[name]}**" in page
    assert f"https://arxiv.org/abs/{paper}" in page


def test_types_are_words_with_their_bounds() -> None:
    page = generate.configuration_page()
    for row in (
        "| `lr` | number > 0 | `1.0e-06` |",
        "| `gpu_memory_utilization` | number > 0 and ≤ 1, or `null` | `null` |",
        "| `label_smoothing` | number in [0, 0.5) | `0.0` |",
        "| `actors` | whole number, `[smallest, largest]` or `auto` | `auto` |",
        "| `clip` | number > 0 and < 1, or `null` | `0.2` |",
        r"| `truncated` | `keep` \| `drop` \| `close` | `keep` |",
        "| `lora` | [block](#modellora), or `null` | `null` |",
    ):
        assert row in page
