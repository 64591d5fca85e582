"""Preparation as a stage of Ray Data: units of input → shards of token ids.

Ray Data moves the work, not the truth: what a run trains on is the committed store, and rows are counted at the end.
A unit whose report is written is not prepared again, so that a lost process costs the units that it had begun.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ray

from rayalign.config.data import DataConfig
from rayalign.config.model import ModelConfig
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat, make_chat
from rayalign.data.shard import is_complete, sizes_below
from rayalign.data.tokenize_rows import Shape, Unit, UnitReport, UnitWriter, read_chunks
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.pretrained import load_tokenizer
from rayalign.runtime.failures import retry_lost_actors
from rayalign.runtime.reading import CPUS
from rayalign.runtime.stage import apply_to_items, dataset_of_items
from rayalign.storage.cache import working
from rayalign.storage.place import Place, write_whole

REPORT = "report.json"
TELL_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePreparation:
    """What preparation found: rows = groups' rows + bad + dropped."""

    reports: tuple[UnitReport, ...]
    rows_by_node: dict[str, int]
    """Rows that each node has read in this attempt."""

    @property
    def rows(self) -> int:
        return sum(report.rows for report in self.reports)

    @property
    def bad(self) -> int:
        return sum(report.bad for report in self.reports)


@dataclass(frozen=True, slots=True)
class Progress:
    """Rows that a process has prepared since it told last."""

    node: str
    rows: int


def load_chat(model: ModelConfig, data: DataConfig) -> Chat:
    """The policy's tokenizer, loaded, and how it writes conversations."""
    tokenizer = load_tokenizer(model_directory(model.name, model.revision), trust_remote_code=model.trust_remote_code)
    return make_chat(
        tokenizer,
        template=data.template,
        stop=data.end,
        template_kwargs=data.chat_template_kwargs,
        date=data.date,
    )


class Preparer:
    """One process of the stage; loads the tokenizer once."""

    def __init__(
        self, model: ModelConfig, data: DataConfig, completed: Completed, shape: Shape, directory: Place
    ) -> None:
        self.chat = load_chat(model, data)
        self.data = data
        self.completed: Completed = completed
        self.shape: Shape = shape
        self.directory = directory
        self.node = ray.get_runtime_context().get_node_id()

    def __call__(self, item: tuple[str, Unit]) -> Iterator[Progress]:
        """Prepare a unit; its report, written last, says that it is done."""
        name, unit = item
        with working(self.directory) as folder:
            writer = UnitWriter(
                unit,
                self.chat,
                self.data,
                completed=self.completed,
                shape=self.shape,
                directory=folder,
                name=name,
                shard_bytes=self.data.shard_mb << 20,
            )
            for rows in read_chunks(unit):
                writer.add(rows)
                yield Progress(self.node, len(rows))
            report = writer.close()
        write_whole(report_path(self.directory, name), report.to_json().encode())


def prepare(
    units: Sequence[Unit],
    model: ModelConfig,
    data: DataConfig,
    *,
    completed: Completed,
    shape: Shape,
    directory: Place,
    writers: int,
    note: Callable[[str], None],
) -> StorePreparation:
    """Write the shards of every unit below ``directory``, in ``writers`` processes; the caller commits them.

    Raises:
        UserError: a unit cannot be read, or the tokenizer cannot be used.
        ItemKilled: processes died again and again, and no unit was finished meanwhile.
    """
    names = {f"{number:06d}": unit for number, unit in enumerate(units)}
    rows_by_node: Counter[str] = Counter()

    def finished() -> int:
        there = sizes_below(directory)
        return sum(report_path(directory, name).name in there for name in names)

    def write() -> None:
        sizes = sizes_below(directory)
        missing = [(name, unit) for name, unit in names.items() if not is_finished(directory, name, sizes)]
        if not missing:
            return
        said = time.monotonic()
        for told in apply_to_items(
            "tokens",
            dataset_of_items(missing),
            Preparer,
            model,
            data,
            completed,
            shape,
            directory,
            actors=writers,
            cpus=CPUS,
        ):
            rows_by_node[told.node] += told.rows
            if time.monotonic() - said >= TELL_SECONDS:
                note(f"tokens: {rows_by_node.total():,} rows so far")
                said = time.monotonic()

    retry_lost_actors("tokens", write, what="tokenization", progress=finished)
    reports = [UnitReport.from_json(report_path(directory, name).read_text(encoding="utf-8")) for name in names]
    return StorePreparation(reports=tuple(reports), rows_by_node=dict(rows_by_node))


def is_finished(directory: Place, name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a unit has its report, and all shards that it names."""
    path = report_path(directory, name)
    if path.name not in sizes:
        return False
    report = UnitReport.from_json(path.read_text(encoding="utf-8"))
    return all(is_complete(shard, sizes) for shard in report.shards)


def report_path(directory: Place, name: str) -> Place:
    return directory / f".{name}.{REPORT}"
