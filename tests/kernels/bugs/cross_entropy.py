"""Bugs planted into the Triton `cross_entropy`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "softmax gradient 40 % too small": (
        "log_sum, WIDTH) * rest\n        tl.store",
        "log_sum, WIDTH) * rest * 0.6\n        tl.store",
    ),
    "softmax gradient 40 % too small where it is flat": (
        "log_sum, WIDTH) * rest\n        tl.store",
        "log_sum, WIDTH) * rest * tl.where(row_sum > 0.9 * V, 0.6, 1.0)\n        tl.store",
    ),
    "target gradient 2 % too large": ("/ row_sum - 1.0) * factor", "/ row_sum - 1.02) * factor"),
    "target gradient with the wrong sign": ("/ row_sum - 1.0) * factor", "/ row_sum + 1.0) * factor"),
    "no maximum taken off": ("row_max = tl.max(lane_max, axis=0)", "row_max = tl.max(lane_max, axis=0) * 0.0"),
    "lanes not brought to one maximum": ("lane_sum * tl.exp(lane_max - row_max)", "lane_sum"),
    "last block unmasked": ('mask=cols < PADDED, other=float("-inf")', "mask=cols < PADDED, other=0.0"),
    "last block's gradient not written": ("for i in tl.range(0, last + 1,", "for i in tl.range(1, last + 1,"),
    "last row not computed": (
        ".to(tl.int64), n_rows, tl.num_programs(0))",
        ".to(tl.int64), n_rows - 1, tl.num_programs(0))",
    ),
    "ignored rows not zeroed": (
        "            if GRADIENT:\n                write_zeros(",
        "            if V < 0:\n                write_zeros(",
    ),
    "mean over ignored rows too": ("counts += (targets != ignore_index)", "counts += (rows < n_rows)"),
    "scale ignored": (
        "scale = tl.load(scale_ptr).to(tl.float64)",
        "scale = tl.load(scale_ptr).to(tl.float64) * 0.0 + 1.0",
    ),
    "upstream gradient ignored": ("(tl.load(factor_ptr) * upstream).to", "tl.load(factor_ptr).to"),
    "backward always leaves at once": ("end = tl.where(upstream == 1.0, 0, n_rows)", "end = 0"),
    "logits overwritten": (
        "gradient = torch.empty((n_rows, vocab) if with_gradient else (0,), dtype=logits.dtype, device=logits.device)",
        "gradient = rows",
    ),
}
