"""``rayalign doctor``: will a run work here? Everything that is measured, with a fix for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from rayalign.errors import UserError, first_line
from rayalign.storage.cache import node_cache
from rayalign.storage.place import ObjectPath, place_of, refuse_unwritable
from rayalign.verbs.findings import Finding, as_json, as_table, num_broken
from rayalign.verbs.machine import check_disk, check_limits, check_shared_memory, check_storage, judge_clocks
from rayalign.verbs.packages import check_packages, check_torch

if TYPE_CHECKING:
    from rayalign.runtime.nodes import Cluster


def doctor(storage_path: str, *, start_ray: bool, as_json_text: bool, console: Console) -> int:
    """Print what is found; 1 when something is broken, else 0. Joins a running cluster, starts one only if asked to."""
    findings = list(run_checks(storage_path, start_ray=start_ray))
    broken = num_broken(findings)
    if as_json_text:
        console.print_json(json.dumps(as_json(findings)))
    else:
        console.print(as_table(findings))
        warnings = sum(finding.state == "warning" for finding in findings)
        console.print(f"{broken} broken, {warnings} warnings", highlight=False)
    return int(broken > 0)


def run_checks(storage_path: str, *, start_ray: bool) -> Iterator[Finding]:
    """Every check, in the order in which they are shown."""
    packages = list(check_packages())
    yield from packages
    yield check_torch()
    cluster = None
    if any(finding.name == "ray" and finding.state == "broken" for finding in packages):
        yield Finding(name="cluster", state="note", found="not looked for: the Ray that is installed is another one")
    else:
        finding, cluster = check_cluster(storage_path, start_ray=start_ray)
        yield finding
    yield from check_folder(storage_path, cluster)
    yield check_shared_memory()
    yield check_limits()
    yield from judge_clocks(cluster.offsets if cluster else {})


def check_cluster(storage_path: str, *, start_ray: bool) -> tuple[Finding, Cluster | None]:
    """Ray is imported here and nowhere before; the second is None where no cluster was looked at."""
    fix = "start it, correct RAY_ADDRESS, or set RAY_ADDRESS=local to start one here; with a token: RAY_AUTH_MODE=token"
    try:
        from rayalign.runtime.nodes import address_to_join, look_at_cluster
    except (ImportError, OSError) as error:
        found = f"Ray cannot be imported: {first_line(error)}"
        return Finding(name="cluster", state="broken", found=found, fix="pip install --force-reinstall ray"), None
    try:
        address = address_to_join()
        if address is None and not start_ray:
            return Finding(name="cluster", state="ok", found="none is running: a run starts Ray for itself"), None
        cluster = look_at_cluster(storage_path)
    except (UserError, RuntimeError, OSError) as error:  # Ray tells of other versions and of tokens by RuntimeError
        return Finding(name="cluster", state="broken", found=first_line(error), fix=fix), None
    return judge_cluster(cluster, address), cluster


def judge_cluster(cluster: Cluster, address: str | None) -> Finding:
    cpus, gpus = sum(node.cpus for node in cluster.nodes), sum(node.gpus for node in cluster.nodes)
    num = len(cluster.nodes)
    where = "started here and stopped again" if cluster.started_here else f"at {address}"
    found = f"{where}: {num} node{'s' * (num != 1)}, {cpus:g} CPUs, {gpus:g} GPUs"
    if not cpus:
        fix = "wait for its workers, or let the autoscaler keep at least one (minReplicas, min_workers)"
        return Finding(name="cluster", state="warning", found=found, fix=fix)
    return Finding(name="cluster", state="ok", found=found)


def check_folder(storage_path: str, cluster: Cluster | None) -> Iterator[Finding]:
    """What ``storage_path`` means here, or on the cluster, and what its file system does."""
    if cluster is not None and cluster.storage_error:
        fix = "name a folder on a shared file system, mounted on every node, in storage_path or RAYALIGN_STORAGE"
        yield Finding(name="storage", state="broken", found=cluster.storage_error, fix=fix)
        return
    try:
        folder = place_of(cluster.storage if cluster else storage_path, field="storage_path")
        if isinstance(folder, ObjectPath):
            refuse_unwritable(folder)
            found = f"{folder} takes what is written, and creates an object once"
            yield Finding(name="storage", state="ok", found=found)
            yield check_disk(node_cache().root)
            return
    except UserError as error:
        fix = "name a folder, s3:// or gs:// in storage_path, and give this machine its credentials"
        yield Finding(name="storage", state="broken", found=str(error), fix=fix)
        return
    folder = folder.resolve()
    yield check_storage(folder)
    yield check_disk(folder)
