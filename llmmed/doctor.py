"""`python -m llmmed.doctor`: what to paste into a bug report, and for everything that is wrong, what to do.

Nothing but the standard library is imported before a check needs it, so that a broken installation can be told. What
may take a process with it, kernels above all, runs in a process of its own. `--full` verifies every implementation.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmmed.machine import installed_version

if TYPE_CHECKING:
    import torch

    from llmmed.autotune.verify import Verdict

_WIDTH = 100
_MARK = "llmmed-doctor: "  # before what the child says, among whatever libraries print
_CHILD_SECONDS = {False: 120, True: 3600}  # without and with --full
_MOST_ERROR = {4: 1e-4, 2: 0.1}  # relative, of a default in a small case, by the bytes of its dtype
_FREE_GIB = 5.0  # below it a warning: checkpoints of the base model take 1.5 GB each
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "LLMMED_CACHE",
    "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR",
    "WANDB_MODE", "CC", "CXX",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's. `warning`: something is missing that training can do without; `broken`: it cannot."""

    level: Literal["ok", "warning", "broken"]
    name: str
    text: str
    remedy: str = ""


def main(arguments: Sequence[str]) -> int:
    """Prints all findings; exit code 1 if something is broken that training with the default configuration needs."""
    if list(arguments[:1]) == ["--child"]:
        _child(full="--full" in arguments)
        return 0
    if not set(arguments) <= {"--full"}:
        print("error: write python -m llmmed.doctor, or with --full to verify every implementation", file=sys.stderr)
        return 1
    found = []
    for finding in examine(full="--full" in arguments):
        found.append(finding)
        print(_told(finding), flush=True)
    broken = [finding for finding in found if finding.level == "broken"]
    warnings = sum(finding.level == "warning" for finding in found)
    print()
    if broken:
        print(f"{len(broken)} broken: {', '.join(finding.name for finding in broken)}; each says what to do")
    else:
        count = f"{warnings} warning{'s' if warnings > 1 else ''}"
        print("training works here" + (f"; for what it goes without, see {count} above" if warnings else ""))
    return 1 if broken else 0


