"""Who takes part in `benchmark=step`, and how each trains: same weights, batches, optimizer, clipping and precision.

Ours keeps parameters in float32 and casts explicitly; the rivals do what their users do: float32 parameters under
autocast, fused AdamW or `torch.optim.Muon`, `clip_grad_norm_`, gradients set to None. Three things are not the same:

* under autocast Hugging Face's residual stream, norms and rotary positions stay in float32, as its own code has it;
* Hugging Face gets no attention mask, since batches are never padded, so that attention takes causal kernels;
* with Muon the plain model's fused projections (query, key and value; gate and up) are one matrix each, so that their
  updates are orthogonalised together, where the others' are apart.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmmed.autotune.plan import KernelPlan, Mode
from llmmed.autotune.tuner import tune
from llmmed.autotune.workload import record_workload
from llmmed.benchmark import plain_llama
from llmmed.benchmark.profiled_groups import annotated, in_range
from llmmed.config import Config
from llmmed.kernels.base import Kernels, Unavailable
from llmmed.kernels.catalog import default_choice, load_kernels
from llmmed.model import Transformer, compute_dtype, hf_config_dict, to_hf_state_dict
from llmmed.optim.adamw import decay_groups
from llmmed.training import prepare_backend, resolve_compile
from llmmed.training.micro_step import build_micro_step
from llmmed.training.step import Stepper


@dataclass(frozen=True)
class Contestant:
    """One way to train the model.

    Args:
        name: Its key in `contestants=`; the part before the first underline is its family.
        title: For people.
        overrides: What it changes in the run's configuration.
        mode: How its step runs; None leaves that to `train.compile`.
        liger: Whether Liger's kernels replace Hugging Face's, or its fused loss the plain model's.
        torch_loss: Whether the plain model's head and loss are one call of `F.linear_cross_entropy`.
        gpu_only: Whether it says nothing on a CPU.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    mode: Mode | None = None
    liger: bool = False
    torch_loss: bool = False
    gpu_only: bool = False

    @property
    def family(self) -> str:
        """`ours`, `plain` or `hf`."""
        return self.name.partition("_")[0]

    def why_not(self, device: str) -> str | None:
        """Why it cannot take part here, or None."""
        if self.mode == "graphs" and device != "cuda":
            return "CUDA graphs need a CUDA GPU"
        if self.family == "hf" and importlib.util.find_spec("transformers") is None:
            return "transformers is not installed; pip install 'llmmed[peers]'"
        if self.liger and importlib.util.find_spec("liger_kernel") is None:
            return "Liger is not installed; pip install 'llmmed[peers]'"
        if self.liger and device != "cuda":
            return "Liger's kernels need a CUDA GPU"
        if self.torch_loss and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        if self.gpu_only and device != "cuda":
            return "is measured on a CUDA GPU only"
        return None


def _ours(mode: Mode) -> tuple[str, ...]:
    return ("kernels=pytorch", f"train.compile={mode}")


# The order in which they run, every size of one before the next: what is cut off by `seconds` stands last.
CONTESTANTS = (
    Contestant("ours_auto", "llmmed, kernels=auto", ("kernels=auto",)),
    Contestant("plain_graphs", "plain PyTorch, torch.compile with CUDA graphs", mode="graphs"),
    Contestant("plain_compiled", "plain PyTorch, torch.compile", mode="compiled"),
    Contestant("hf_liger", "Hugging Face + Liger, eager", mode="eager", liger=True),
    Contestant("ours_graphs", "llmmed, kernels=pytorch, graphs", _ours("graphs"), "graphs"),
    Contestant("hf_compiled", "Hugging Face, torch.compile", mode="compiled"),
    Contestant(
        "plain_compiled_liger", "plain PyTorch + Liger's fused loss, torch.compile", mode="compiled", liger=True
    ),
    Contestant("plain_eager", "plain PyTorch, eager", mode="eager"),
    Contestant("hf_eager", "Hugging Face, eager", mode="eager"),
    Contestant(
        "plain_compiled_torch", "plain PyTorch, F.linear_cross_entropy, torch.compile", mode="compiled", torch_loss=True
    ),
    Contestant("plain_liger", "plain PyTorch + Liger's fused loss, eager", mode="eager", liger=True),
    Contestant("ours_compiled", "llmmed, kernels=pytorch, compiled", _ours("compiled"), "compiled"),
    Contestant("ours_eager", "llmmed, kernels=pytorch, eager", _ours("eager"), "eager"),
    Contestant(
        "plain_fp16", "plain PyTorch, eager, fp16 + GradScaler", ("train.precision=fp16",), "eager", gpu_only=True
    ),
)


