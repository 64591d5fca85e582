"""Rule scorers: functions found by module or by file, and results that are numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lab import world

from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.judge.rule import RuleScorer

REWARDS = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True, slots=True)
class Weights:
    per_word: float = 1.0

def words(prompt, reply, *, per_word=Weights().per_word):
    return per_word * len(reply.split()) - len(prompt.split())

def odd(prompt, reply):
    return {"nan": float("nan"), "none": None, "text": "1", "inf": np.inf, "numpy": np.float32(0.5)}[reply]

class Nested:
    @staticmethod
    def words(prompt, reply):
        return 7

number = 3
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARDS)
    return file


def test_a_function_by_module(rewards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(rewards.parent)
    scorer = make_scorer("rule", function="my_rewards:words", arguments={"per_word": 0.5})
    assert scorer.score(["a b", "c"], ["x x x x", ""]) == [0.0, -1.0]
    assert make_scorer("rule", function="my_rewards:Nested.words").score(["a"], ["b"]) == [7.0]


def test_a_function_by_file(rewards: Path) -> None:
    assert make_scorer("rule", function=f"{rewards}:words").score(["a b", "c"], ["x x x x", ""]) == [2.0, -1.0]


def test_the_support_desk_by_file() -> None:
    prompt = "i bought a red lamp from your shop in may . you charged my card twice . please fix this ."
    reply = "dear customer , we will refund the lamp today ."
    scorer = make_scorer("rule", function=f"{world.__file__}:oracle")
    assert scorer.score([prompt], [reply]) == [pytest.approx(0.65)] == [world.oracle(prompt, reply)]


@pytest.mark.parametrize("reply", ["nan", "none", "text", "inf"])
def test_what_is_no_finite_number_is_refused(rewards: Path, reply: str) -> None:
    scorer = RuleScorer(function=f"{rewards}:odd")
    assert scorer.score(["p"], ["numpy"]) == [np.float32(0.5)]
    with pytest.raises(UserError, match=rf"my_rewards.py:odd' returned .* for row 1 \(reply '{reply}'\)"):
        scorer.score(["p", "p"], ["numpy", reply])


def test_one_reply_per_prompt(rewards: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        RuleScorer(function=f"{rewards}:words").score(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_pkg.rewards:helpful", "there is no module 'no_such_pkg'; install it"),
        ("math:no_such_function", "math has no 'no_such_function'; check the spelling"),
        ("math", "write module:name"),
        ("/no/such/file.py:helpful", "there is no file /no/such/file.py"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_functions_that_cannot_be_had(function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RuleScorer(function=function)


def test_what_a_users_module_lacks_is_not_blamed_on_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_rewards.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        RuleScorer(function="needy_rewards:f")
    for _ in range(2):  # a file that failed to load is tried again
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            RuleScorer(function=f"{tmp_path}/needy_rewards.py:f")


def test_unknown_scorers() -> None:
    with pytest.raises(UserError, match="no scorer is called 'rules'; there is llm, reward_model, rule"):
        make_scorer("rules", function="math:sqrt")


def test_a_function_with_other_parameters(rewards: Path) -> None:
    with pytest.raises(UserError, match=r"scorer.function: .*words' takes \(prompt, reply, \*, per_word=1.0\): got an"):
        RuleScorer(function=f"{rewards}:words", arguments={"per_wrod": 2})
    assert RuleScorer(function="math:fmod").arguments == {}
