"""``rayalign export``: what other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayalign.storage.place import place_of

exports = typer.Typer(help="Write what other tools read.", no_args_is_help=True)


@exports.command("alpaca_eval")
def alpaca_eval(
    directory: Annotated[str, typer.Argument(help="An evaluated run's folder, or a comparison's cell.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model_outputs.json"),
    step: Annotated[int | None, typer.Option(help="An evaluated step. Default: the last one.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt set. Default: the first one.")] = None,
    sample: Annotated[int, typer.Option(help="Which of a prompt's samples, from 0.")] = 0,
    generator: Annotated[str | None, typer.Option(help="Name of the model on leaderboards.")] = None,
) -> None:
    """Write replies as AlpacaEval's model_outputs: alpaca_eval --model_outputs model_outputs.json"""
    from rayalign.verbs.export import alpaca_eval as run_export

    count = run_export(place_of(directory), out, step=step, prompts=prompts, sample=sample, generator=generator)
    print(f"{count} replies: {out}")


@exports.command("trl_pairs")
def trl_pairs(
    store: Annotated[str, typer.Argument(help="A committed round, or a stage's store of pairs.")],
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.")] = Path("pairs.jsonl"),
    model: Annotated[str | None, typer.Option(help="The model whose tokens these are, if no run.json says so.")] = None,
) -> None:
    """Write pairs with TRL's columns, which TRL tokenizes as they were: prompt, chosen, rejected, tools …"""
    from rayalign.verbs.export_trl import export_lines_of_trl
    from rayalign.verbs.export_trl import trl_pairs as run_export

    for line in export_lines_of_trl(run_export(place_of(store), out, model=model), out):
        print(line)


@exports.command("model_card")
def model_card(
    directory: Annotated[str, typer.Argument(help="A run's folder, its final/, or a checkpoint.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write. Default: README.md in the model's folder.")
    ] = None,
) -> None:
    """Write a README.md for the Hub: base, method, data, figures with intervals, limits, configuration."""
    from rayalign.verbs.card import model_card as run_export

    print(run_export(place_of(directory), out))
