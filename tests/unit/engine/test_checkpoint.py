"""The newest whole checkpoint is found whatever happened to newer ones, and loads to the very bits that were saved."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from tiny_tokenizers import byte_level

from rayalign.config.model import ModelConfig
from rayalign.config.training import BestConfig, OptimConfig
from rayalign.engine.checkpoint.checkpoint import (
    Checkpoint,
    Checkpointer,
    IncompatibleCheckpoint,
    identity_differences,
    step_of,
)
from rayalign.engine.checkpoint.optimizer_state import (
    METADATA,
    UnreadableOptimizer,
    load_state,
    named_state,
    save_state,
)
from rayalign.engine.model.pretrained import ModelSpec, load_policy
from rayalign.engine.optimizer import make_optimizer, set_learning_rate
from rayalign.storage.manifest import MANIFEST, commit

MODEL, TOKENIZER = tiny("llama"), byte_level()
OPTIM = OptimConfig(lr=1e-3)
IDENTITY = {"configuration": {"optim": {"lr": 1e-3, "betas": (0.9, 0.999)}}, "data": "d1"}


def checkpointer(root: Path, **overrides: object) -> Checkpointer:
    fields = {"root": root, "attempt": "a1", "keep": 10, "always_keep": (), "identity": IDENTITY}
    return Checkpointer(**(fields | overrides))


def save(checkpoints: Checkpointer, step: int, model=MODEL, optimizer=None) -> Path:
    save_state(named_state(optimizer or stepped(model)), checkpoints.directory(step), alone=True)
    return checkpoints.save(
        step,
        model=model,
        tokenizer=TOKENIZER,
        stop_ids=(5,),
        facts={"num_tokens": 100 * step},
    )


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has a state; the model is as before."""
    optimizer = make_optimizer(model, OPTIM)
    set_learning_rate(optimizer, 0.0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def steps(root: Path) -> list[int]:
    return sorted(step_of(path) for path in root.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints") / "checkpoints"
    for step in (2, 4):
        save(checkpointer(root), step)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of two checkpoints, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_newest_is_found_with_what_was_said_of_it(root: Path) -> None:
    assert checkpointer(root / "nowhere").newest() is None
    found = checkpointer(root).newest()
    assert found == Checkpoint(directory=root / "step_000004-aa1", step=4, facts={"num_tokens": 400})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "trainer/__0_0.distcp", str(METADATA), "tokenizer.json", MANIFEST]
)
def test_a_torn_checkpoint_is_skipped_with_a_warning(root: Path, damage, file: str, caplog) -> None:
    damage(root / "step_000004-aa1" / file)
    with caplog.at_level(logging.WARNING):
        found = checkpointer(root).newest()
    assert found is not None and found.step == 2
    assert "skipping a checkpoint that is not whole" in caplog.text and "step_000004-aa1" in caplog.text


def test_nothing_is_left_to_continue_from(root: Path) -> None:
    for directory in root.iterdir():
        flip(directory / "config.json")
    assert checkpointer(root).newest() is None


def test_another_configuration_is_refused_with_what_differs(root: Path) -> None:
    other = {"configuration": {"optim": {"lr": 2e-3, "betas": (0.9, 0.999)}, "seed": 1}, "data": "d1"}
    with pytest.raises(IncompatibleCheckpoint) as caught:
        checkpointer(root, identity=other).newest()
    assert "configuration.optim.lr: 0.001 there, 0.002 here; configuration.seed: nothing there, 1 here." in str(
        caught.value
    )
    assert "Give this run another name" in str(caught.value) and "betas" not in str(caught.value)


def test_differences_are_those_of_json() -> None:
    assert identity_differences({"a": {"b": [1, 2]}, "c": None}, {"a": {"b": (1, 2)}, "c": None}) == []
    assert identity_differences({"a": {}}, {"a": {"b": True}}) == [
        "a: {} there, nothing here",
        "a.b: nothing there, true here",
    ]


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    for name in ("llama_tied", "gpt2", "gemma3", "qwen3_moe", "mixtral"):
        model = tiny(name)
        optimizer = stepped(model)
        directory = save(checkpointer(tmp_path / name), 1, model, optimizer)
        loaded, _ = load_policy(ModelSpec(config=ModelConfig(name=str(directory))))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items()), name
        restored = make_optimizer(loaded, OPTIM)
        load_state(restored, directory)
        theirs = restored.state_dict()["state"]
        for index, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(theirs[index][key], value) for key, value in state.items()), name
        assert loaded.generation_config.eos_token_id == [5]


