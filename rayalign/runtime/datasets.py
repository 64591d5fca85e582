"""Preparation as Ray Data stages: units of input → chunks of rows → shards of token ids.

Ray Data moves the work, not the truth: what a run trains on is the committed store, and rows are counted at the end.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray

from rayalign.config.data import DataConfig
from rayalign.config.model import ModelConfig
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat, make_chat
from rayalign.data.records import BadRow
from rayalign.data.tokenize_rows import Shape, ShardReport, Unit, prepare_chunk
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.pretrained import load_tokenizer
from rayalign.errors import UserError
from rayalign.runtime.failures import retry_lost_actors
from rayalign.runtime.reading import CPUS, RowChunk, read_unit
from rayalign.runtime.stage import apply_to_items, dataset_of_items
from rayalign.storage.cache import working
from rayalign.storage.place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePreparation:
    """What preparation found: rows = groups' rows + bad + dropped."""

    reports: tuple[ShardReport, ...]
    bytes_by_node: dict[str, int]
    """Bytes of input that the tasks on each node were given."""

    @property
    def rows(self) -> int:
        return sum(report.rows for report in self.reports)

    @property
    def bad(self) -> tuple[BadRow, ...]:
        return tuple(row for report in self.reports for row in report.bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChunk:
    """What one worker made of a chunk."""

    name: str
    report: ShardReport
    node: str
    num_bytes: int


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


class ChunkWriter:
    """One worker of the tokenization stage; loads the tokenizer once."""

    def __init__(
        self, model: ModelConfig, data: DataConfig, completed: Completed, shape: Shape, directory: Place
    ) -> None:
        self.chat = load_chat(model, data)
        self.budget = data
        self.completed: Completed = completed
        self.shape: Shape = shape
        self.directory = directory

    def __call__(self, chunk: RowChunk | UserError) -> WrittenChunk:
        if isinstance(chunk, UserError):
            raise chunk
        with working(self.directory) as folder:
            report = prepare_chunk(
                chunk.rows,
                self.chat,
                self.budget,
                completed=self.completed,
                unit=chunk.unit,
                shape=self.shape,
                directory=folder,
                name=chunk.name,
            )
        return WrittenChunk(
            name=chunk.name,
            report=report,
            node=ray.get_runtime_context().get_node_id(),
            num_bytes=len(pickle.dumps(chunk.rows)),
        )


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
    """Write the shards of every unit below ``directory``, in ``writers`` actors; the caller commits them.

    Raises UserError where a unit cannot be read or the tokenizer cannot be used.
    """

    def write() -> list[WrittenChunk]:
        chunks = dataset_of_items(list(enumerate(units))).flat_map(read_unit, num_cpus=CPUS)
        chunks.context.target_max_block_size = 1  # every chunk is a block of its own, which any worker may take
        return apply_to_items(
            "tokens",
            chunks,
            ChunkWriter,
            model,
            data,
            completed,
            shape,
            directory,
            actors=writers,
            cpus=CPUS,
            done=lambda count: note(f"tokens: {count} shards so far"),
        )

    written = retry_lost_actors("tokens", write, what="tokenization")
    bytes_by_node: Counter[str] = Counter()
    for shard in written:
        bytes_by_node[shard.node] += shard.num_bytes
    ordered = sorted(written, key=lambda shard: shard.name)
    return StorePreparation(reports=tuple(shard.report for shard in ordered), bytes_by_node=dict(bytes_by_node))
