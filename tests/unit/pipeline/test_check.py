"""``rayalign check`` on files and on a run's YAML: what it counts, shows, refuses, and leaves alone."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny
import torch
import yaml
from bad_inputs import BAD_INPUTS, BadInput, line
from rich.console import Console
from tiny_runs import save_tiny
from transformers import AutoTokenizer
from workspaces import rayalign

from rayalign.config.data import TokenBudget
from rayalign.config.model import ModelConfig
from rayalign.data.chat import make_chat
from rayalign.data.select import likelihood
from rayalign.data.tokenize import Tokenized, rows_to_groups
from rayalign.data.tokenize_rows import Unit, read_chunks
from rayalign.engine.frozen import FrozenModel, ScoringSpec
from rayalign.engine.model.pretrained import ModelSpec
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.errors import UserError
from rayalign.verbs.checked import Options, check_given


def run(*given: str, width: int = 200, **options: Any) -> tuple[int, str]:
    """(exit code, what was printed) of a check."""
    console = Console(file=io.StringIO(), width=width)
    own = {name: options.pop(name) for name in ("show", "max_bad_fraction", "quarantine", "as_json") if name in options}
    code = check_given(given, Options(of_files=options, **own), console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def facts(*given: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """(exit code, the only source's findings)."""
    code, printed = run(*given, as_json=True, **options)
    (found,) = json.loads(printed)["files"]
    return code, found


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.byte_level(template=tiny.CHATML).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs_are_quarantined_and_fail(case: BadInput, tmp_path: Path) -> None:
    path, quarantine = tmp_path / f"rows{case.suffix}", tmp_path / "q.jsonl"
    path.write_bytes(case.content)
    for _ in range(2):  # a file of bad rows is written anew
        code, printed = run(str(path), quarantine=quarantine)
    rows = [json.loads(text) for text in quarantine.read_text().splitlines()] if quarantine.exists() else []
    assert code == (1 if case.bad else 0)
    assert [(row["line"], row["field"]) for row in rows] == [(number, field) for number, field, _ in case.bad]
    for row, (_, _, reason) in zip(rows, case.bad, strict=True):
        assert row["file"] == str(path) and reason in row["reason"]
    assert f"good │ {len(case.good)}" in " ".join(printed.split())


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("[]\n")
    monkeypatch.chdir(tmp_path)
    assert rayalign("check", "rows.jsonl").code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_threshold(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line()] * 9 + [b"[]"]))
    assert run(str(path), max_bad_fraction=0.1)[0] == 0
    assert run(str(path), max_bad_fraction=0.09)[0] == 1


def test_files_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path) -> None:
    good, empty, absent = (tmp_path / name for name in ("good.jsonl", "empty.jsonl", "absent.jsonl"))
    good.write_bytes(line())
    empty.write_bytes(b"")
    code, printed = run(str(empty), str(absent), str(good))
    assert code == 2
    assert "empty.jsonl: the file is empty" in printed and "absent.jsonl: No such file" in printed
    assert "preference: 1" in printed


def test_a_quoted_pattern_is_every_file_that_matches(tmp_path: Path) -> None:
    for name in ("a", "b", "quarantine"):
        write(tmp_path / f"{name}.jsonl", {"prompt": "Q"})
    code, printed = run(str(tmp_path / "*.jsonl"))
    assert code == 0
    assert [line for line in printed.splitlines() if ".jsonl" in line] == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]


def test_what_was_not_read_is_named(tmp_path: Path) -> None:
    """Loudly what may mean something, quietly what describes a row, and where some rows lack it, in how many."""
    row = {"id": 1, "question": "Q", "chosen": "A", "rejected": "B", "rating": 3}
    path = write(tmp_path / "rows.jsonl", row, {**row, "mood": "good"})
    _, printed = run(path)
    assert "not read │ rating, mood (1)" in " ".join(printed.split()) and "metadata │ id" in " ".join(printed.split())
    _, found = facts(path)
    assert (found["not_read"], found["metadata_not_read"]) == ({"rating": 2, "mood": 1}, {"id": 2})