class Trainee(Protocol):
    """A contestant that is ready to train."""

    excluded_seconds: float  # spent on what a user of it would not do

    @property
    def plan(self) -> KernelPlan | None:
        """The kernels of ours."""
        ...

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, in float32."""
        ...

    def step(self, index: int, micro_batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One optimizer step over micro-batches [batch, seq + 1]: the mean loss and the gradients' norm, 0-d."""
        ...

    def annotated(self) -> AbstractContextManager[None]:
        """Marks parts of the step for the profiler, where the mode lets it."""
        ...


def build(contestant: Contestant, config: Config) -> Trainee:
    """On the run's device, with the weights that everybody starts from. Raises `Unavailable`."""
    if reason := contestant.why_not(config.device):
        raise Unavailable(reason)
    prepare_backend(config)
    if contestant.family == "ours":
        return _Ours(config)
    return _Rival(contestant, config)


class _Ours:
    """As `llmmed.training.loop` trains."""

    excluded_seconds = 0.0

    def __init__(self, config: Config) -> None:
        plan = tune(config, record_workload(config), mode=resolve_compile(config))
        self.plan: KernelPlan | None = plan
        self._mode = plan.mode
        self._model = Transformer.for_training(config, load_kernels(plan.choice, plan.launches), config.device)
        self._stepper = Stepper(self._model, build_micro_step(self._model, config, self._mode), config)
        self.parameters: list[Tensor] = list(self._model.parameters())

    def step(self, index: int, micro_batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self._stepper.run(index, micro_batches, len(micro_batches))

    @contextlib.contextmanager
    def annotated(self) -> Any:
        if self._mode != "eager":
            yield
            return
        kernels = self._model.kernels
        self._model.set_kernels(_marked(kernels))
        try:
            yield
        finally:
            self._model.set_kernels(kernels)


_PARTS = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rotary": "rotary",
    "rotary_attention": "attention",  # but for the rotary that it calls
    "swiglu": "swiglu",
    "swiglu_mlp": "swiglu",  # but for cuBLAS's products in it
    "attention": "attention",
    "linear_cross_entropy": "loss",
}


def _marked(kernels: Kernels) -> Kernels:
    """The same table with ranges around the ops, also around those that an op calls itself."""
    functions: dict[str, Callable[..., Any]] = {}
    marked = Kernels(functions, kernels.chosen)
    for op, function in kernels.functions.items():
        if isinstance(function, functools.partial) and "kernels" in function.keywords:
            function = functools.partial(function, kernels=marked)
        functions[op] = in_range(function, _PARTS[op]) if op in _PARTS else function
    marked.__post_init__()
    return marked


