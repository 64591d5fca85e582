"""The pages of ``docs/`` that follow from the code: ``python -m docs.generate`` writes them.

``cli.md`` comes from the command line, ``configuration.md`` from the schema and the methods' parameters. Between
their markers ``files.md`` has the report's own description of ``results.json``, and ``data.md`` the formats of rows.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import rayalign.cli
import rayalign.report.results_json
from rayalign.config.compare import CompareConfig
from rayalign.config.data import Format
from rayalign.config.fields import OnResume
from rayalign.config.method import MethodChoice
from rayalign.config.resume import mark_of
from rayalign.config.run import RunConfig
from rayalign.data.formats import FORMATS
from rayalign.data.formats.base import OF_PAIRS, never
from rayalign.methods import METHODS, resolve
from rayalign.methods.method import Method, MethodConfig

REFERENCE = Path(__file__).parent / "reference"
DATA = Path(__file__).parent / "how-to" / "data.md"
NOTE = "<!-- Written by `python -m docs.generate`; change the code's own descriptions instead. -->"
OPENING, CLOSING = "<!-- generated: results.json -->", "<!-- end -->"
FORMATS_OPENING = "<!-- generated: formats -->"

Model = type[BaseModel]

KINDS: Mapping[object, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    datetime.date: "date",
    Any: "anything",
}
CHECKED = {
    "_resolve_path": "path",
    "_resolve_interpreter": "path of a Python interpreter",
    "_resolve_data": "files or a dataset",
    "_resolve_template": "`auto` or the path of a Jinja file",
    "resolve_model": "folder or name on the hub",
    "_baseline": "`reference`, a folder or a name on the hub",
    "check_function": "`module:function`",
    "_parse_count": "whole number, `[smallest, largest]` or `auto`",
    "_parse_refresh": "whole number ≥ 1, or `never`",
    "_label_name": "a rule's name or `module:function`",
    "_share_of_flipped_labels": "number in [0, 0.5)",
    "_column": "one of our columns",
    "_address": "http address",
    "_variable": "name of a variable",
}
"""What a validator makes of a text or number, by the validator's name."""
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
OR_NULL = ", or `null`"


def pages() -> dict[Path, str]:
    """Path → text of every generated page."""
    files = REFERENCE / "files.md"
    return {
        REFERENCE / "cli.md": cli_page(),
        REFERENCE / "configuration.md": configuration_page(),
        files: with_results(files.read_text(encoding="utf-8")),
        DATA: with_formats(DATA.read_text(encoding="utf-8")),
    }


# The schema.


def configuration_page() -> str:
    run, comparison = list(walk(RunConfig, "")), list(walk(CompareConfig, ""))
    anchors = {model: anchor(title) for title, model in reversed([*run, *comparison])}
    parts = [
        NOTE,
        "# Configuration",
        "Every key of a run's and of a comparison's YAML. A key that is not here is an error, and so is a setting that"
        " the others make meaningless. `rayalign init METHOD` writes a commented file to begin with, and any setting"
        " can be given on the command line: `rayalign train run.yaml optim.lr=1e-6`.",
        "A block that holds only its name may be written as that name (`data_policy: on_policy`), and one value may"
        " stand for a list of one. Relative paths are relative to the YAML, but `storage_path`, which is relative to"
        " where the run is started. `5e-7` and `5.0e-7` are the same number.",
        *(section(title, model, anchors) for title, model in run),
        "## Parameters of methods",
        "What `method:` takes beside `name`. Equations and advice: [methods](../explanation/methods.md).",
        "### Every method",
        table(MethodConfig, MethodConfig.model_fields, anchors),
        *(method_section(name, resolve(name), anchors) for name in METHODS),
        *resuming(),
        *(section(title, model, anchors, "## A comparison" if not title else "") for title, model in comparison),
    ]
    return "\n\n".join(parts) + "\n"


def resuming() -> list[str]:
    """What a resumed run may change: see :mod:`rayalign.config.resume`."""
    lists = (", ".join(f"`{key}`" for key in dict.fromkeys(marked(RunConfig, mark))) for mark in OnResume)
    may_change, by_content = lists
    return [
        "## Settings of a run that is resumed",
        "With another value of these a run continues, to the same model up to rounding (`.*`: all of the block):"
        f" {may_change}. So does a run with another value of a setting that the others leave without use.",
        f"These say where something lies or how it is read; what is read must stay the same: {by_content}.",
        "Every other setting decides the model that a run ends in: with another value it is another run, which needs"
        " another `name`.",
    ]