def examine(*, full: bool) -> Iterator[Finding]:
    """Every check's findings. A check that raises is a finding, too."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("system", _system), ("packages", _packages), ("gpu", _gpu), ("compilers", _compilers),
        ("configuration", _configuration), ("data", _data), ("cache", _cache), ("disk", _disk),
        ("entry points", _entry_points), ("kernels", lambda: _kernels(full=full)),
    ]  # fmt: skip
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - whatever breaks a check is what the user needs to be told
            text = " ".join(str(error).split())[:300]
            remedy = "install again: pip install -e '.[biomed]' in the checkout; if it stays, report all of this"
            yield Finding("broken", name, f"{type(error).__name__}: {text}", remedy)


def _told(finding: Finding) -> str:
    head = f"{finding.level:8} {finding.name:14} "
    rest = " " * len(head)
    text = textwrap.fill(finding.text, _WIDTH, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)
    if not finding.remedy:
        return text
    arrow = textwrap.fill(f"-> {finding.remedy}", _WIDTH, initial_indent=rest, subsequent_indent=rest + "   ")
    return f"{text}\n{arrow}"


def _system() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    text = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    yield Finding("broken" if old else "ok", "python", text, "llmmed needs Python 3.11 or newer" if old else "")
    values = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    yield Finding("ok", "environment", ", ".join(values) or "nothing that matters is set")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        text = "TRITON_INTERPRET=1: Triton kernels run in the interpreter, slowly and in float32 only"
        yield Finding("warning", "interpreter", text, "unset TRITON_INTERPRET, unless you are testing kernels")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("llmmed") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warning", "llmmed", "used from a folder, not installed", "pip install -e '.[biomed]'")
        return
    yield Finding("ok", "llmmed", importlib.metadata.version("llmmed") + _commit())
    versions = []
    for requirement in wanted:
        extra = "extra" in str(requirement.marker)
        if requirement.marker is not None and not extra and not requirement.marker.evaluate():
            continue
        version = installed_version(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            versions.append(f"{requirement.name} {version}")
        elif version is not None or not extra:
            text = f"{requirement.name} is {version or 'not installed'}; llmmed needs {requirement.specifier}"
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Finding("warning" if extra else "broken", requirement.name, text, remedy)
    yield Finding("ok", "packages", ", ".join(dict.fromkeys(versions)))


def _gpu() -> Iterator[Finding]:
    import torch

    from llmmed.autotune.hardware import describe_hardware
    from llmmed.compose import detect_device

    present = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    if not torch.cuda.is_available():
        hardware = describe_hardware("cpu")
        yield Finding("ok", "cpu", f"{hardware.device}, threads used: {hardware.cpu_threads}")
        if detect_device() == "cuda":
            driver = describe_hardware("cuda").driver
            text = f"there is a GPU (driver {driver or 'unknown'}), but torch {torch.__version__} cannot use it"
            remedy = f"install a driver for CUDA {torch.version.cuda} or newer; until then train with device=cpu"
            yield Finding("broken", "gpu", text, remedy)
        elif present and torch.version.cuda is None:
            text = f"there is a GPU, but torch {torch.__version__} is a CPU build"
            remedy = "pip install torch from an index with CUDA builds, see pytorch.org; until then training is slow"
            yield Finding("warning", "gpu", text, remedy)
        else:
            remedy = "to try things out, nothing; real training needs an NVIDIA GPU"
            yield Finding("warning", "gpu", "none is seen: training runs on the CPU, without Triton kernels", remedy)
        return
    hardware = describe_hardware("cuda")
    driver = f"driver {hardware.driver or 'unknown'}, CUDA {hardware.cuda}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, {device.total_memory / 2**30:.1f} GiB, {device.multi_processor_count} multiprocessors"
        text += f", compute capability {device.major}.{device.minor}, {driver}"
        old = device.major < 8
        remedy = "bfloat16 is slow before 8.0: train.precision=fp16" if old else ""
        yield Finding("warning" if old else "ok", f"gpu {index}", text, remedy)


def _compilers() -> Iterator[Finding]:
    import torch

    found = {name: _first_line([name, "--version"]) for name in ("gcc", "clang", "cc", "g++", "clang++", "c++")}
    there = [f"{name}: {line}" for name, line in found.items() if line]
    if there:
        yield Finding("ok", "compilers", "; ".join(there))
    if torch.cuda.is_available():
        if not any(found[name] for name in ("gcc", "clang", "cc")):
            text = "there is no C compiler: neither Triton nor torch.compile works, and training is eager PyTorch"
            yield Finding("broken", "C compiler", text, "apt install gcc")
    elif not any(found[name] for name in ("g++", "clang++", "c++")):
        text = "there is none: torch.compile does not work, and compiled kernels are marked unavailable"
        yield Finding("warning", "C++ compiler", text, "apt install g++")


def _configuration() -> Iterator[Finding]:
    from llmmed import compose
    from llmmed.errors import UserError

    composed = compose.compose_yaml(with_hydra=True)
    sources = [
        f"{source.path or source.schema} ({source.provider})" for source in composed.hydra.runtime.config_sources
    ]
    yield Finding("ok", "config path", ", ".join(sources))
    try:
        config = compose.compose()
    except UserError as error:
        yield Finding("broken", "configuration", str(error), "the default configuration must compose: see the message")
        return
    text = (
        f"device {config.device}, model {config.model.name}, data {config.data.name}, kernels {config.kernels.policy}"
    )
    yield Finding("ok", "configuration", f"the default composes: {text}")


def _data() -> Iterator[Finding]:
    from llmmed.data import biomed

    missing = biomed.missing_package()
    if missing is None:
        yield Finding("ok", "data", f"data=biomed reads cellxgene-ontology-guide {biomed.version()}")
    else:
        text = f"data=biomed, the default, needs the package {missing}"
        yield Finding(
            "broken", "data", text, "pip install 'llmmed[biomed]', or train with data=text data.path=<folder>"
        )


def _cache() -> Iterator[Finding]:
    from llmmed.files import cache_folder

    try:
        root = cache_folder("plans").parent
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        remedy = "set LLMMED_CACHE to a folder that can be written"
        yield Finding("broken", "cache", f"cannot be written: {error}", remedy)
        return
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    plans = len(list((root / "plans").glob("*.json")))
    text = f"{root}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB; tuning results among them: {plans}"
    yield Finding("ok", "cache", text)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    text = f"{free:.1f} GiB free in {Path.cwd()}, where outputs/ goes"
    if not os.access(Path.cwd(), os.W_OK):
        yield Finding("broken", "disk", f"{Path.cwd()} cannot be written", "start it in a folder of your own")
    elif free < _FREE_GIB:
        yield Finding("warning", "disk", text, "free some, or lower train.keep_last: checkpoints fill it")
    else:
        yield Finding("ok", "disk", text)


def _entry_points() -> Iterator[Finding]:
    from llmmed.kernels.catalog import misnamed_entry_points

    for text in misnamed_entry_points():
        yield Finding("warning", "entry point", text, "the package that registers it has to name an op that there is")


def _kernels(*, full: bool) -> Iterator[Finding]:
    """What the child says, and of what it did not survive, that."""
    command = [sys.executable, "-m", "llmmed.doctor", "--child", *(["--full"] if full else [])]
    ended, errors = "", ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_SECONDS[full])
        output, errors = done.stdout, done.stderr
        if done.returncode:
            code = done.returncode
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"not done within {_CHILD_SECONDS[full]} s"
    begun, right = "kernels", []
    for line in output.splitlines():
        if not line.startswith(_MARK):
            continue
        said = json.loads(line.removeprefix(_MARK))
        begun = said["name"]
        if said.get("level") == "ok" and not full and said["default"]:
            right.append(f"{begun.split()[0]} ({said['text'].split(', ')[0]})")
        elif "level" in said:
            yield Finding(said["level"], begun, said["text"], said["remedy"])
    if right:
        yield Finding("ok", "kernels", f"PyTorch's implementations verify: {', '.join(right)}")
    if ended:
        last = (errors.strip().splitlines() or [""])[-1]
        remedy = "kernels.pin.<op>=pytorch goes around an implementation; please report it with all of this"
        yield Finding("broken", begun, f"the process that tried it was {ended}; {last}".rstrip("; "), remedy)


def _child(*, full: bool) -> None:
    """Verifies and says so, each implementation before it is tried and after."""
    import torch

    from llmmed.kernels.catalog import DEFAULT, implementation_names, op_names
    from llmmed.kernels.operator import INTERPRETED

    device = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
    first = next((op for op in ("rms_norm", *op_names()) if "triton" in implementation_names(op)), None)
    can_run = device.type == "cuda" or INTERPRETED
    for op in op_names():
        names = implementation_names(op) if full else (DEFAULT, *(["triton"] if can_run and op == first else []))
        for name in names:
            _say(name=f"{op} {name}")
            verdict = _verify(op, name, device, full=full)
            default = name == DEFAULT
            right = verdict.status == "verified" or (verdict.status == "unavailable" and not default)
            text = verdict.status.replace("_", " ")
            if verdict.relative_error is not None:
                text = f"relative error {verdict.relative_error:.0e}, {text}"
            remedy = "" if right else _remedy(default, op)
            level = "ok" if right else "broken" if default else "warning"
            reason = f": {verdict.reason}" if verdict.reason else ""
            _say(name=f"{op} {name}", level=level, text=text + reason, remedy=remedy, default=default)
    if first is not None and not can_run:
        _compile_one(first)
    if full and device.type == "cuda":
        from llmmed.autotune.measure import measure_ceilings

        _say(name="ceilings")
        found = measure_ceilings(device, (torch.bfloat16,))
        text = "not measured" if found is None else f"copy {found.copy_gb_per_second:,.0f} GB/s (read + write)"
        text += "".join(f", {d} product {t:,.0f} TFLOP/s" for d, t in (found.product_tflops if found else {}).items())
        _say(name="ceilings", level="ok", text=text, remedy="", default=False)


def _remedy(default: bool, op: str) -> str:
    if default:
        return "every kernel is held against this one: install torch again, or another version of it"
    return f"nothing: it is never used while it is so; kernels.pin.{op}=pytorch keeps it from being tried"


def _verify(op: str, name: str, device: torch.device, *, full: bool) -> Verdict:
    """The gate's verdict: everything, or one small case with bland values."""
    from dataclasses import replace

    import torch

    from llmmed.autotune.verify import Verdict, verify
    from llmmed.kernels.base import Unavailable
    from llmmed.kernels.catalog import DEFAULT, get_implementation, get_op, load_function

    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    op_described = get_op(op)
    first = dict(list(op_described.cases(dtype).items())[:1])
    quick = replace(op_described, regimes=op_described.regimes[:1], cases=lambda _: first)
    try:
        implementation = get_implementation(op, name)
        if reason := implementation.why_not(device, dtype):
            raise Unavailable(reason)
        function = load_function(op, implementation)
    except Unavailable as error:
        return Verdict("unavailable", str(error), None, None, 0)
    verdict = verify(quick, implementation, function, [], device, dtype=dtype)
    most = _MOST_ERROR[dtype.itemsize]
    if name == DEFAULT and (verdict.relative_error or 0.0) > most:
        # The gate measures others by the default, so that it cannot be what condemns the default itself.
        return replace(verdict, status="wrong", reason=f"on bland values at most {most:.0e} is right")
    return verify(op_described, implementation, function, [], device, dtype=dtype) if full else verdict


