"""Writes docs/kernels.schema.json, the JSON schema of `kernels.json`: `python scripts/plan_schema.py`."""

from pathlib import Path

from llmmed.autotune.plan import KernelPlan
from llmmed.files import write_json

if __name__ == "__main__":
    write_json(
        Path(__file__).parent.parent / "docs" / "kernels.schema.json",
        KernelPlan.model_json_schema(mode="serialization"),
    )
