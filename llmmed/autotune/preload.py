"""All that tuning's processes import before they know what to do, for the template that they are forks of.

Forks of a process that has asked CUDA or its management library anything may not be able to use it, and those start
threads. PyTorch's compiler asks for GPUs while it is imported; that there is one is known before a template starts.
"""

from __future__ import annotations

import importlib
from unittest import mock

import torch

_MODULES = ("torch._inductor.compile_fx", "sympy.physics.units", "llmmed.autotune.worker", "llmmed.autotune.warm")

with mock.patch.object(torch.cuda, "is_available", return_value=True):
    for _name in _MODULES:
        importlib.import_module(_name)
