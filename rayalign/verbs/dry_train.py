"""``rayalign train --dry-run``: what each training process will hold, and which settings lower it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from rayalign.config.load import load_run
from rayalign.errors import UserError
from rayalign.report.tables import narrow_table
from rayalign.run.memory import WorkerMemory, cheaper, worker_memory
from rayalign.run.resolve import resolve_run
from rayalign.run.train import refuse_unsupported
from rayalign.runtime.session import Session, preview

GIB = 2**30
FULL = 0.9
"""Share of a device that a run may plan to fill: its libraries and fragments take the rest."""


def dry_train(path: Path | None, overrides: list[str], *, device_gib: float | None, console: Console) -> None:
    """Print the memory of a training process; nothing is written, and no Ray is started.

    With ``device_gib`` it is planned for a GPU of that size, whatever is here.

    Raises:
        UserError: the run cannot be trained, or its processes do not fit.
    """
    run = load_run(path, overrides)
    refuse_unsupported(run)
    with preview() as session:
        device = torch.device("cuda" if device_gib is not None else session.device)
        room = device_gib if device_gib is not None else device_memory(session)
        workers = resolve_run(run, session).workers
        found = worker_memory(run, device=device, workers=workers)
        print_memory(found, workers=workers, device=device, room=room, console=console)
        if room is None or found.total <= room * FULL * GIB:
            return
        console.print("it does not fit; settings that lower it, each with those above it:", highlight=False)
        for setting, changed in cheaper(run, workers):
            total = worker_memory(changed, device=device, workers=workers).total
            fits = total <= room * FULL * GIB
            console.print(f"  {setting}: {total / GIB:.1f} GiB{', which fits' if fits else ''}", highlight=False)
            if fits:
                break
    raise UserError(
        f"{found.total / GIB:.1f} GiB do not fit into {FULL:.0%} of {room:.1f} GiB; settings that lower it are above"
    )


def device_memory(session: Session) -> float | None:
    """GiB of the first GPU of this machine; None where training runs on CPUs."""
    if session.device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def print_memory(
    found: WorkerMemory, *, workers: int, device: torch.device, room: float | None, console: Console
) -> None:
    rows = [[name, f"{size / GIB:.2f}"] for name, size in found.parts.items()]
    rows.append(["together", f"{found.total / GIB:.2f}"])
    place = f"a GPU of {room:.1f} GiB" if room is not None else f"a {device.type.upper()}, whose memory is not compared"
    processes = f"each of {workers} training processes" if workers > 1 else "the training process"
    console.print(f"memory of {processes} on {place}, with all micro-batches at their limit:", highlight=False)
    console.print(narrow_table(("part", "GiB"), rows, title=""))
    for remark in found.remarks:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