def marked(model: Model, mark: OnResume, path: str = "") -> Iterator[str]:
    """Keys with this mark; a marked block is named whole."""
    for key, field in model.model_fields.items():
        inner, own = list(blocks(field.annotation)), mark_of(field.metadata)
        if own is mark:
            yield f"{path}{key}.*" if inner else f"{path}{key}"
        for block in inner if own is None else ():
            yield from marked(block, mark, f"{path}{key}.")


def walk(model: Model, path: str) -> Iterator[tuple[str, Model]]:
    """(dotted path, block) of ``model`` and of every block below it, each block once."""
    seen: set[Model] = set()

    def below(model: Model, path: str) -> Iterator[tuple[str, Model]]:
        if model in seen:
            return
        seen.add(model)
        yield path, model
        for key, field in model.model_fields.items():
            found = list(dict.fromkeys(blocks(field.annotation)))
            for block in found:
                own = f"{path}.{key}".removeprefix(".")
                name = block.model_fields["name"].default if len(found) > 1 else None
                yield from below(block, own if name is None else f"{own}: {name}")

    yield from below(model, path)


def blocks(annotation: Any) -> Iterator[Model]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in get_args(annotation):
            yield from blocks(argument)


def section(title: str, model: Model, anchors: Mapping[Model, str], heading: str = "") -> str:
    heading = heading or (f"### `{title}`" if title else "## A run")
    return "\n\n".join([heading, sentence(model.__doc__), table(model, model.model_fields, anchors)])


def method_section(name: str, method: Method, anchors: Mapping[Model, str]) -> str:
    own = [key for key in method.config.model_fields if key not in MethodConfig.model_fields]
    policies = ", ".join(
        f"`{policy}`" for policy in ("off_policy", "on_policy", "hybrid") if policy in method.data_policies
    )
    facts = f"{method.paper}. Learns {policies}; candidates: `{method.candidates}`."
    return "\n\n".join(
        [f"### `method: {name}`", facts, table(method.config, own, anchors) if own else "No parameters."]
    )