def _compile_one(op: str) -> None:
    """Triton compiles without a GPU, for one that is not there."""
    import torch

    from llmmed.kernels.ahead_of_time import compile_ahead_of_time
    from llmmed.kernels.base import Unavailable
    from llmmed.kernels.catalog import get_op

    _say(name="triton")
    calls = list(get_op(op).cases(torch.bfloat16).values())[:1]
    remedy = "kernels=auto and kernels=pytorch do without it; for Triton: pip install triton"
    try:
        kernels = compile_ahead_of_time(op, "triton", calls, targets=(90,), processes=1)
    except Exception as error:  # noqa: BLE001 - a compiler that is broken may raise anything
        text = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
        _say(name="triton", level="warning", text=text, remedy=remedy, default=False)
        return
    text = f"compiles {len(kernels)} kernels of {op} for sm_90; none can run here, without a GPU"
    _say(name="triton", level="ok", text=text, remedy="", default=False)


def _say(**said: str | bool) -> None:
    print(_MARK + json.dumps(said), flush=True)


def _commit() -> str:
    from llmmed.run_folder import describe_environment

    git = describe_environment()["git"]
    changed = len(git["changed_files"])
    return f", commit {git['commit']}" + (f" with {changed} changed files" if changed else "") if git["commit"] else ""


def _first_line(command: list[str]) -> str | None:
    """None where the program is not there or does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
