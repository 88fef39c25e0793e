"""Bugs planted into the Triton `cross_entropy`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "softmax gradient 40 % too small": (
        "log_sum, WIDTH) * rest).to",
        "log_sum, WIDTH) * rest * 0.6).to",
    ),
    "softmax gradient 40 % too small where it is flat": (
        "if HELD > 0:\n        _store_gradient",
        "rest = rest * tl.where(row_sum > 0.9 * V, 0.6, 1.0)\n    if HELD > 0:\n        _store_gradient",
    ),
    "target gradient 2 % too large": ("/ row_sum - 1.0) * factor", "/ row_sum - 1.02) * factor"),
    "target gradient with the wrong sign": ("/ row_sum - 1.0) * factor", "/ row_sum + 1.0) * factor"),
    "no maximum taken off": ("row_max = tl.max(lane_max, axis=0)", "row_max = tl.max(lane_max, axis=0) * 0.0"),
    "lanes not brought to one maximum": ("lane_sum * tl.exp(lane_max - row_max)", "lane_sum"),
    "last block unmasked": ('mask=cols < END, other=float("-inf")', "mask=cols < END, other=0.0"),
    "last block's gradient not written": ("for i in tl.range(0, last + 1,", "for i in tl.range(1, last + 1,"),
    "last row not computed": (
        "for row in tl.range(first, n_rows, step):",
        "for row in tl.range(first, n_rows - 1, step):",
    ),
    "the first row's target for all of a program": ("target = next_target", "target = target + 0"),
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

# Those that show only where a part of a row is held in registers.
HELD_BUGS = {
    "no maximum taken off": ("tl.maximum(walked_max, held_max)", "walked_max * 0.0"),
    "held columns left out of the sum": (" + held_sum * tl.exp(held_max - row_max)", ""),
    "walked columns not brought to the row's maximum": ("row_sum * tl.exp(walked_max - row_max)", "row_sum"),
    "held columns not brought to the row's maximum": ("held_sum * tl.exp(held_max - row_max)", "held_sum"),
    "held columns walked as well": (
        "_load_columns(logits, start + offsets, V, WALKED, WALKED % BLOCK != 0, ",
        "_load_columns(logits, start + offsets, V, PADDED, True, ",
    ),
    "other columns held": ("_lanes(logits, PADDED - HELD, HELD), V", "_lanes(logits, 0, HELD), V"),
    "held gradient one lane off": (
        "_store_gradient(held, gradient, _lanes(logits, WALKED, HELD)",
        "_store_gradient(held, gradient, _lanes(logits, WALKED - WIDTH, HELD)",
    ),
    "held gradient of a zero": ("_store_gradient(held, ", "_store_gradient(held * 0.0, "),
    "held gradient not written": (
        "if HELD > 0:\n        _store_gradient",
        "if HELD < 0:\n        _store_gradient",
    ),
    "walked gradient stops a block short of the held one": (
        "last = (WALKED - 1) // BLOCK",
        "last = (WALKED - 1) // BLOCK - (HELD > 0)",
    ),
}