def committed(root: Path, step: int, attempt: str = "a0") -> Path:
    """A small checkpoint that counts."""
    directory = root / f"step_{step:06d}-a{attempt}"
    directory.mkdir(parents=True)
    commit(directory, {"step": step, "identity": IDENTITY, "facts": {}})
    return directory


@pytest.mark.parametrize(
    ("keep", "always_keep", "left"),
    [(1, (), [9]), (2, (), [8, 9]), (2, (3, 9), [3, 7, 8, 9]), (1, (8,), [8, 9]), (3, (1,), [7, 8, 9])],
)
def test_retention(tmp_path: Path, keep: int, always_keep: tuple[int, ...], left: list[int]) -> None:
    for step in (3, 5, 7, 8, 9):
        committed(tmp_path, step)
    checkpointer(tmp_path, keep=keep, always_keep=always_keep).prune(9)
    assert steps(tmp_path) == left


def measured(root: Path, **losses: float | None) -> None:
    """Small checkpoints whose rows had these losses, by step."""
    for name, loss in losses.items():
        directory = committed(root, int(name[1:]))
        metrics = {} if loss is None else {"eval_loss": loss}
        commit(directory, {"step": int(name[1:]), "identity": IDENTITY, "facts": {"metrics": metrics}})


@pytest.mark.parametrize(
    ("mode", "always_keep", "left"),
    [("min", (), [5, 8, 9]), ("max", (), [3, 8, 9]), ("min", (5,), [5, 8, 9]), ("min", (7,), [5, 7, 8, 9])],
)
def test_retention_keeps_the_best_beside_the_newest(tmp_path: Path, mode, always_keep, left: list[int]) -> None:
    """5 and 6 are equally good: the first of them stays. 7 was not measured, and 12 is of a damaged future."""
    measured(tmp_path, s3=0.9, s5=0.2, s6=0.2, s7=None, s8=0.5, s9=0.4, s12=0.1)
    best = BestConfig(metric="eval_loss", mode=mode)
    checkpointer(tmp_path, keep=2, always_keep=always_keep, best=best).prune(9)
    assert sorted(step_of(path) for path in tmp_path.glob("step_*")) == [*left, 12]
    told = json.loads((tmp_path / "best.json").read_text())
    assert told == {
        "step": left[0], "directory": f"step_00000{left[0]}-aa0", "metric": "eval_loss", "mode": mode,
        "value": 0.2 if mode == "min" else 0.9,
    }  # fmt: skip


def test_without_a_measurement_there_is_no_best(tmp_path: Path) -> None:
    measured(tmp_path, s3=None, s4=None)
    checkpointer(tmp_path, keep=1, best=BestConfig(metric="eval_loss", mode="min")).prune(4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000004-aa0"]


def test_retention_removes_remains_and_doubles_but_never_what_was_just_saved(tmp_path: Path) -> None:
    (tmp_path / "step_000003-adead").mkdir(parents=True)
    torn = committed(tmp_path, 8, "old")
    (torn / MANIFEST).write_text("{")
    beyond = committed(tmp_path, 12, "old")  # damaged, or the run would have continued from it
    for attempt in ("old", "new"):
        committed(tmp_path, 6, attempt)
    newest = committed(tmp_path, 8, "new")
    checkpointer(tmp_path, keep=1).prune(8)
    assert sorted(tmp_path.iterdir()) == [newest, beyond]


def test_two_attempts_never_share_a_directory(tmp_path: Path) -> None:
    save(checkpointer(tmp_path, attempt="one"), 3)
    save(checkpointer(tmp_path, attempt="two"), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003-atwo"]


class Planted:
    """What whoever may write to the storage would have unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_the_description_of_an_optimizer_names_no_place(tmp_path: Path) -> None:
    """Python 3.13 pickles a path as another class than 3.11 and 3.12 do."""
    save_state(named_state(stepped(MODEL)), tmp_path, alone=True)
    content = (tmp_path / METADATA).read_bytes()
    assert b"pathlib" not in content and tmp_path.name.encode() not in content
    load_state(make_optimizer(MODEL, OPTIM), tmp_path)


def test_code_in_the_description_of_an_optimizer_is_not_run(root: Path, tmp_path: Path) -> None:
    directory = root / "step_000004-aa1"
    (directory / METADATA).write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    optimizer = make_optimizer(MODEL, OPTIM)
    with pytest.raises(UnreadableOptimizer, match=r"\.metadata .*posix\.mkdir is nothing that torch writes"):
        load_state(optimizer, directory)
    assert not (tmp_path / "planted").exists() and not optimizer.state
