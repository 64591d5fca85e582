"""Rule scorers: functions found by module or by file, and results that are numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import odd_rewards
import pytest
from lab import world
from workspaces import processes, wait_until

from rayalign.errors import UserError
from rayalign.judge import make_scorer
from rayalign.judge.base import NoVerdict, ScorerUnusable
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


ODD = Path(odd_rewards.__file__)


@pytest.fixture(scope="module")
def odd() -> RuleScorer:
    return RuleScorer(function=f"{ODD}:value")


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
    with pytest.raises(
        NoVerdict, match=rf"my_rewards.py:odd' returned .* for row 1 \(reply '{reply}'\): it must ret"
    ) as caught:
        scorer.score(["p", "p", "p"], ["numpy", reply, "numpy"])
    assert caught.value.values[::2] == (0.5, 0.5) and math.isnan(caught.value.values[1])


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
    for name in ("needy_rewards:f", f"{tmp_path}/needy_rewards.py:f"):
        with pytest.raises(UserError, match=r"ModuleNotFoundError: .*no_such_dependency.*needy_rewards.py:1"):
            RuleScorer(function=name)


def test_unknown_scorers() -> None:
    with pytest.raises(UserError, match="no scorer is called 'rules'; there is llm, reward_model, rule"):
        make_scorer("rules", function="math:sqrt")


def test_a_function_with_other_parameters(rewards: Path) -> None:
    with pytest.raises(UserError, match=r"scorer.function: .*words' takes \(prompt, reply, \*, per_word=1.0\), and is"):
        RuleScorer(function=f"{rewards}:words", arguments={"per_wrod": 2})
    RuleScorer(function="math:fmod")  # written in C, without a signature


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("int", 2.0), ("float", 0.5), ("bool", 1.0), ("fraction", 0.25), ("decimal", 0.25), ("numpy float", 0.5),
        ("numpy half", 0.5), ("numpy int", 3.0), ("numpy bool", 1.0), ("numpy array without dimensions", 2.0),
        ("None", "returned None"), ("text", "returned '0.5'"), ("numpy text", "returned np.str_('0.5')"),
        ("list", "returned [1.0]"), ("numpy array", "returned array([1.])"), ("dict", "returned {'score': 1.0}"),
        ("complex", "returned 1j"), ("nan", "returned nan"), ("numpy nan", "returned np.float32(nan)"),
        ("inf", "returned -inf"), ("type", "returned <class 'float'>"), ("object", "returned <object object at"),
        ("integer of 400 digits", "raised OverflowError"), ("integer of 5000 digits", "raised OverflowError"),
    ],
)  # fmt: skip
def test_numbers_of_every_library_are_scores_and_nothing_else_is(
    odd: RuleScorer, reply: str, expected: float | str
) -> None:
    if isinstance(expected, float):
        assert odd.score(["p"], [reply]) == [expected]
        return
    with pytest.raises(NoVerdict, match=re.escape(f"odd_rewards.py:value' {expected}")) as caught:
        odd.score(["p"], [reply])
    assert f"for row 0 (reply '{reply}')" in str(caught.value)


def test_tensors_are_scores_too() -> None:
    scorer = RuleScorer(function=f"{ODD}:tensor")
    assert scorer.score(["p"] * 3, ["tensor", "bfloat16", "bool"]) == [1.5, 1.5, 1.0]
    with pytest.raises(NoVerdict, match=r"returned tensor\(\[1.\]\)"):
        scorer.score(["p"], ["one dimension"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("coroutine", "is an async function, and nothing would await it: write def, not async def"),
        ("instance", "is an async function"),
        ("generator", "is a generator: return its value, do not yield it"),
        (
            "wants_more",
            r"takes \(prompt: 'str', reply: 'str', answer: 'str'\) -> 'float', and is called with "
            r"\('a prompt', 'a reply'\): missing a required argument",
        ),
    ],
)
def test_functions_that_could_give_no_number_are_refused_at_once(function: str, message: str) -> None:
    with pytest.raises(UserError, match=f"scorer.function: '.*odd_rewards.py:{function}' {message}"):
        RuleScorer(function=f"{ODD}:{function}")


def test_a_coroutine_in_disguise_is_no_number() -> None:
    with pytest.raises(NoVerdict, match="returned <coroutine object coroutine"):
        RuleScorer(function=f"{ODD}:hidden_coroutine").score(["p"], ["r"])


@pytest.mark.parametrize("reply", ["loops", "sleeps", "matches", "waits_for_a_socket"])
def test_a_call_that_hangs_is_ended_and_costs_its_prompt(reply: str) -> None:
    """The other replies of its prompt are not tried, and everything else has its score."""
    scorer = RuleScorer(function=f"{ODD}:does", timeout_seconds=0.5)
    with pytest.raises(NoVerdict) as caught:
        scorer.score(["p", "p", "q", "q", "q", "r"], ["one", "three", "five", reply, "one", "one"])
    assert [*map(math.isnan, caught.value.values)] == [False, False, False, True, True, False]
    assert caught.value.values[-1] == 3.0
    line = next(n for n, text in enumerate(ODD.read_text().splitlines(), start=1) if text == f"def {reply}() -> None:")
    found = re.fullmatch(
        rf"scorer.function: '.*odd_rewards.py:does' did not return within 0.5 s \(scorer.timeout_seconds; it was at "
        rf"odd_rewards.py:(\d+) in {reply}\) for row 3 \(reply '{reply}'\)",
        str(caught.value),
    )
    assert found and line < int(found[1]) < line + 4


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("says_what_cannot_be_written", r"raised ValueError: \\ud800 \(at odd_rewards.py"),
        ("cannot_say_it", r"raised Speechless \(at odd_rewards.py:\d+ in cannot_say_it\)"),
        ("sys_exits", r"called sys.exit\(3\) \(at odd_rewards.py:\d+ in sys_exits\)"),
        ("os_exits", "ended its process with exit code 3"),
        ("ends_well", "ended its process with exit code 0"),
        ("is_interrupted", r"raised KeyboardInterrupt \(at odd_rewards.py:\d+ in is_interrupted\)"),
        ("crashes", "ended its process by SIGSEGV"),
        ("is_killed", r"ended its process by SIGKILL \(as when memory runs out\)"),
        ("recurses", "raised RecursionError: maximum recursion depth exceeded"),
        ("wants_memory", "raised MemoryError"),
        ("divides", r"raised ZeroDivisionError: division by zero \(at odd_rewards.py:\d+ in divides\)"),
        ("asks", "raised EOFError"),
        ("leaves_a_child", "ended its process with exit code 1"),
        ("closes_everything", "ended its process (with exit code|by SIGKILL)"),  # it or its asker is first
    ],
)
def test_a_call_that_ends_its_process_costs_its_prompt(reply: str, expected: str) -> None:
    scorer = RuleScorer(function=f"{ODD}:does")
    with pytest.raises(NoVerdict, match=rf"odd_rewards.py:does' {expected}.* for row 1 \(reply '{reply}'\)") as caught:
        scorer.score(["p", "q", "r"], ["one", reply, "three"])
    assert caught.value.values[::2] == (3.0, 5.0) and math.isnan(caught.value.values[1])


def test_a_function_that_ends_its_process_every_time_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayalign.judge.rule.MOST_FATAL", 3)
    scorer = RuleScorer(function=f"{ODD}:does")
    with pytest.raises(NoVerdict):  # one that answers now and then is not
        scorer.score([str(n) for n in range(6)], ["os_exits", "os_exits", "one"] * 2)
    with pytest.raises(ScorerUnusable, match="exit code 3 for row 2 .*; so it went with 3 prompts in a row"):
        scorer.score([str(n) for n in range(20)], ["os_exits"] * 20)


def test_what_a_call_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(NoVerdict, match="did not return within 1 s"):
        RuleScorer(function=f"{ODD}:starts_a_program", timeout_seconds=1.0).score(["p"], [str(note)])
    wait_until(lambda: int(note.read_text()) not in [pid for pid, _, command in processes() if command], "its end")


def test_a_process_ends_with_its_scorer(tmp_path: Path) -> None:
    scorer = RuleScorer(function=f"{ODD}:starts_a_thread")
    assert scorer.score(["p"], ["r"]) == [1.0]
    assert scorer.function.process is not None
    pid = scorer.function.process.popen.pid
    del scorer
    wait_until(lambda: pid not in [found for found, _, command in processes() if command], "its end")


def test_a_function_may_limit_its_own_time() -> None:
    assert RuleScorer(function=f"{ODD}:sets_an_alarm").score(["p"], ["r"]) == [0.0]


def test_a_function_is_one_process_until_a_call_ends_it() -> None:
    scorer = RuleScorer(function=f"{ODD}:counts_calls")
    with pytest.raises(NoVerdict) as caught:
        scorer.score(list("pqrstu"), ["a", "b", "exit", "c", "d", "e"])
    assert caught.value.values[:2] == (1.0, 2.0) and caught.value.values[3:] == (1.0, 2.0, 3.0)


def test_what_a_function_prints_is_told_once() -> None:
    scorer = RuleScorer(function=f"{ODD}:prints")
    assert scorer.score(["p"] * 3, ["a", "b", "a"]) == [1.0] * 3
    told = ["scoring a", "careful", "scoring b"]
    assert scorer.remarks.take() == tuple(f"odd_rewards.py:prints printed: {line}" for line in told)
    assert scorer.score(["p"] * 100, ["a", *(str(n) for n in range(99))]) == [1.0] * 100
    assert scorer.remarks.take()[0] == "odd_rewards.py:prints printed: scoring 0"
    assert scorer.score(["p"], ["z"]) == [1.0] and scorer.remarks.take() == ()  # twenty lines are enough


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "1 / 0",
            r".*broken_rewards.py cannot be imported: ZeroDivisionError: division by zero \(.*broken_rewards.py:1\)",
        ),
        ("def f(:", r".*broken_rewards.py cannot be imported: SyntaxError: .*\(.*broken_rewards.py:1\)"),
        ("import sys; sys.exit(2)", r".*broken_rewards.py cannot be imported: SystemExit: 2 \(.*broken_rewards.py:1\)"),
        ("import no_such_package", ".*cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import os; os._exit(2)", "the import of its module ended its process with exit code 2"),
        ("raise KeyboardInterrupt", "the import of its module raised KeyboardInterrupt"),
        ("import ctypes; ctypes.string_at(0)", "the import of its module ended its process by SIGSEGV"),
    ],
)
def test_a_module_that_cannot_be_imported_is_said_to_be(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "broken_rewards.py").write_text(text + "\n")
    with pytest.raises(UserError, match=f"scorer.function: '.*broken_rewards.py:f': {expected}"):
        RuleScorer(function=f"{tmp_path}/broken_rewards.py:f")


def test_a_module_whose_import_hangs_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayalign.user_function.START_SECONDS", 0.5)
    (tmp_path / "slow_rewards.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(UserError, match="the import of its module did not return within 0.5 s"):
        RuleScorer(function=f"{tmp_path}/slow_rewards.py:f")


def test_a_module_that_prints_and_starts_threads_is_none_the_worse(tmp_path: Path) -> None:
    lines = [
        "import threading, time",
        "print('tables loaded')",
        "threading.Thread(target=time.sleep, args=(99,)).start()",
    ]
    (tmp_path / "busy_rewards.py").write_text("\n".join([*lines, "def f(prompt, reply): return 1.0", ""]))
    scorer = RuleScorer(function=f"{tmp_path}/busy_rewards.py:f")
    assert scorer.score(["p"], ["r"]) == [1.0]
    assert scorer.remarks.take() == ("busy_rewards.py:f printed: tables loaded",)
