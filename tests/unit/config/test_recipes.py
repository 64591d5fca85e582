"""The recipes are legal, whole, and have the settings that their papers name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayalign.config.compare import load_compare
from rayalign.config.load import load_run
from rayalign.config.run import RunConfig

FOLDER = Path(__file__).parents[3] / "examples" / "recipes"
COMPARISONS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.endswith("_reward_model"))
REWARD_MODELS = sorted(FOLDER.glob("*_reward_model.yaml"))


def cells(name: str) -> dict[str, RunConfig]:
    """Name → the cell of the first seed."""
    comparison = load_compare(FOLDER / f"{name}.yaml", [])
    first = comparison.cells[0].run.seed
    return {cell.label.partition(", seed")[0]: cell.run for cell in comparison.cells if cell.run.seed == first}


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_cell_is_legal_and_the_header_says_what_is_aimed_at(path: Path) -> None:
    comparison = load_compare(path, [])
    assert [cell.skipped_reason for cell in comparison.cells if cell.run is None] == []
    assert {cell.run.optim.groups_per_step for cell in comparison.cells} == {128}
    assert len({cell.run.seed for cell in comparison.cells}) >= 3
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(word in header for word in ("Judge", "Published", path.name))
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", REWARD_MODELS, ids=lambda path: path.stem)
def test_a_reward_model_lies_where_its_comparison_looks(path: Path) -> None:
    trained = load_run(path, [])
    comparison = load_compare(path.with_name(path.name.replace("_reward_model", "")), [])
    used = {Path(cell.run.evaluate.scorers[0].model).resolve() for cell in comparison.cells}
    assert used == {(FOLDER / "../.." / trained.storage_path / trained.name / "final").resolve()}


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "prompt", "tokens"),
    [
        ("wpo_mistral_off_policy", 5e-7, 1, 512, 1024),
        ("wpo_mistral_hybrid", 5e-7, 1, 512, 1024),
        ("wpo_llama3_off_policy", 1e-6, 2, 1800, 2048),
        ("wpo_llama3_hybrid", 1e-6, 2, 1800, 2048),
        ("wpo_gemma2_hybrid", 1e-6, 2, 1800, 2048),
    ],
)
def test_settings_of_wpo(name: str, lr: float, epochs: float, prompt: int, tokens: int) -> None:
    """2406.11827, section 4.1, and its configuration files; DPO differs in the weight alone."""
    found = cells(name)
    wpo, dpo = found["wpo"], found["dpo"]
    for run in (wpo, dpo):
        assert (run.optim.lr, run.optim.epochs, run.optim.warmup, run.optim.schedule) == (lr, epochs, 0.1, "cosine")
        assert (run.data.max_prompt_tokens, run.data.max_tokens) == (prompt, tokens)
        assert run.method.config.beta == 0.01
    assert (wpo.method.config.alignment, wpo.method.config.clamp) == ("sampled", "product")


def test_the_hybrid_set_is_made_as_published() -> None:
    run = cells("wpo_mistral_hybrid")["wpo"]
    assert (run.data_policy.mix, run.data_policy.refresh_every) == ("candidates", "never")
    assert (run.rollout.samples, run.rollout.temperature, run.rollout.top_p) == (5, 0.7, 0.95)
    assert (run.label.name, run.label.threshold, run.label.gap, run.label.rejected) == ("wpo", 5, 1, "random")


@pytest.mark.parametrize(("name", "steps", "prompt", "new"), [("exo_hh", 175, 512, 200), ("exo_tldr", 200, 650, 75)])
def test_settings_of_exo(name: str, steps: int, prompt: int, new: int) -> None:
    """The authors' scripts; their 700 and 800 iterations are micro-steps, four to an update."""
    found = cells(name)
    assert set(found) == {"exo_pref", "dpo_pref", "exo_rw", "dpo_rw"}
    for run in found.values():
        config = run.method.config
        assert (run.optim.lr, run.optim.steps, run.optim.warmup, run.optim.betas) == (1e-6, steps, 0, (0.9, 0.95))
        assert (run.data.max_prompt_tokens, run.data.max_tokens) == (prompt, prompt + new)
        assert getattr(config, "beta_pi", None) or config.beta == 0.5
        assert config.logit_temperature == 0.8
    drawn = found["exo_rw"]
    assert (drawn.method.config.beta_r, drawn.rollout.samples, drawn.rollout.temperature) == (0.5, 2, 0.8)
    assert drawn.scorer == drawn.evaluate.scorers[0]


@pytest.mark.parametrize(
    ("name", "beta", "ratio", "lr", "dpo_lr"),
    [("simpo_mistral", 2.0, 0.8, 3e-7, 5e-7), ("simpo_llama3", 10.0, 0.3, 1e-6, 3e-7)],
)
def test_settings_of_simpo(name: str, beta: float, ratio: float, lr: float, dpo_lr: float) -> None:
    """The table in the authors' README, which gives γ as a multiple of β."""
    found = cells(name)
    simpo, dpo = found["simpo"], found["dpo"]
    assert (simpo.method.config.beta, simpo.optim.lr) == (beta, lr)
    assert simpo.method.config.gamma == pytest.approx(ratio * beta)
    assert (dpo.method.config.beta, dpo.optim.lr) == (0.01, dpo_lr)
