"""The command line: every command is one call into the pipeline; a user's mistake ends in a message, no traceback."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from rayalign import __version__
from rayalign.cli_export import exports
from rayalign.errors import Failed, Stopped, UserError, blocked_path_error
from rayalign.storage.place import place_of

app = typer.Typer(
    name="rayalign",
    help="Preference optimization on Ray: off-policy or on-policy is a setting, not a rewrite.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
artifacts = typer.Typer(help="The stages that runs share: list them, and remove unused ones.", no_args_is_help=True)
app.add_typer(artifacts, name="artifacts")
Storage = Annotated[str, typer.Argument(help="A storage_path, or its artifacts folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted settings such as optim.lr=1e-6.", metavar="KEY=VALUE…")
]
Pairs = Annotated[
    bool, typer.Option("--pairs", help="Write the chosen and rejected completion by `label`, instead of all.")
]
Best = Annotated[bool, typer.Option("--best", help="Write the completion with the highest score, to fine-tune on.")]
Fresh = Annotated[list[str] | None, typer.Option(help="Rebuild this stage even if it is cached (repeatable).")]

TAKES_SETTINGS = {"ignore_unknown_options": True}
"""For commands whose last arguments are settings: ``--lr 1e-6`` is then answered like a setting."""
FAILURE = 1
USER_MISTAKE = 2
INTERRUPTED = 130


def main() -> None:
    """Run the command line; exit code 2 is a user's mistake, 1 a failure, 130 or 143 a stop that was asked for."""
    try:
        app()
    except UserError as error:
        exit_with_error(error)
    except OSError as error:
        told = blocked_path_error(error)
        if told is None:
            raise
        exit_with_error(told)
    except Failed as failed:
        Console(stderr=True).print(f"error: {failed}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(FAILURE)
    except Stopped as stopped:
        Console(stderr=True).print(f"{stopped}; the same command continues from there", highlight=False, soft_wrap=True)
        sys.exit(stopped.exit_code)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            raise
        Console(stderr=True).print(
            "stopped; the same command continues a run from its newest checkpoint", highlight=False
        )
        os._exit(INTERRUPTED)  # threads that still wait for Ray must not start it again


def exit_with_error(error: UserError) -> NoReturn:
    """Say what is wrong and end the process."""
    from rayalign.report.formatting import printable

    Console(stderr=True).print(
        f"error: {printable(str(error))}", style="red", highlight=False, markup=False, soft_wrap=True
    )
    sys.exit(USER_MISTAKE)


def show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def init(name: Annotated[str, typer.Argument(help="A method such as dpo, or compare.")]) -> None:
    """Write a commented configuration to standard output: rayalign init dpo > run.yaml"""
    from rayalign.config.init import template

    sys.stdout.write(template(name))


@app.command()
def check(
    given: Annotated[
        list[str],
        typer.Argument(
            help="A run's YAML, then settings; or files and datasets.", metavar="YAML [KEY=VALUE…] | FILES…"
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Files only: count tokens with this model's tokenizer.")] = None,
    template: Annotated[str | None, typer.Option(help="Files only: as data.template; needs --model.")] = None,
    method: Annotated[
        str | None, typer.Option(help="Files only: refuse rows that this method cannot learn from.")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Datasets only: a split or slice (repeatable).")] = None,
    configuration: Annotated[str | None, typer.Option("--config", help="Datasets only: the configuration.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Datasets only: a folder inside.")] = None,
    format: Annotated[str | None, typer.Option(help="Files only: as data.format.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Files only: our column=the file's (repeatable).", metavar="OURS=THEIRS")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(help="Files only: the most rows to read.")] = None,
    show: Annotated[
        int, typer.Option(help="Show this many rows of every source. Marks say what becomes of each token.", min=0)
    ] = 0,
    eval_files: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out files, to find rows that are in both (repeatable).")
    ] = None,
    max_bad_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fail if more than this share of rows is bad. Default: 0 for files, the run's own for a YAML.",
            min=0,
            max=1,
        ),
    ] = None,
    quarantine: Annotated[Path | None, typer.Option(help="Write bad rows to this file.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Files only: as data.max_prompt_tokens.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Files only: as data.max_tokens.", min=1)] = None,
    policy_logp_quantile: Annotated[
        float | None, typer.Option(help="Files only: score rows with the model and say what `filter` would keep.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read all data as a run does and report what is in them; exits 1 if a run would refuse them."""
    from rayalign.verbs.checked import Options, check_given
    from rayalign.verbs.options import columns_of

    of_files = {
        "model": model,
        "template": template,
        "method": method,
        "split": split,
        "config": configuration,
        "data_dir": data_dir,
        "format": format,
        "columns": columns_of(columns or ()),
        "max_samples": max_samples,
        "max_prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "policy_logp_quantile": policy_logp_quantile,
        "eval": eval_files,
    }
    options = Options(
        of_files={name: value for name, value in of_files.items() if value not in (None, [], {})},
        show=show,
        max_bad_fraction=max_bad_fraction,
        quarantine=quarantine,
        as_json=as_json,
    )
    raise typer.Exit(check_given(given, options, Console()))


@app.command(context_settings=TAKES_SETTINGS)
def train(
    config: Annotated[str | None, typer.Argument(help="A run's YAML, or the first KEY=VALUE.")] = None,
    overrides: Overrides = None,
    fresh: Fresh = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what each training process will hold; start nothing.")
    ] = False,
    device_gib: Annotated[float | None, typer.Option(help="With --dry-run: GiB of a GPU to plan for.", min=1)] = None,
) -> None:
    """Train one run: rayalign train run.yaml optim.lr=1e-6"""
    path, settings = split_config(config, overrides)
    if dry_run:
        from rayalign.verbs.dry_train import dry_train

        dry_train(path, settings, device_gib=device_gib, console=Console())
        return
    if device_gib is not None:
        raise UserError("--device-gib: only a plan is made for a GPU of that size; add --dry-run")
    from rayalign.run.train import train as run_train

    run_train(path, settings, fresh=frozenset(fresh or ()), console=Console())


@app.command(context_settings=TAKES_SETTINGS)
def generate(
    config: Annotated[str | None, typer.Argument(help="A run's YAML, or the first KEY=VALUE.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.")] = Path("completions.jsonl"),
    pairs: Pairs = False,
    best: Best = False,
) -> None:
    """Complete the prompts of data.train: rayalign generate run.yaml rollout.samples=8 --out new.jsonl"""
    from rayalign.verbs.generate import generate as run_generate

    path, settings = split_config(config, overrides)
    run_generate(path, settings, out=out, draws=True, kind=kind_of(pairs, best), console=Console())


@app.command(context_settings=TAKES_SETTINGS)
def score(
    config: Annotated[str | None, typer.Argument(help="A run's YAML, or the first KEY=VALUE.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The file to write: .jsonl or .parquet.")] = Path("scored.jsonl"),
    pairs: Pairs = False,
    best: Best = False,
) -> None:
    """Score the completions of data.train: rayalign score run.yaml scorer.function=my:helpful --out new.jsonl"""
    from rayalign.verbs.generate import generate as run_generate

    path, settings = split_config(config, overrides)
    run_generate(path, settings, out=out, draws=False, kind=kind_of(pairs, best), console=Console())


@app.command()
def sample(
    models: Annotated[list[str], typer.Argument(help="Folders of checkpoints, or models on the hub.")],
    prompts: Annotated[Path | None, typer.Option(help="JSONL with the prompts to complete.")] = None,
    interactive: Annotated[bool, typer.Option("-i", help="A chat: every model answers what you type.")] = False,
    samples: Annotated[int, typer.Option("-n", help="Completions of each prompt.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.", min=0)] = 1.0,
    seed: Annotated[int, typer.Option(help="The same noise for every model.")] = 0,
) -> None:
    """Show completions of several models side by side, at equal seeds."""
    from rayalign.rollout.base import SamplingParams
    from rayalign.verbs.sample import sample as run_sample

    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, num_samples=samples, seed=seed)
    run_sample(models, prompts, params, interactive=interactive, console=Console())


@app.command(context_settings=TAKES_SETTINGS)
def evaluate(
    config: Annotated[
        str | None, typer.Argument(help="A run's YAML, or the first KEY=VALUE; with --pairs a reward model's folder.")
    ] = None,
    overrides: Overrides = None,
    pairs: Annotated[list[str] | None, typer.Option(help="Held-out pairs or rankings (repeatable).")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="With --pairs, as data.max_prompt_tokens.", min=1)] = 512,
    max_tokens: Annotated[int, typer.Option(help="With --pairs, as data.max_tokens.", min=1)] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="With --pairs, print JSON instead of tables.")] = False,
) -> None:
    """Sample and score the checkpoints of a run against its reference, or measure a reward model on --pairs."""
    if pairs:
        from rayalign.config.data import TokenBudget
        from rayalign.verbs.options import block_of
        from rayalign.verbs.pairs import evaluate_pairs

        if config is None or overrides:
            raise UserError("evaluate --pairs takes one reward model: rayalign evaluate runs/rm/final --pairs a.jsonl")
        budget = block_of(TokenBudget, {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens})
        return evaluate_pairs(config, pairs, budget, as_json=as_json, console=Console())
    if as_json:
        raise UserError("evaluate: --json goes with --pairs")
    from rayalign.comparison.evaluate import evaluate as run_evaluate

    path, settings = split_config(config, overrides)
    run_evaluate(path, settings, console=Console())


