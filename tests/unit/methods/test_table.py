"""Names resolve to methods, and importing the table costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rayalign.methods
from rayalign.errors import UserError
from rayalign.methods import METHODS, resolve

PAIRWISE = {"dpo", "robust_dpo", "ipo", "hinge", "slic", "simpo", "orpo", "exo_pref", "mpo", "wpo"}
ON_ROUNDS = {"rloo", "reinforce_pp", "grpo", "ppo"}


def test_table_is_sorted_and_every_entry_carries_its_name() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert {name: resolve(name).name for name in METHODS} == {name: name for name in METHODS}


def test_what_methods_learn_from() -> None:
    kinds = {name: resolve(name).candidates for name in METHODS}
    assert {name for name, kind in kinds.items() if kind == "pair"} == PAIRWISE
    assert {name for name, kind in kinds.items() if kind == "ranking"} == {"reward_model"}
    assert {name for name, kind in kinds.items() if kind == "group"} == {"exo_rw", "dpo_rw"} | ON_ROUNDS
    assert {name for name, kind in kinds.items() if kind == "one"} == {"sft", "kto"}


def test_only_the_reward_model_trains_no_policy() -> None:
    assert [name for name in METHODS if resolve(name).trains == "scalar"] == ["reward_model"]


def test_only_reward_models_are_bound_to_stored_data_and_policy_gradients_to_fresh_ones() -> None:
    bound = {"reward_model": {"off_policy"}, **dict.fromkeys(ON_ROUNDS, {"on_policy"})}
    for name in METHODS:
        assert resolve(name).data_policies == bound.get(name, {"off_policy", "on_policy", "hybrid"})


def test_only_baselines_beyond_the_group_allow_one_sample_of_a_prompt() -> None:
    assert {name for name in METHODS if resolve(name).smallest_group == 1} == {"reinforce_pp", "ppo"}


def test_only_ppo_has_a_critic() -> None:
    assert {name for name in METHODS if resolve(name).critic is not None} == {"ppo"}


def test_policy_gradients_need_the_reference_only_with_a_kl_coefficient() -> None:
    for method in map(resolve, ON_ROUNDS):
        assert "ref_token_logp" in method.needed(method.config())
        assert "ref_token_logp" not in method.needed(method.config(kl_coef=0))


def test_reference_free_methods_ask_for_no_reference() -> None:
    free = {name for name in METHODS if "ref_logp" not in resolve(name).needed(resolve(name).config())} - ON_ROUNDS
    assert free == {"sft", "reward_model", "simpo", "orpo", "slic", "mpo"}
    mpo = resolve("mpo")
    assert "ref_logp" in mpo.needed(mpo.config(use_reference=True))


def test_only_mpo_requires_auxiliary_data() -> None:
    assert [name for name in METHODS if resolve(name).requires_auxiliary] == ["mpo"]


def test_exo_asks_for_behavior_log_probabilities_unless_correction_is_off() -> None:
    exo = resolve("exo_rw")
    assert "behavior_logp" in exo.needed(exo.config())
    assert "behavior_logp" not in exo.needed(exo.config(behavior_correction="off"))


def test_every_exported_name_resolves_to_itself_every_time() -> None:
    for name in rayalign.methods.__all__:
        first = getattr(rayalign.methods, name)
        assert getattr(rayalign.methods, name) is first
        assert not isinstance(first, ModuleType)


def test_importing_the_table_does_not_import_torch() -> None:
    code = "import sys, rayalign.methods; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(("name", "nearest"), [("simp", "simpo"), ("exo", "exo_rw"), ("dpo-rw", "dpo_rw")])
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"no method is called '{name}'; did you mean .*{nearest}"):
        resolve(name)


def test_a_method_inside_a_class_or_namespace_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Losses:\n    from rayalign.methods.dpo import METHOD\n"
    (tmp_path / "nested_losses.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("nested_losses:Losses.METHOD") is resolve("dpo")


def test_a_hopeless_name_gets_the_whole_table() -> None:
    with pytest.raises(UserError, match="did you mean dpo or dpo_rw or exo_pref or"):
        resolve("zzzzzz")


def test_a_path_to_nothing_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_losses.py").write_text("METHOD = 3\n")
    (tmp_path / "broken_losses.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="there is no module 'no_losses'"):
        resolve("no_losses:METHOD")
    with pytest.raises(UserError, match="'half_losses:METHOD' is a int, not a rayalign.methods.Method"):
        resolve("half_losses:METHOD")
    with pytest.raises(UserError, match="half_losses has no 'OTHER'"):
        resolve("half_losses:OTHER")
    with pytest.raises(UserError, match="named by its module, not by its file"):
        resolve(f"{tmp_path}/half_losses.py:METHOD")
    with pytest.raises(UserError, match=r"No module named 'a_module_that_is_not_there' \(.*broken_losses.py:1\)"):
        resolve("broken_losses:METHOD")