class _Rival:
    """Somebody else's model in the loop that its users write."""

    plan: KernelPlan | None = None

    def __init__(self, contestant: Contestant, config: Config) -> None:
        self._contestant, self._config = contestant, config
        begun = time.perf_counter()
        weights = Transformer.for_training(config, load_kernels(default_choice()), "cpu")
        self.excluded_seconds = time.perf_counter() - begun
        self._model = (
            _plain(weights, contestant, config)
            if contestant.family == "plain"
            else _hugging_face(weights, contestant, config)
        )
        self._call: Callable[..., Tensor] = self._model
        if contestant.mode == "compiled":
            self._call = torch.compile(self._model, dynamic=False)
        elif contestant.mode == "graphs":
            self._call = torch.compile(self._model, dynamic=False, mode="reduce-overhead")
        self.parameters: list[Tensor] = list(self._model.parameters())
        self._optimizers = _optimizers(self._model, config)
        self._scaler = torch.amp.GradScaler(config.device, enabled=config.train.precision == "fp16")

    def step(self, index: int, micro_batches: list[Tensor]) -> tuple[Tensor, Tensor]:
        train, dtype = self._config.train, compute_dtype(self._config.train.precision)
        total = torch.zeros((), device=self._config.device)
        for batch in micro_batches:
            with torch.autocast(self._config.device, dtype=dtype, enabled=dtype != torch.float32):
                loss = self._call(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            if len(micro_batches) > 1:
                loss = loss / len(micro_batches)
            self._scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.grad_clip or float("inf"))
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        return total, norm

    def annotated(self) -> AbstractContextManager[None]:
        if self._contestant.mode != "eager":
            return contextlib.nullcontext()
        if self._contestant.family == "plain":
            functions = {(plain_llama, "rotate"): "rotary", (plain_llama, "gated"): "swiglu"}
            return annotated(self._model, {"RMSNorm": "norm"}, functions)
        from transformers.models.llama import modeling_llama

        classes = {"LlamaRMSNorm": "norm", "LigerRMSNorm": "norm", "LlamaMLP": "swiglu", "LigerSwiGLUMLP": "swiglu"}
        classes |= {"LlamaRotaryEmbedding": "rotary"}
        return annotated(self._model, classes, {(modeling_llama, "apply_rotary_pos_emb"): "rotary"})


def _plain(weights: Transformer, contestant: Contestant, config: Config) -> nn.Module:
    loss = plain_llama.liger_loss if contestant.liger else plain_llama.torch_loss if contestant.torch_loss else None
    model = plain_llama.PlainLlama(config.model, config.train.seq_len, loss or plain_llama.plain_loss)
    model.load_state_dict(plain_llama.plain_state_dict(weights.state_dict()))
    return model.to(config.device)


def _hugging_face(weights: Transformer, contestant: Contestant, config: Config) -> nn.Module:
    if contestant.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    from transformers import LlamaConfig, LlamaForCausalLM

    _leave_causality_to_attention()
    fields = hf_config_dict(config.model, max_seq_len=config.train.seq_len, attn_implementation="sdpa", use_cache=False)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(to_hf_state_dict(weights, config.model), strict=not config.model.tie_embeddings)
    return _LossOnly(model.to(config.device))


def _leave_causality_to_attention() -> None:
    """Gives attention no mask, since batches are never padded: it is then causal by itself.

    In a compiled step transformers makes a dense mask otherwise, which no flash or cuDNN kernel takes.
    """
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    except ImportError:
        print("this transformers is older than 4.53: compiled, it makes a dense mask; pip install -U transformers")
    else:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: None


class _LossOnly(nn.Module):
    """Hugging Face's model with our arguments. It gets the targets as they are, so that all compute the same loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        return loss


def _optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    given = config.optimizer
    rest, found = list(model.parameters()), []
    if given.name == "muon":
        assert given.momentum is not None
        hidden = [p for name, p in model.named_parameters() if ("blocks." in name or "layers." in name) and p.ndim == 2]
        found.append(
            torch.optim.Muon(
                hidden,
                lr=given.lr,
                weight_decay=given.weight_decay,
                momentum=given.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
        taken = set(map(id, hidden))
        rest = [p for p in rest if id(p) not in taken]
    groups = decay_groups(rest, given.weight_decay)
    return [*found, torch.optim.AdamW(groups, lr=given.lr, betas=given.betas, eps=given.eps, fused=True)]
