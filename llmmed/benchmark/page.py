"""The page of results, `docs/results.md`: written from benchmarks' JSON alone, so that no number is typed by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmmed.benchmark import results
from llmmed.benchmark.results import OpsResult, Origin, Result, StepResult
from llmmed.benchmark.tables import header, markdown, note
from llmmed.files import write_atomically
from llmmed.reporting.benchmark_plots import draw

_DEFAULT_PAGE = Path("docs/results.md")  # as in configs/benchmark.yaml
_TITLES = {
    "ops_time": "Time of each op against the model's size",
    "ops_speedup": "Speed-up over PyTorch",
    "ops_memory": "Peak memory of each op",
    "step_breakdown": "What the device does in one step",
    "step": "Speed, memory and time to the first step",
}


def write_page(folders: Sequence[Path], page: Path) -> list[Path]:
    """Draws the plots of finished benchmarks again and writes the page about them.

    Pictures, JSON and CSV that the page refers to go into a folder beside it, named like it; that folder's own
    subfolders can be given later to write the page again.

    Raises:
        UserError: a folder holds no result, or one that cannot be read.
    """
    found = list(results.read(folders))
    sections: list[str] = []
    kept: list[str] = []
    written: list[Path] = []
    for path, result in found:
        pictures = draw(result, path.parent)
        written += pictures
        name = _folder(result)
        name = name if name not in kept else f"{name}_{1 + len(kept)}"
        kept.append(name)
        target = page.with_suffix("") / name
        results.write(result, target)
        for picture in pictures:
            write_atomically(target / picture.name, picture.read_bytes())
        sections.append("\n".join(_section(result, target, pictures, page)))
    command = "python scripts/benchmark.py report=" + ",".join(f"{page.with_suffix('')}/{name}" for name in kept)
    command += f" page={page}" if page != _DEFAULT_PAGE else ""
    intro = f"# Results\n\nWritten by `{command}` from the JSON beside this page; change nothing here by hand.\n"
    write_atomically(page, "\n".join([intro, *sections]))
    return [*written, page]


def _section(result: Result, target: Path, pictures: Sequence[Path], page: Path) -> Iterator[str]:
    yield f"## {_heading(result)}\n"
    yield from _origin(result.origin, result.seconds)
    data = os.path.relpath(target, page.parent)
    files = (f"{result.kind}.json", f"{result.kind}.csv")
    yield f"All numbers: {', '.join(f'[{file}]({data}/{file})' for file in files)}.\n"
    yield f"{note(result)}\n"
    for picture in pictures:
        title = next(words for stem, words in _TITLES.items() if picture.stem.startswith(stem))
        yield f"![{title}]({data}/{picture.name})\n"
    yield from _ops(result) if isinstance(result, OpsResult) else _step(result)


def _folder(result: Result) -> str:
    """`ops`, or `step_small_base_adamw`."""
    return "_".join([result.kind, *(_trained(result) if isinstance(result, StepResult) else ())])


def _heading(result: Result) -> str:
    if isinstance(result, OpsResult):
        return f"Kernels on {result.origin.hardware.device}"
    *models, optimizer = _trained(result)
    return f"Training steps of {' and '.join(models)} with {optimizer} on {result.origin.hardware.device}"


def _trained(result: StepResult) -> list[str]:
    """The sizes, and the optimizer, which a benchmark has one of."""
    told = [*(shape.size for shape in result.shapes), *(shape.optimizer for shape in result.shapes)]
    return list(dict.fromkeys(told))


def _origin(origin: Origin, seconds: float) -> Iterator[str]:
    changed = f" with {origin.changed_files} changed files" if origin.changed_files else ""
    hardware = origin.hardware
    cpu = f", {hardware.cpu}" if hardware.cpu != hardware.device else ""
    yield f"* Machine: {header(origin)}; CUDA {hardware.cuda or 'none'}, Python {hardware.python}{cpu}"
    yield f"* Date: {origin.date}; commit {origin.commit or 'unknown'}{changed}; took {seconds:,.0f} s"
    yield f"* Command: `{origin.command}`\n"
    if origin.remark:
        yield f"**Remark.** {origin.remark}\n"


def _ops(result: OpsResult) -> Iterator[str]:
    for title, ceilings in result.ceilings.items():
        products = "".join(f", {name} products {t:,.0f} TFLOP/s" for name, t in ceilings.product_tflops.items())
        yield f"* Ceilings of {title}: copy {ceilings.copy_gb_per_second:,.0f} GB/s (read + write){products}"
    if result.ceilings:
        yield ""
    for op in dict.fromkeys(row.op for row in result.rows):
        yield f"### {op}\n"
        here = [row for row in result.rows if row.op == op]
        for group in dict.fromkeys((row.size, row.dtype, row.mode) for row in here):
            rows = [row for row in here if (row.size, row.dtype, row.mode) == group]
            size, dtype, mode = group
            yield f"{size}, {dtype}, {mode}: {rows[0].shapes}\n"
            yield markdown(rows)


def _step(result: StepResult) -> Iterator[str]:
    for shape in result.shapes:
        yield (
            f"### {shape.size}\n\n{shape.parameters / 1e6:,.1f} M parameters, vocabulary {shape.vocabulary:,}, "
            f"{shape.tokens} a step, {shape.precision}, {shape.optimizer}\n"
        )
        rows = [row for row in result.rows if row.size == shape.size]
        yield markdown(rows)
        kernels = next((row.kernels for row in rows if row.contestant == "ours_auto" and row.kernels), None)
        if kernels is not None:
            yield f"Kernels that kernels=auto chose: {', '.join(f'{op} {name}' for op, name in kernels.items())}.\n"
