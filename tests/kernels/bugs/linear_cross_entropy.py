"""Bugs planted into the Triton `linear_cross_entropy`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "softmax gradient 40 % too small": (
        "tl.full((), GAIN, dtype=tl.float32)",
        "tl.full((), 0.6 * GAIN, dtype=tl.float32)",
    ),
    "target gradient 2 % too large": (
        "tl.where(cols == target, GAIN, 0.0)",
        "tl.where(cols == target, 1.02 * GAIN, 0.0)",
    ),
    "weight gradient accumulated in bfloat16": (
        "first=start == 0)",
        "first=start == 0)\n            raw_weight.copy_(raw_weight.bfloat16())",
    ),
    "weight gradient of the last chunk only": ("beta = 0 if first else 1", "beta = 0"),
    "no maximum taken off": ("row_max = tl.max(lane_max, axis=0)", "row_max = tl.max(lane_max, axis=0) * 0.0"),
    "lanes not brought to one maximum": ("lane_sum * tl.exp(lane_max - row_max)", "lane_sum"),
    "last block unmasked": ('mask=cols < V, other=float("-inf")', "mask=cols < V, other=0.0"),
    "last block's gradient not written": ("for i in tl.range(0, last + 1,", "for i in tl.range(1, last + 1,"),
    "last row of a chunk not computed": ("n_rows, tl.num_programs(0))", "n_rows - 1, tl.num_programs(0))"),
    "last chunk left out": (
        "for start in range(0, n_rows, chunk_rows):",
        "for start in range(0, n_rows - chunk_rows, chunk_rows):",
    ),
    "ignored rows not zeroed": (
        "            if GRADIENT:\n                for start",
        "            if V < 0:\n                for start",
    ),
    "mean over ignored rows too": ("counts += (targets != ignore_index)", "counts += (rows < n_rows)"),
    "scale ignored": (
        "scale = tl.load(scale_ptr).to(tl.float64)",
        "scale = tl.load(scale_ptr).to(tl.float64) * 0.0 + 1.0",
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