def test_labels_ties_and_inverted_scores_are_counted(tmp_path: Path) -> None:
    labelled = [{"prompt": str(n), "completion": "A", "label": label} for n, label in enumerate([1, 1, 0, None])]
    scores = [(2, 8), (5, 5), (8, 2)]
    pairs = [
        {"prompt": str(n), "chosen": "A", "rejected": "B", "chosen_score": one, "rejected_score": other}
        for n, (one, other) in enumerate(scores)
    ]
    _, found = facts(write(tmp_path / "kto.jsonl", *labelled), method="kto")
    assert found["labels"] == {"desirable": 2, "undesirable": 1} and found["undecided"] == 1
    _, found = facts(write(tmp_path / "pairs.jsonl", *pairs))
    assert (found["inverted_scores"], found["tied_scores"]) == (1, 1)


def test_pairs_are_labelled_answers_for_kto(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"})
    code, found = facts(path, method="kto")
    assert (code, found["good"], found["bad"]) == (0, 1, 0)


TIE = {"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": 0}
MISFITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a prompt for dpo": (
        "dpo",
        {"prompt": "Q", "answer": "A", "rating": 1},
        "the row has a prompt alone; not read: answer, rating. Name what is meant: columns: {chosen: …, rejected: …}",
    ),
    "a prompt for sft": (
        "sft",
        {"prompt": "Q", "response": "A"},
        "Name what is meant: columns: {completion: response}",
    ),
    "a label for sft": ("sft", {"prompt": "Q", "completion": "A", "label": False}, "has a label or a score"),
    "a score for sft": ("sft", {"prompt": "Q", "response": "A", "helpfulness": 0}, "has a label or a score"),
    "a conversation with a label for sft": (
        "sft",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "kto_tag": False},
        "has a label or a score",
    ),
    "ranks for dpo": (
        "dpo",
        {"prompt": "Q", "answers": [{"answer": "A", "rank": 1}, {"answer": "B", "rank": 2}]},
        "does not say which of two is preferred",
    ),
    "a completion for kto": ("kto", {"prompt": "Q", "completion": "A"}, "needs `completion` with `label`"),
    "a tie alone": ("dpo", TIE, ""),
    "no rewards for dpo_rw": ("dpo_rw", {"prompt": "Q", "completions": ["A", "B"]}, "the method needs `rewards`"),
}