@app.command(context_settings=TAKES_SETTINGS)
def compare(
    config: Annotated[Path, typer.Argument(help="A comparison's YAML.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be made and what is refused; start nothing.")
    ] = False,
    pilot: Annotated[
        Path | None, typer.Option(help="With --dry-run: a folder of runs, whose speed gives the estimated time.")
    ] = None,
    fresh: Fresh = None,
) -> None:
    """Train every cell of a grid and write the report."""
    from rayalign.comparison.compare import compare as run_compare

    if pilot is not None and not dry_run:
        raise UserError("--pilot: only a plan is estimated; add --dry-run")
    refuse_options([str(config), *(overrides or ())])
    run_compare(config, overrides or [], dry_run=dry_run, fresh=frozenset(fresh or ()), console=Console(), pilot=pilot)


@app.command()
def report(
    directories: Annotated[list[str], typer.Argument(help="A comparison's folder; several are merged.")],
    out: Annotated[str | None, typer.Option(help="Folder for the report; required for several comparisons.")] = None,
) -> None:
    """Write the report of a comparison again, or one report of several that were measured the same way."""
    from rayalign.report.merge import merge_folders
    from rayalign.report.points import load_comparison
    from rayalign.report.render import render_report

    places = [place_of(directory) for directory in directories]
    target = place_of(out, field="--out") if out is not None else None
    if len(places) == 1:
        print(render_report(load_comparison(places[0]), target or places[0]))
        return
    merged, page = merge_folders(places, target)
    for left in merged.left_out:
        print(f"left out: {left.what} {left.reason}")
    print(page)