def table(model: Model, keys: Iterable[str], anchors: Mapping[Model, str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = model.model_fields[key]
        cells = (f"`{key}`", words(field.annotation, field.metadata, anchors), default(field), meaning(field))
        rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(rows)


BAR = r"\|"


def words(annotation: Any, metadata: Sequence[Any], anchors: Mapping[Model, str]) -> str:
    """What a value of this type looks like in YAML, with its bounds."""
    facts = [fact for item in metadata for fact in (item.metadata if isinstance(item, FieldInfo) else [item])]
    checks = [check.func.__name__ for check in facts if hasattr(check, "func")]
    known = next((CHECKED[name] for name in checks if name in CHECKED), None)
    kind = known or plain_words(annotation, anchors)
    limits = [
        f"{sign} {getattr(fact, name):g}" for fact in facts for name, sign in BOUNDS.items() if hasattr(fact, name)
    ]
    limited = " ".join([kind.removesuffix(OR_NULL), " and ".join(limits)]).strip()
    if any(hasattr(fact, "min_length") for fact in facts):
        limited += ", not empty"
    return limited + (OR_NULL if kind.endswith(OR_NULL) else "")


def yaml_text(value: object) -> str:
    """A choice as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def plain_words(annotation: Any, anchors: Mapping[Model, str]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0], arguments[1:], anchors)
    if origin in (Union, UnionType):
        return ", or ".join(dict.fromkeys(words(argument, (), anchors) for argument in arguments))
    if origin is Literal:
        return " | ".join(f"`{yaml_text(argument)}`" for argument in arguments)
    if origin is tuple:
        inside = words(arguments[0], (), anchors)
        return f"list of {inside}" if arguments[-1] is Ellipsis else f"[{', '.join([inside] * len(arguments))}]"
    if origin is dict:
        return "keys"
    if annotation is NoneType:
        return "`null`"
    if annotation is MethodChoice:
        return "[a method](#parameters-of-methods)"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[block](#{anchors[annotation]})"
    return KINDS[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_defaults=True)
        name = getattr(value, "name", None)
        return f"`{name}`" if isinstance(name, str) and not given else "its own"
    plain = list(value) if isinstance(value, tuple) else value
    assert plain is not PydanticUndefined
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix(chr(10)).removesuffix(chr(10) + '...')}`"


def meaning(field: FieldInfo) -> str:
    if field.description:
        return sentence(field.description)
    choices = get_args(field.annotation)
    if get_origin(field.annotation) is Literal and len(choices) == 1:
        return "Selects this block."
    return " ".join(sentence(block.__doc__) for block in dict.fromkeys(blocks(field.annotation)))


def sentence(text: str | None) -> str:
    """A docstring on one line, with Markdown's quotes, without the comments' markup of roles."""
    return plain_quotes(" ".join((text or "").split()))


def plain_quotes(text: str) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", text)


def anchor(title: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") or "a-run"


# The command line.

EXIT_CODES = """| exit code | meaning |
|---|---|
| 0 | Success. Every cell of a comparison that was not skipped ran to its end. |
| 1 | A finding (`check`, `doctor`), or an unforeseen error with its traceback. |
| 2 | You must act, and the message says how. Causes are a mistake in file or arguments, failed cells, an exhausted \
budget, an error of your own code, a loss that is not finite, a full disk, or a cluster that lost every attempt. |
| 130 | Ctrl-C, or a second signal. The same command resumes. |
| 143 | SIGTERM, as of `ray job stop`. The same command resumes. |"""


def cli_page() -> str:
    program: Any = typer.main.get_command(rayalign.cli.app)
    parts = [
        NOTE,
        "# Command line",
        "`rayalign COMMAND --help` says the same. `python -m rayalign` is the same program.",
        EXIT_CODES,
        *(part for name, command in program.commands.items() for part in command_sections(name, command)),
    ]
    return "\n\n".join(parts) + "\n"


def command_sections(name: str, command: Any) -> Iterator[str]:
    """A command's section, and below a group's those of its commands."""
    inside = getattr(command, "commands", {})
    title = f"{'###' if ' ' in name else '##'} `rayalign {name}`"
    given = [parameter for parameter in command.params if parameter.name != "help"]
    yield title
    yield " ".join(command.help.split())
    if given or not inside:
        yield parameters(given)
    for own, below in inside.items():
        yield from command_sections(f"{name} {own}", below)


def parameters(given: Sequence[Any]) -> str:
    rows = ["| | default | meaning |", "|---|---|---|"]
    for parameter in given:
        cells = (called(parameter), parameter_default(parameter), " ".join((parameter.help or "").split()))
        rows.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(rows)


def called(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        return f"`{name}`" if parameter.metavar or parameter.nargs == 1 else f"`{name}…`"
    return ", ".join(f"`{option}`" for option in parameter.opts) + ("" if parameter.is_flag else " …")


def parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value is None or value is False or value in ((), []) else f"`{value}`"


# Files.


def with_results(text: str) -> str:
    """``files.md`` with the schema of results.json as the report's module describes it."""
    described = (rayalign.report.results_json.__doc__ or "").partition("::\n\n")[2]
    schema, _, notes = described.partition("\n\nESTIMATE")
    lines = "\n".join(line.removeprefix("    ") for line in schema.splitlines())
    said = f"```text\n{lines}\n```\n\n{plain_quotes('ESTIMATE' + notes).strip()}"
    before, _, rest = text.partition(OPENING)
    return f"{before}{OPENING}\n\n{said}\n\n{CLOSING}{rest.partition(CLOSING)[2]}"


# Formats of rows.


def with_formats(text: str) -> str:
    """``data.md`` with a line per format, in the order in which a configuration lists them."""
    rows = ["| format | columns | and perhaps | a row is |", "|---|---|---|---|"]
    for name in get_args(Format):
        if name in FORMATS:
            form = FORMATS[name]
            needs = ", ".join(" or ".join(f"`{own}`" for own in choice) for choice in form.choices)
            may = ", ".join(f"`{own}`" for own in form.may if own not in OF_PAIRS)
            by_name = " Only by its name." if form.is_found is never else ""
            rows.append(f"| `{name}` | {needs} | {may} | {plain_quotes(form.says)}{by_name} |")
    before, _, rest = text.partition(FORMATS_OPENING)
    return f"{before}{FORMATS_OPENING}\n\n{chr(10).join(rows)}\n\n{CLOSING}{rest.partition(CLOSING)[2]}"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
