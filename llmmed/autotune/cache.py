"""The tuning cache: what was proved and measured, one JSON file a fingerprint, in the user's cache folder.

It keeps evidence and not choices. The fingerprint holds all that
evidence depends on, so an entry is never out of date; it is only no longer asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from llmmed.autotune.evidence import Evidence
from llmmed.autotune.hardware import UNKNOWN_GPU
from llmmed.autotune.plan import Hardware, KernelLaunch, Mode, first_problem
from llmmed.autotune.sources import all_found, project_hash, source_hash
from llmmed.autotune.workload import Workload
from llmmed.files import cache_folder, sha256_of, write_json
from llmmed.kernels import catalog, operator

logger = logging.getLogger(__name__)

# Too many rather than too few: tuning again costs two minutes, evidence from a debugging run misleads for good.
_FAMILIES = ("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_", "OMP_", "MKL_", "KMP_")
# Where something lies, what is logged, what names a job or a device (told by the hardware), what torch sets by itself.
_NO_MATTER = re.compile(
    r".*_(DIR|DIRECTORY|HOME|FILE|LOG_LEVEL)|CUDA_(CACHE_)?PATH|PYTORCH_KERNEL_CACHE_PATH|KMP_INIT_AT_FORK|"
    r"TORCH_(LOGS|TRACE|FR|SHOW_CPP_STACKTRACES).*|TORCHELASTIC_.*|CUDA_COREDUMP_.*|"
    r"(CUDA|NVIDIA)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_MODULE_LOADING|NVIDIA_(DRIVER_CAPABILITIES|REQUIRE_.*)"
)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    fingerprint: str
    evidence: Evidence


def fingerprint(
    *,
    workload: Workload,
    candidates: Mapping[str, list[str]],
    timed: Collection[str],
    device: str,
    hardware: Hardware,
    mode: Mode,
    deterministic: bool,
    candidate_seconds: float,
    launches: Mapping[str, Mapping[str, list[KernelLaunch]]],
    step: Mapping[str, Any] | None,
) -> str:
    """The hash of everything that evidence depends on: machine, versions, workload, mode, sources, what is tried.

    `candidates` are the implementations to verify, by op; `timed` the ops whose verified ones are measured; `launches`
    those of somebody's plan, by op and implementation; `step` what the step's answer depends on besides, None if it is
    not asked.
    """
    facts = {
        "hardware": hardware.model_dump(mode="json"),
        "installed": _installed(),
        "compilers": [shutil.which(name) for name in ("g++", "clang++", "c++", "gcc", "cc")],
        "interpreted": operator.INTERPRETED,
        "workload": workload.fingerprint(),
        "device": device,
        "candidates": {op: sorted(names) for op, names in sorted(candidates.items())},
        "timed": sorted(timed),
        "mode": mode,
        "deterministic": deterministic,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "candidate_seconds": candidate_seconds,
        "launches": {op: {n: [[x.site, x.chosen] for x in xs] for n, xs in by.items()} for op, by in launches.items()},
        "step": step,
        "environment": _environment(),
        "project": project_hash(),
        "sources": {op: source_hash(op) for op in catalog.op_names()},  # all: one op's code may use another's
    }
    return sha256_of([json.dumps(facts, sort_keys=True)])


def usable(hardware: Hardware) -> bool:
    """Whether this machine can be told from others, and all code from its later versions. An unnamed GPU cannot, nor a
    package whose files are not found: nothing is kept then."""
    return hardware.device != UNKNOWN_GPU and all_found()


def load(key: str) -> Evidence | None:
    """The entry of a fingerprint, or None. A damaged or foreign one is ignored with one warning."""
    path = None
    try:
        path = _path(key)
        entry = _Entry.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = first_problem(error)
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    else:
        if entry.fingerprint == key:
            return entry.evidence
        problem = "it belongs to another fingerprint"
    logger.warning("ignoring the tuning cache's entry %s (%s); it will be written anew", path or key, problem)
    return None


def store(key: str, evidence: Evidence) -> None:
    """Writes an entry, whole or not at all; of two runs at once the later one stays. Never stops a run."""
    try:
        write_json(_path(key), _Entry(fingerprint=key, evidence=evidence).model_dump(mode="json"))
    except OSError as error:
        logger.warning("the tuning cache cannot be written (%s); the next run tunes again", error)


def _path(key: str) -> Path:
    return cache_folder("plans") / f"{key}.json"


def _environment() -> dict[str, str]:
    """The variables that change what is compiled or how it computes; where caches lie changes nothing."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_FAMILIES) and not _NO_MATTER.fullmatch(name)
    }


def _installed() -> list[str]:
    """Name and version of every installed distribution, from folder names alone: a peer that comes, goes or changes."""
    folders = (Path(entry) for entry in sys.path if entry)
    return sorted({path.name for folder in folders if folder.is_dir() for path in folder.glob("*.dist-info")})
