"""``rayalign init dpo``: a commented YAML made from the schema, so that it says what this version accepts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rayalign.config.data import AuxiliaryConfig, DataConfig, FilterConfig
from rayalign.config.load import importable
from rayalign.config.method import resolve_method, why_not_weighted
from rayalign.config.model import ModelConfig
from rayalign.config.policy import LABEL_RULES, OnPolicyConfig, RolloutConfig
from rayalign.config.run import RunConfig
from rayalign.config.scoring import EvaluateConfig, RuleScorerConfig
from rayalign.config.training import CheckpointConfig, CriticConfig, OptimConfig, StrategyConfig, WeightingConfig
from rayalign.config.tune import TuneConfig

if TYPE_CHECKING:
    from rayalign.methods.method import Method

BLOCKS = (
    AuxiliaryConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvaluateConfig,
    FilterConfig,
    ModelConfig,
    OnPolicyConfig,
    OptimConfig,
    RolloutConfig,
    RuleScorerConfig,
    RunConfig,
    StrategyConfig,
    TuneConfig,
    WeightingConfig,
)
LEARNING_RATES = {"sft": 1.0e-5, "reward_model": 1.0e-5}
"""Where the default, which suits preference losses, is too small (EXO's scripts, 2402.00856)."""
WIDTH = 116


def template(name: str) -> str:
    """The YAML that ``rayalign init <name>`` writes: of a method, or of a ``compare``.

    Raises:
        UserError: no method has that name.
    """
    if name == "compare":
        return _render("compare.yaml", row=ROWS["pair"])
    with importable(Path.cwd()):
        record = resolve_method(name)
    return _render(
        "run.yaml",
        method=name,
        title=f"{record.name}: {record.paper}" if record.paper else record.name,
        run_name=record.name.replace(":", "-"),
        row=_row(record),
        parameters=_parameters(record),
        requires_auxiliary=record.requires_auxiliary,
        weightable=why_not_weighted(record, WeightingConfig()) is None,
        draws="off_policy" not in record.data_policies,
        may_draw="on_policy" in record.data_policies,
        has_critic=record.critic is not None,
        has_policy=record.trains == "policy",
        label=_label(record),
        label_rules=" | ".join(LABEL_RULES),
        lr=_yaml(LEARNING_RATES.get(name, OptimConfig.model_fields["lr"].default)),
    )


ROWS = {
    "pair": '{"prompt": …, "chosen": …, "rejected": …}',
    "ranking": '{"prompt": …, "chosen": …, "rejected": …}; or {…, "completions": […], "rewards": […]}',
    "group": '{"prompt": …, "completions": […], "rewards": […]}',
    "one": '{"prompt": …, "completion": …}',
    "labelled": '{"prompt": …, "completion": …, "label": true}',
    "prompt": '{"prompt": …}',
}


def _row(record: Method) -> str:
    if "off_policy" not in record.data_policies:
        return ROWS["prompt"]
    return ROWS["labelled" if "label" in record.needs else record.candidates]


def _label(record: Method) -> str:
    """The rule that makes what the method learns from."""
    if record.candidates == "one":
        return "best_worst" if "label" in record.needs else "best"
    return "rewards" if record.candidates == "group" else "best_worst"


def _render(file: str, **values: Any) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    text = resources.files("rayalign.config").joinpath("templates", file).read_text(encoding="utf-8")
    names = {block.__name__: block for block in BLOCKS}
    return environment.from_string(text).render(settings=_settings, doc=_doc, **names, **values)


def _settings(block: type[BaseModel], keys: Sequence[str], *, indent: int = 2, comment: bool = False) -> str:
    """``key: default  # what it means`` for each key, one per line; commented out for an optional block."""
    lines = []
    for key in keys:
        text, line = _doc(block, key), f"{key}: {_yaml(block.model_fields[key].default)}"
        beside = f"{line}  # {text}" if text else line
        fits = len(beside) + indent <= WIDTH
        above = [] if fits else [f"# {part}" for part in textwrap.wrap(text, WIDTH - indent - 2)]
        lines += [*above, beside if fits else line]
    margin = "# ".ljust(indent + 2) if comment else " " * indent
    return "\n".join(margin + line for line in lines)


def _parameters(record: Method) -> str:
    own = [key for key in record.config.model_fields if key != "logit_temperature"]
    return _settings(record.config, [*own, "logit_temperature"])


def _doc(block: type[BaseModel], key: str) -> str:
    """The docstring below a field, on one line, with plain quotes."""
    return " ".join((block.model_fields[key].description or "").replace("``", "").split())


def _yaml(value: Any) -> str:
    """A value in YAML's flow style."""
    if value is PydanticUndefined:
        raise ValueError("a setting without a default has no place in a template's list")
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=WIDTH).removesuffix("\n").removesuffix("\n...")
