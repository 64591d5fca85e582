"""Every template that ``rayalign init`` writes is a configuration of this version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rayalign.config import load_compare, load_run
from rayalign.config.init import template
from rayalign.errors import UserError
from rayalign.methods import METHODS, resolve


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_methods_template_loads_with_its_defaults(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(template(name))
    run = load_run(path)
    assert (run.name, run.method.name, run.method.config) == (name, name, resolve(name).config())
    assert run.data.train[0].path == f"{tmp_path}/train.jsonl"
    assert bool(run.auxiliary) == resolve(name).requires_auxiliary
    shown = re.findall(r"^  (\w+): ", path.read_text().split("\nmethod:\n")[1].split("\n\n")[0], flags=re.M)
    assert sorted(shown) == sorted(["name", *resolve(name).config.model_fields])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_optional_blocks_of_a_template_load_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        re.sub(
            r"^# (?=weighting:|evaluate:|data_policy:|rollout:|scorer:|label:)|^#(?= {3})",
            "",
            template(name),
            flags=re.M,
        )
    )
    run = load_run(path)
    assert run.evaluate is not None
    shown = [scorer.label for scorer in run.evaluate.scorers]
    assert shown == (["score"] if resolve(name).trains == "policy" else [])
    assert (run.weighting is not None) == ("# weighting:" in template(name))
    assert run.data_policy.name == ("on_policy" if "on_policy" in resolve(name).data_policies else "off_policy")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_filter_of_a_template_loads_where_data_may_be_stored(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    text, num_blocks = re.subn(r"^# (?=filter:)", "", template(name), flags=re.M)
    path.write_text(text)
    filtering = load_run(path).filter
    stored = "off_policy" in resolve(name).data_policies
    assert (num_blocks, filtering is not None) == (int(stored), stored)
    assert filtering is None or filtering.policy_logp_quantile == 0.7


def test_the_comparisons_template_loads(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(template("compare"))
    comparison = load_compare(path)
    assert [cell.id for cell in comparison.cells if cell.run is None] == []
    assert [cell.id for cell in comparison.cells][::3] == [
        "dpo__seed-0",
        "exo_pref__seed-0",
        "wpo__seed-0",
        "dpo-filter-0.7__seed-0",
        "mpo__seed-0",
    ]


def test_the_tuning_of_the_comparisons_template_loads_too(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    text = template("compare")
    block = text.index("# tune:")
    path.write_text(text[:block] + re.sub("^# ?", "", text[block : text.index("\n\n", block)], flags=re.M))
    assert [(tuning.id, len(tuning.trials)) for tuning in load_compare(path).tuning] == [
        ("dpo", 6), ("exo_pref", 0), ("wpo", 6), ("dpo-filter-0.7", 6), ("mpo", 3)
    ]  # fmt: skip


def test_parameters_carry_their_documentation() -> None:
    assert "  beta: 0.1  # Scale of the implicit reward β · log(π/π_ref).\n" in template("dpo")
    assert "\n#   which: both  # Whose weight counts.\n" in template("dpo")


def test_lines_fit_a_screen_and_settings_stand_below_their_comment() -> None:
    lines = template("mpo").splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[lines.index("  logit_temperature: 1.0") - 1].startswith("  # Divides the logits of policy")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="no method is called 'dop'"):
        template("dop")


def test_a_method_beside_one_has_its_parameters_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "init_losses.py").write_text(
        "from dataclasses import replace\n"
        "from rayalign.methods import MethodConfig\n"
        "from rayalign.methods.dpo import METHOD as DPO\n"
        "class Config(MethodConfig):\n"
        "    scale: float = 2.0\n"
        '    """How steep it is."""\n'
        "METHOD = replace(DPO, name='steep', config=Config)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "  scale: 2.0  # How steep it is.\n" in template("init_losses:METHOD")