@pytest.mark.parametrize(("method", "row", "reason"), MISFITS.values(), ids=MISFITS.keys())
def test_rows_that_a_method_cannot_learn_from_are_refused(
    method: str, row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    assert run(path)[0] == 0
    code, printed = run(path, method=method)
    assert code == 1 and reason in " ".join(printed.split())


def test_pairs_are_labelled_examples_for_kto(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert run(path, method="kto")[0] == 0


def test_options_say_how_files_are_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"})
    assert run(path)[0] == 1
    assert facts(path, format="question_answer")[1]["formats"] == {"question_answer": 2}
    code, found = facts(path, columns={"prompt": "question", "completion": "answer"}, max_samples=1, method="sft")
    assert (code, found["formats"]) == (0, {"prompt_completion": 1})
    code, printed = run(path, columns={"prompt": "question", "tools": "functoins"})
    assert code == 2 and "columns names functoins, and no row has it; check the spelling" in printed
    with pytest.raises(UserError, match="--columns.promt: no row has a field 'promt'"):
        run(path, columns={"promt": "question"})
    with pytest.raises(UserError, match="split belongs to a dataset; this source is a file"):
        run(path, split=["test"])


def test_splits_of_a_dataset(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name})
    code, found = facts(str(tmp_path), split=["test"])
    assert code == 0 and found["rows"] == 1
    assert "there is no split 'dev', but train, test" in run(str(tmp_path), split=["dev"])[1]


def test_the_command_line_takes_all_of_it(tmp_path: Path, model: str) -> None:
    write(tmp_path / "test.jsonl", {"question": "Q", "answer": "A"})
    done = rayalign(
        "check", tmp_path, "--split", "test", "--columns", "prompt=question", "--columns", "completion=answer",
        "--method", "sft", "--model", model, "--template", "none", "--show", "1", "--max-tokens", "600",
    )  # fmt: skip
    assert done.code == 0 and "prompt_completion: 1" in done.printed and "[prompt] Q" in done.printed
    assert "write our column, =, and the file's" in rayalign("check", tmp_path, "--columns", "prompt").printed


def test_json_report(tmp_path: Path, model: str) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_bytes(b"\n".join([line(), line(), line(prompt="Another?", chosen="x" * 3_000), b"{}"]))
    held_out.write_bytes(line(chosen="Red."))
    code, report = facts(str(train), model=model, eval=[str(held_out)], show=2)
    assert code == 1
    names = ("rows", "good", "bad", "duplicates", "in_eval", "long_responses", "no_end")
    assert {name: report[name] for name in names} == dict(
        rows=4, good=3, bad=1, duplicates=1, in_eval=2, long_responses=1, no_end=1
    )
    assert report["lengths"]["response_tokens"]["max"] == 3_001


TALK = [
    {"role": "user", "content": "pq\nr"},
    {"role": "assistant", "content": "xyz"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "done"},
]


def test_rows_are_shown_without_colours(tmp_path: Path, model: str) -> None:
    """Every stretch has its mark, every turn a line, every line end a sign."""
    long = {"prompt": "Q", "chosen": "x" * 500, "rejected": "B", "chosen_score": 2, "rejected_score": 1}
    path = write(tmp_path / "rows.jsonl", {"messages": TALK}, {"messages": TALK[:1]}, long, {"messages": TALK})
    _, printed = run(path, model=model, show=3, width=80)
    assert printed[printed.index(f"{path}:1") : printed.index("┌")].splitlines()[:-1] == [
        f"{path}:1 (messages)",
        "  [prompt] <|im_start|>user⏎pq⏎r<|im_end|>⏎",
        "  [prompt] <|im_start|>assistant⏎",
        "  answer",
        "    [trained] xyz [end] <|im_end|>",
        "    [seen] ⏎<|im_start|>user⏎more<|im_end|>⏎<|im_start|>assistant⏎",
        "    [trained] done [end] <|im_end|>",
        f"{path}:2 bad: messages has no turn of the assistant: there is nothing to learn",
        f"{path}:3 (preference)",
        "  [prompt] <|im_start|>user⏎Q<|im_end|>⏎",
        "  [prompt] <|im_start|>assistant⏎",
        "  chosen (reward 2)",
        f"    [trained] {'x' * 240}… (+260 characters) [end] <|im_end|>",
        "  rejected (reward 1)",
        "    [trained] B [end] <|im_end|>",
    ]


def test_what_is_cut_is_marked_and_colours_help_where_there_are_any(tmp_path: Path, model: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": TALK[:2]})
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="standard")
    options = Options(of_files={"model": model, "max_prompt_tokens": 5, "max_tokens": 7}, show=1)
    check_given([path], options, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "[cut] \x1b[0m\x1b[31m<|im_start|>" in printed and "[trained] \x1b[0m\x1b[32mxy" in printed
    assert "[cut] \x1b[0m\x1b[31mz<|im_end|>" in printed


def test_ties_are_shown_as_left_out(tmp_path: Path, model: str) -> None:
    assert (
        "rows.jsonl:1 left out: no answer is preferred"
        in run(write(tmp_path / "rows.jsonl", TIE), model=model, show=1, method="dpo")[1]
    )


def test_tokens_need_a_tokenizer(tmp_path: Path) -> None:
    for options in ({"show": 1}, {"template": "none"}):
        with pytest.raises(UserError, match="name the tokenizer's model with --model"):
            run("rows.jsonl", **options)
    (tmp_path / "rows.jsonl").write_bytes(line())
    with pytest.raises(UserError, match="--model: the tokenizer in .*absent cannot be loaded"):
        run(str(tmp_path / "rows.jsonl"), model=str(tmp_path / "absent"))


def test_a_quarantine_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[]\n")
    _, printed = run(str(path), quarantine=tmp_path / "absent" / "q.jsonl")
    assert "q.jsonl: bad rows cannot be written there: No such file or directory" in printed


def test_what_a_filter_would_keep_is_said(tmp_path: Path) -> None:
    """Ten rows in two files; the kept share is of both together, and the threshold is that of their own scores."""
    weights = str(save_tiny(tmp_path / "weights"))
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for number, path in enumerate(files):
        path.write_bytes(b"\n".join(line(prompt=f"Question {number} {n}?", chosen="x" * (n + 1)) for n in range(5)))
    options: dict[str, Any] = {"model": weights, "policy_logp_quantile": 0.7}
    code, printed = run(*map(str, files), **options)
    assert code == 0 and f"filter 0.7 by {weights}: kept 3 of 10 rows, threshold −" in printed
    _, printed = run(*map(str, files), as_json=True, **options)
    found = json.loads(printed)["filter"]
    chat = make_chat(load_tokenizer(Path(weights)))
    groups = [
        outcome.group
        for path in files
        for outcome in rows_to_groups(next(read_chunks(Unit(path=str(path)))), chat, TokenBudget())
        if isinstance(outcome, Tokenized)
    ]
    spec = ScoringSpec(model=ModelSpec(config=ModelConfig(name=weights)), tokens_per_micro_batch=4096, row_tokens=256)
    columns = FrozenModel(spec, torch.device("cpu")).token_logps(groups)
    scores = [
        likelihood(column, [candidate.num_predicted for candidate in group.candidates])
        for group, column in zip(groups, columns, strict=True)
    ]
    assert found.pop("threshold") == pytest.approx(sorted(scores)[-3], abs=1e-5)
    assert found == {"policy_logp_quantile": 0.7, "kept": 3, "of": 10, "unit": "rows"}


def test_a_filter_is_checked_with_a_model_and_a_quantile(tmp_path: Path, model: str) -> None:
    for options in ({"policy_logp_quantile": 0.5}, {"policy_logp_quantile": 1.0, "model": model}):
        with pytest.raises(UserError, match="lies between 0 and 1 and scores rows: name the model with --model"):
            run("rows.jsonl", **options)
    bad, weights = tmp_path / "bad.jsonl", str(save_tiny(tmp_path / "weights"))
    bad.write_bytes(b"[]")
    _, printed = run(str(bad), model=weights, policy_logp_quantile=0.5)
    assert "no row has a completion to score" in printed


# A run's YAML.


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("weights")))