app.add_typer(exports, name="export")


@app.command()
def status(directory: Annotated[str, typer.Argument(help="A run's or a comparison's folder.")]) -> None:
    """Print the progress of each run below a folder."""
    from rayalign.report.status import status_table

    Console().print(status_table(place_of(directory)))


@artifacts.command("ls")
def list_artifacts(storage: Storage = "runs") -> None:
    """List the stages of a storage path: size, age, last use, and the runs that used them."""
    from rayalign.verbs.shelf import ls

    ls(place_of(storage), Console())


@artifacts.command("gc")
def collect_artifacts(
    unused_for: Annotated[
        str, typer.Option(help="Remove only stages that no run has used for this long: 12h, 30d, 8w.")
    ],
    storage: Storage = "runs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove stages that were not used for a while; those of unfinished runs are kept."""
    from rayalign.verbs.shelf import gc

    gc(place_of(storage), unused_for=unused_for, dry_run=dry_run, console=Console())


@app.command()
def doctor(
    storage_path: Annotated[str, typer.Option(help="As storage_path of a run.")] = "runs",
    start_ray: Annotated[
        bool, typer.Option("--start-ray", help="If no cluster is running, check that Ray can start.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check whether runs will work here, and say how to fix what will not; exits 1 if something is broken."""
    from rayalign.verbs.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(storage_path, start_ray=start_ray, as_json_text=as_json, console=Console()))


def kind_of(pairs: bool, best: bool) -> Literal["all", "pairs", "best"]:
    """Which of a prompt's completions ``generate`` and ``score`` write."""
    if pairs and best:
        raise UserError("--pairs and --best are mutually exclusive; run the command twice, the stages are cached")
    return "pairs" if pairs else "best" if best else "all"


def split_config(config: str | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """(YAML or None, settings): the first argument may already be a setting."""
    settings = list(overrides or ())
    refuse_options([*filter(None, [config]), *settings])
    if config is not None and "=" in config and not Path(config).exists():
        return None, [config, *settings]
    return (Path(config) if config else None), settings


def refuse_options(words: Sequence[str]) -> None:
    """Raise UserError where one is an option that the command does not have, with the setting that is meant."""
    for word, following in itertools.pairwise([*words, ""]):
        if word.startswith("-") and not Path(word).exists():
            from rayalign.config.explain import setting_meant

            option, _, value = word.lstrip("-").partition("=")
            key = option.replace("-", "_")
            meant = key if "." in key else setting_meant(key, [])
            advice = f"write {meant}={value or following}" if meant else "a setting is key=value: optim.lr=1e-6"
            raise UserError(f"{word}: there is no such option (--help lists them); {advice}")


if __name__ == "__main__":
    main()
