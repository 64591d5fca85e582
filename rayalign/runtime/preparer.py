"""One process of the stage of tokens. It imports no training, so that it starts soon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ray

from rayalign.config.data import DataConfig
from rayalign.config.model import ModelConfig
from rayalign.data.budget import Completed
from rayalign.data.chat import Chat, make_chat
from rayalign.data.tokenize_rows import Shape, Unit, UnitWriter, read_chunks
from rayalign.engine.model.folder import model_directory
from rayalign.engine.model.tokenizers import load_tokenizer
from rayalign.storage.cache import working
from rayalign.storage.place import Place, write_whole

REPORT = "report.json"


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
        write_whole(unit_report(self.directory, name), report.to_json().encode())


def unit_report(directory: Place, name: str) -> Place:
    return directory / f".{name}.{REPORT}"
