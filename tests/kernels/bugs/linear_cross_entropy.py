"""Bugs planted into the Triton `linear_cross_entropy`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "gradient of the loss 2 % too small": ("row_max, row_sum, GAIN, V", "row_max, row_sum, 0.98 * GAIN, V"),
    "gradient of another row's target": (
        "logits, logits, held, target, chosen",
        "logits, logits, held, target // 2, chosen",
    ),
    "padding counted among the classes": (
        "row_statistics(logits, held, V, PADDED, BLOCK",
        "row_statistics(logits, held, PADDED, PADDED, BLOCK",
    ),
    "rows taken for contiguous": ("logits = logits_ptr + row * PADDED", "logits = logits_ptr + row * V"),
    "the sum left out of the loss": ("(row_max - chosen) + tl.log(row_sum))", "row_max - chosen)"),
    "weight gradient accumulated in bfloat16": (
        "first=start == 0)",
        "first=start == 0)\n            raw_weight.copy_(raw_weight.bfloat16())",
    ),
    "weight gradient of the last chunk only": ("beta = 0 if first else 1", "beta = 0"),
    "last row of a chunk not computed": ("tl.range(first, n_rows, step)", "tl.range(first, n_rows - 1, step)"),
    "the first row's target for all of a program": ("target = next_target", "target = target + 0"),
    "last chunk left out": (
        "for start in range(0, n_rows, chunk_rows):",
        "for start in range(0, n_rows - chunk_rows, chunk_rows):",
    ),
    "ignored rows not zeroed": (
        "            if GRADIENT:\n                write_zeros(",
        "            if V < 0:\n                write_zeros(",
    ),
    "upstream gradient ignored": ("tl.load(factor_ptr) * tl.load(upstream_ptr)", "tl.load(factor_ptr)"),
    "targets of the first chunk everywhere": (
        "_differentiate(logits, targets[rows],",
        "_differentiate(logits, targets,",
    ),
    "hidden states overwritten": (
        "torch.mm(logits, weight, out=raw_hidden[rows])",
        "torch.mm(logits, weight, out=raw_hidden[rows]); hidden_states[rows] = raw_hidden[rows]",
    ),
}
