"""The transformer: initial values, dtypes, gradients, causality, and that a compiler takes it in one graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmmed.config import ModelConfig
from llmmed.errors import UserError
from llmmed.kernels.base import Kernels
from llmmed.model import IGNORE_INDEX, Transformer
from llmmed.model.transformer import rotary_tables

BATCH, SEQ = 3, 17


def build(config: ModelConfig, kernels: Kernels, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    return Transformer(config, kernels, dtype, max_seq_len=SEQ, seed=seed)


def draw_tokens(config: ModelConfig, seed: int = 1) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(config.vocab_size, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def gradients(model: Transformer, run: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = run(tokens, targets)
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_a_seed_means_the_same_parameters_whatever_the_default_device(tiny: ModelConfig, kernels: Kernels) -> None:
    first = build(tiny, kernels, seed=7).state_dict()
    with torch.device("meta"):
        second = build(tiny, kernels, seed=7).state_dict()
    other = build(tiny, kernels, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["token_embedding"], other["token_embedding"])


def test_initial_values_are_scaled_where_they_write_to_the_residual_stream(tiny: ModelConfig, kernels: Kernels) -> None:
    config = replace(tiny, n_layers=8, d_model=128, d_ff=256)
    state = build(config, kernels).state_dict()
    for name, values in state.items():
        if name.endswith("norm"):
            assert torch.equal(values, torch.ones_like(values)), name
            continue
        residual = name.endswith(("output_projection", "down_projection"))
        expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        assert values.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(values.mean().item()) < 0.1 * expected, name


def test_the_loss_is_the_mean_over_targets_that_count(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    tokens, targets = draw_tokens(tiny)
    targets = targets.clone()
    targets[0, 3:] = IGNORE_INDEX
    logits = model(tokens)
    assert logits.shape == (BATCH, SEQ, tiny.vocab_size)
    counted = targets != IGNORE_INDEX
    by_hand = -logits[counted].log_softmax(-1).gather(1, targets[counted][:, None]).mean()
    torch.testing.assert_close(model(tokens, targets), by_hand)


def test_every_parameter_gets_a_gradient(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    found = gradients(model, model, *draw_tokens(tiny))
    assert len([name for name in found if name.endswith("norm")]) == 2 * tiny.n_layers + 1
    for name, gradient in found.items():
        d_head = tiny.d_model // tiny.n_heads
        heads = (tiny.n_heads, tiny.n_kv_heads, tiny.n_kv_heads)
        parts = gradient.split([n * d_head for n in heads]) if name.endswith("qkv_projection") else [gradient]
        for part in parts:
            assert part.isfinite().all(), name
            assert part.abs().max() > 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_parameters_and_the_loss_are_float32(tiny: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append((x.dtype, weight.dtype))
        return kernels.rms_norm(x, weight, eps)

    model = build(tiny, Kernels({**kernels.functions, "rms_norm": rms_norm}), dtype)
    tokens, targets = draw_tokens(tiny)
    assert model(tokens).dtype == dtype
    assert model(tokens, targets).dtype == torch.float32
    assert set(seen) == {(dtype, torch.float32)}
    assert {gradient.dtype for gradient in gradients(model, model, tokens, targets).values()} == {torch.float32}
    exact = build(tiny, kernels)(tokens, targets)
    torch.testing.assert_close(model(tokens, targets), exact, atol=5e-3, rtol=0)


def test_a_token_sees_nothing_of_what_follows(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    tokens, _ = draw_tokens(tiny)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % tiny.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().max() > 1e-3


def test_positions_matter(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    tokens, _ = draw_tokens(tiny)
    swapped = tokens[:, [1, 0, *range(2, SEQ)]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-5


def test_rotary_tables_are_exact_far_out() -> None:
    cos, sin = rotary_tables(100_001, 8, 500_000.0)
    assert cos.shape == sin.shape == (100_001, 4)
    for position in (0, 1, 99_999, 100_000):
        for pair in range(4):
            angle = position * 500_000.0 ** (-2 * pair / 8)
            assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_a_tied_model_has_one_table(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(replace(tiny, tie_embeddings=True), kernels)
    assert "lm_head" not in model.state_dict()
    tokens, _ = draw_tokens(tiny)
    hidden: list[Tensor] = []

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, total = kernels.add_rms_norm(x, residual, weight, eps)
        hidden.append(normed)
        return normed, total

    model.set_kernels(Kernels({**kernels.functions, "add_rms_norm": add_rms_norm}))
    logits = model(tokens)
    torch.testing.assert_close(logits, F.linear(hidden[-1], model.token_embedding))


def test_parameters_do_not_depend_on_the_kernels_or_the_length(tiny: ModelConfig, kernels: Kernels) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError

    model = build(tiny, kernels)
    other = Transformer(tiny, Kernels({"rms_norm": refuse, "rotary": refuse}), torch.bfloat16, max_seq_len=SEQ + 9)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in other.state_dict().items()}
    other.load_state_dict(model.state_dict())


def test_parameters_that_are_loaded_are_not_drawn_before(
    tiny: ModelConfig, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Transformer(tiny, kernels, torch.float32, max_seq_len=SEQ, seed=3)
    monkeypatch.setattr(Transformer, "initialize", pytest.fail)
    empty = Transformer(tiny, kernels, torch.float32, max_seq_len=SEQ, seed=None)
    empty.load_state_dict(drawn.state_dict())
    assert all(map(torch.equal, drawn.parameters(), empty.parameters()))


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("eager", torch.float32, 1e-5),
        ("eager", torch.bfloat16, 1e-5),
        pytest.param("inductor", torch.bfloat16, 0.03, marks=pytest.mark.slow),  # fused, hence rounded less often
    ],
)
def test_compiles_in_one_graph_and_takes_a_new_plan(
    tiny: ModelConfig, kernels: Kernels, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch._dynamo.reset()
    model = build(tiny, kernels, dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    tokens, targets = draw_tokens(tiny)
    expected = gradients(model, model, tokens, targets)
    found = gradients(model, compiled, tokens, targets)
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm(), name

    def flat(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), residual

    model.set_kernels(Kernels({**kernels.functions, "add_rms_norm": flat}))
    assert compiled(tokens, targets).item() == pytest.approx(math.log(tiny.vocab_size), rel=1e-5)


def test_its_parts_are_compiled_once_for_all_blocks(tiny: ModelConfig, kernels: Kernels) -> None:
    def compiled_graphs(n_layers: int, dtype: torch.dtype = torch.float32) -> int:
        torch._dynamo.reset()
        count = 0

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            nonlocal count
            count += 1
            return graph.forward

        config = replace(tiny, n_layers=n_layers)
        plain, model = build(config, kernels, dtype), build(config, kernels, dtype)
        model.compile_parts(backend)
        model.keep_copies()
        tokens, targets = draw_tokens(config)
        found = torch.autograd.grad(model(tokens, targets), model.leaves)
        for (name, expected), gradient in zip(gradients(plain, plain, tokens, targets).items(), found, strict=True):
            torch.testing.assert_close(gradient.float(), expected, atol=1e-6, rtol=0, msg=name)
        assert set(model.state_dict()) == set(plain.state_dict())
        return count

    assert compiled_graphs(2) == compiled_graphs(5) == compiled_graphs(5, torch.bfloat16) == 3  # embedding, block, loss


def test_a_sequence_that_is_too_long_is_told(tiny: ModelConfig, kernels: Kernels) -> None:
    with pytest.raises(UserError, match=rf"{SEQ + 1} tokens .* {SEQ}; .*max_seq_len={SEQ + 1}"):
        build(tiny, kernels)(torch.zeros(1, SEQ + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 66}, r"model.d_model=66 .* model.n_heads=4 .* try model.n_heads=3 or model.d_model=64"),
        ({"d_model": 12}, r"model.d_model=12 .* even size; try model.n_heads=3 or model.d_model=16"),
        ({"n_kv_heads": 3}, r"model.n_kv_heads=3 does not divide model.n_heads=4; allowed: 1, 2, 4"),
    ],
)
def test_heads_that_do_not_fit_are_told(
    tiny: ModelConfig, kernels: Kernels, change: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(replace(tiny, **change), kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_copies_compute_what_casts_do(
    tiny: ModelConfig, kernels: Kernels, dtype: torch.dtype, checkpoint_blocks: bool
) -> None:
    casting, copying = (
        Transformer(tiny, kernels, dtype, max_seq_len=SEQ, checkpoint_blocks=checkpoint_blocks) for _ in range(2)
    )
    copying.keep_copies()
    assert len(copying.copies) == 4 * tiny.n_layers
    for model in (casting, copying):
        model(*draw_tokens(tiny)).backward()
    assert torch.equal(casting(draw_tokens(tiny)[0]), copying(draw_tokens(tiny)[0]))
    for expected, leaf, parameter in zip(casting.parameters(), copying.leaves, copying.parameters(), strict=True):
        assert expected.grad is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == (dtype if parameter in copying.copies else torch.float32)
        assert torch.equal(leaf.grad.float(), expected.grad)
        assert leaf is parameter or parameter.grad is None


def test_copies_follow_what_is_loaded_and_are_no_part_of_the_state(tiny: ModelConfig, kernels: Kernels) -> None:
    plain, copying = (build(tiny, kernels, torch.bfloat16, seed=seed) for seed in (1, 2))
    names = set(copying.state_dict())
    copying.keep_copies()
    assert set(copying.state_dict()) == names
    addresses = [copy.data_ptr() for copy in copying.copies.values()]
    tokens, _ = draw_tokens(tiny)
    copying.load_state_dict(plain.state_dict())
    assert torch.equal(plain(tokens), copying(tokens))
    copying.initialize(3)
    assert torch.equal(build(tiny, kernels, torch.bfloat16, seed=3)(tokens), copying(tokens))
    assert [copy.data_ptr() for copy in copying.copies.values()] == addresses  # where CUDA graphs know them
    another = deepcopy(copying)
    another.load_state_dict(plain.state_dict())
    assert torch.equal(plain(tokens), another(tokens))


def test_in_float32_there_is_nothing_to_copy(tiny: ModelConfig, kernels: Kernels) -> None:
    model = build(tiny, kernels)
    model.keep_copies()
    assert not model.copies
    assert all(leaf is parameter for leaf, parameter in zip(model.leaves, model.parameters(), strict=True))


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_checkpointed_blocks_give_the_same_gradients(tiny: ModelConfig, kernels: Kernels, backend: str | None) -> None:
    torch._dynamo.reset()
    plain = build(tiny, kernels)
    checkpointed = Transformer(tiny, kernels, torch.float32, max_seq_len=SEQ, checkpoint_blocks=True)
    if backend is not None:
        checkpointed.compile_parts(backend)
    tokens, targets = draw_tokens(tiny)
    random_state = torch.get_rng_state()
    found = gradients(checkpointed, checkpointed, tokens, targets)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, expected in gradients(plain, plain, tokens, targets).items():
        tolerance = 0 if backend is None else 1e-6  # eager runs the same kernels in the same order
        torch.testing.assert_close(found[name], expected, atol=tolerance, rtol=0, msg=name)


def test_checkpointed_blocks_keep_only_what_enters_them(tiny: ModelConfig, kernels: Kernels) -> None:
    def kept(checkpoint_blocks: bool) -> int:
        model = Transformer(tiny, kernels, torch.float32, max_seq_len=SEQ, checkpoint_blocks=checkpoint_blocks)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*draw_tokens(tiny))
        return sum(saved.values())

    assert kept(checkpoint_blocks=True) < 0.5 * kept(checkpoint_blocks=False)
