"""The doctor: says what is here, finds what is planted, names a remedy for it, and dies of nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmmed import doctor
from llmmed.data import biomed
from llmmed.doctor import Finding
from llmmed.kernels.catalog import op_names


def child_that(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts this code in the place of the process that verifies."""
    run = subprocess.run

    def instead(command: list[str], **arguments: object) -> object:
        replaced = [sys.executable, "-c", code] if "--child" in command else command
        return run(replaced, **arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", instead)


def test_a_working_machine_is_told_in_seconds_and_exits_with_0(tmp_path: Path, repository: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repository), "LLMMED_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "llmmed.doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for words in ("python", "torch 2.", "triton", "gcc", str(repository / "configs"), str(tmp_path), "training works"):
        assert words in text, words
    for op in op_names():
        assert f"{op} (relative error " in text, op
    assert "broken" not in text
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "\x1b" not in done.stdout


def test_a_missing_data_package_is_broken_and_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biomed, "missing_package", lambda: "zstandard")
    (finding,) = doctor._data()
    assert finding.level == "broken"
    assert "zstandard" in finding.text
    assert "pip install" in finding.remedy


def test_a_package_of_another_version_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "installed_version", lambda package: {"torch": "1.0", "zstandard": "0.1"}.get(package, "99")
    )
    found = {finding.name: finding for finding in doctor._packages()}
    assert found["torch"].level == "broken"
    assert "torch is 1.0; llmmed needs" in found["torch"].text
    assert found["torch"].remedy.startswith("pip install 'torch")
    assert found["zstandard"].level == "warning"  # an extra's


def test_a_cache_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMMED_CACHE", str(tmp_path / "file"))
    (finding,) = doctor._cache()
    assert (finding.level, finding.name) == ("broken", "cache")
    assert "LLMMED_CACHE" in finding.remedy


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_first_line", lambda command: None)
    (finding,) = doctor._compilers()
    assert finding.level in ("warning", "broken")
    assert finding.remedy.startswith("apt install g")


def test_a_kernel_that_kills_its_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [json.dumps({"name": "rms_norm pytorch", "level": "ok", "text": "relative error 6e-08, verified",
                        "remedy": "", "default": True}), json.dumps({"name": "swiglu triton"})]  # fmt: skip
    lines = "".join(f"print({doctor._MARK + line!r}, flush=True);" for line in said)
    child_that(f"import os, signal; {lines} os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    right, crashed = doctor._kernels(full=False)
    assert "rms_norm (relative error 6e-08)" in right.text
    assert (crashed.level, crashed.name) == ("broken", "swiglu triton")
    assert "SIGSEGV" in crashed.text


def test_a_kernel_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._CHILD_SECONDS, False, 2)
    line = doctor._MARK + json.dumps({"name": "swiglu triton"})
    child_that(f"import time; print({line!r}, flush=True); time.sleep(60)", monkeypatch)
    (finding,) = doctor._kernels(full=False)
    assert (finding.level, finding.name) == ("broken", "swiglu triton")
    assert "not done within 2 s" in finding.text


def test_a_wrong_default_is_found_although_others_are_measured_by_it(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    import torch

    from llmmed.autotune import verify
    from llmmed.kernels import catalog

    load, cpu = catalog.load_function, torch.device("cpu")
    assert doctor._verify("rms_norm", "pytorch", cpu, full=False).status == "verified"
    for module in (catalog, verify):
        monkeypatch.setattr(module, "load_function", lambda op, found: lambda **given: 1.5 * load(op, found)(**given))
    verify.forget()
    request.addfinalizer(verify.forget)
    for full in (False, True):
        verdict = doctor._verify("rms_norm", "pytorch", cpu, full=full)
        assert verdict.status == "wrong"
        assert "at most 1e-04" in verdict.reason


def test_broken_findings_are_counted_and_exit_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises() -> Iterator[Finding]:
        raise RuntimeError("planted")

    def nothing() -> Iterator[Finding]:
        return iter(())

    for name in ("_system", "_packages", "_gpu", "_compilers", "_configuration", "_cache", "_disk"):
        monkeypatch.setattr(doctor, name, nothing)
    monkeypatch.setattr(doctor, "_kernels", lambda full: nothing())
    assert doctor.main([]) == 0
    assert "training works here" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_data", raises)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: planted" in out
    assert "1 broken: data" in out


def test_other_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--fast"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_an_entry_point_of_no_op_is_told(plant: Callable[..., None]) -> None:
    plant("right", "layer_norm.right")
    (finding,) = doctor._entry_points()
    assert finding.level == "warning"
    assert "planted-kernels registers 'layer_norm.right' in llmmed.kernels" in finding.text