def pairs(count: int) -> Sequence[dict[str, Any]]:
    return [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(count)]


def run_yaml(folder: Path, weights: str, **blocks: Any) -> str:
    path = folder / "run.yaml"
    given = {"model": {"name": weights}, "data": {"train": ["train.jsonl"]}, "method": {"name": "dpo"}, "track": []}
    path.write_text(yaml.safe_dump(given | blocks))
    return str(path)


def test_a_run_is_checked_with_its_own_sources(tmp_path: Path, weights: str) -> None:
    """Each with its split, columns, format and what the method learns of it."""
    write(tmp_path / "train.jsonl", *pairs(3), {"prompt": "R", "answer": "A"})
    (tmp_path / "held").mkdir()
    write(tmp_path / "held" / "test.jsonl", {"riddle": "Q1", "good": "A", "bad": "B"})
    write(tmp_path / "sft.jsonl", {"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "A", "label": True})
    write(tmp_path / "ask.jsonl", {"prompt": "Q2"})
    path = run_yaml(
        tmp_path,
        weights,
        data={
            "train": ["train.jsonl"],
            "eval": [
                {
                    "path": "held",
                    "split": "test",
                    "columns": {"prompt": "riddle", "chosen": "good", "rejected": "bad"},
                }
            ],
            "max_prompt_tokens": 5,
            "max_tokens": 10,
        },
        auxiliary=[{"name": "sft", "data": ["sft.jsonl"]}],
        evaluate={
            "prompts": ["ask.jsonl"],
            "sampling": {"max_new_tokens": 8},
            "scorers": [{"name": "rule", "function": "score.py:length"}],
        },
    )
    (tmp_path / "score.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    code, printed = run(path, as_json=True)
    found = {facts["file"].partition(":")[0]: facts for facts in json.loads(printed)["files"]}
    assert code == 1 and list(found) == ["data.train[0]", "data.eval[0]", "auxiliary[0].data[0]", "evaluate.prompts[0]"]
    assert {name: (own["good"], own["bad"]) for name, own in found.items()} == {
        "data.train[0]": (3, 1),
        "data.eval[0]": (1, 0),
        "auxiliary[0].data[0]": (1, 1),
        "evaluate.prompts[0]": (1, 0),
    }
    assert found["data.train[0]"]["in_eval"] == 2 and found["data.train[0]"]["long_prompts"] == 3
    assert run(path, "data.max_bad_fraction=0.6")[0] == 0


def test_rows_that_a_function_makes_and_a_system_prompt(tmp_path: Path, weights: str) -> None:
    (tmp_path / "maker.py").write_text(
        "def rows(n):\n    for i in range(n):\n        yield {'prompt': str(i), 'chosen': 'A', 'rejected': 'B'}\n"
    )
    source = {"function": "maker:rows", "arguments": {"n": 5}, "max_samples": 2}
    path = run_yaml(tmp_path, weights, data={"train": [source], "system": "Be brief."})
    code, printed = run(path, show=1)
    assert code == 0 and "preference (turns): 2" in printed
    assert "[prompt] <|im_start|>system⏎Be brief.<|im_end|>⏎" in printed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    raise RuntimeError('no rows today')\n    yield", "row 1: RuntimeError: no rows today"),
        ("    raise SystemExit(0)\n    yield", "row 1: SystemExit: 0"),
        ("    yield from ()", "made no row"),
        ("    yield {1, 2}", "row 1 cannot be written as JSON"),
    ],
)
def test_a_function_that_fails_is_a_sentence(body: str, message: str, tmp_path: Path, weights: str) -> None:
    (tmp_path / "fails.py").write_text(f"def rows():\n{body}\n")
    function = f"{tmp_path}/fails.py:rows"
    code, printed = run(run_yaml(tmp_path, weights, data={"train": [{"function": function}]}))
    assert code == 2 and message in printed


def test_prompts_of_an_on_policy_run(tmp_path: Path, weights: str) -> None:
    """Its rows are prompts, whatever else they hold."""
    write(tmp_path / "train.jsonl", {"prompt": "Q", "answer": "A"})
    blocks = {
        "data_policy": "on_policy",
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 8},
        "scorer": {"name": "rule", "function": "score.py:length"},
    }
    (tmp_path / "score.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    code, printed = run(run_yaml(tmp_path, weights, **blocks))
    assert code == 0 and "prompt_only: 1" in printed and "answer" in printed
    assert run(run_yaml(tmp_path, weights))[0] == 1


def test_what_a_run_says_is_not_said_twice(tmp_path: Path, weights: str) -> None:
    write(tmp_path / "train.jsonl", *pairs(1))
    with pytest.raises(UserError, match="--method is of files; a run says it in its YAML, or behind it"):
        run(run_yaml(tmp_path, weights), method="kto")


def test_a_runs_filter(tmp_path: Path, weights: str) -> None:
    write(tmp_path / "train.jsonl", *pairs(10))
    code, printed = run(run_yaml(tmp_path, weights, filter={"policy_logp_quantile": 0.5}))
    assert code == 0 and "filter 0.5 by" in printed and "of 10 rows" in printed


def test_rows_that_a_model_of_the_run_cannot_read(tmp_path: Path, weights: str) -> None:
    """By length and by token, of the policy and of what reads its rows beside it; with what is drawn after prompts."""
    short = save_tiny(tmp_path / "short", max_position_embeddings=32)
    write(tmp_path / "train.jsonl", {"prompt": "Q", "chosen": "A", "rejected": "B"}, *pairs(1))
    write(tmp_path / "long.jsonl", *pairs(1), {"prompt": "Q", "chosen": "A", "rejected": "word " * 10})
    assert run(run_yaml(tmp_path, str(short)))[0] == 0
    long = {"train": ["long.jsonl"]}
    for blocks in ({"model": {"name": str(short)}}, {"model": {"name": weights, "reference": str(short)}}):
        code, printed = run(run_yaml(tmp_path, weights, data=long, **blocks), width=1000)
        assert code == 2 and "data.train[0]: " in printed and "long.jsonl:2 has" in printed
        assert f"{short} reads 32 (max_position_embeddings)" in printed
    assert run(run_yaml(tmp_path, weights, data=long))[0] == 0
    drawn = {
        "model": {"name": str(short)},
        "data_policy": "on_policy",
        "rollout": {"engine": "hf", "samples": 2, "max_new_tokens": 30},
        "scorer": {"name": "rule", "function": "score.py:length"},
    }
    code, printed = run(run_yaml(tmp_path, weights, **drawn), width=1000)
    assert code == 2 and "train.jsonl:1 has" in printed and "rollout.max_new_tokens are 30" in printed
    asked = {"prompts": ["train.jsonl"], "sampling": {"max_new_tokens": 31}, "scorers": [drawn["scorer"]]}
    code, printed = run(run_yaml(tmp_path, str(short), evaluate=asked), width=1000)
    assert code == 2 and "evaluate.prompts[0]: " in printed and "evaluate.sampling.max_new_tokens are 31" in printed
    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.add_tokens(["Zanzibar"])
    small = save_tiny(tmp_path / "small")
    tokenizer.save_pretrained(small)
    write(tmp_path / "long.jsonl", *pairs(1), {"prompt": "Where is Zanzibar?", "chosen": "A", "rejected": "B"})
    code, printed = run(run_yaml(tmp_path, str(small), data=long), width=1000)
    assert code == 2 and f"long.jsonl:2 has the token 'Zanzibar' (id {len(tokenizer) - 1})" in printed
