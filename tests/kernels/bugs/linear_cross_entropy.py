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
        "add_product(raw_weight, logits.T, hidden_states[rows], first=start == 0)",
        "add_product(raw_weight, logits.T, hidden_states[rows], first=start == 0)\n"
        "            raw_weight.copy_(raw_weight.bfloat16())",
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

# In Hopper's product.
HOPPER_BUGS = {
    "exponentials 2 % too large": (
        "exponents = gl.fma(logits, gl.full_like(logits, _LOG2_E), -shift)",
        "exponents = gl.fma(logits, gl.full_like(logits, _LOG2_E), 0.0286 - shift)",
    ),
    "nothing shifted": (
        "shift = gl.load(shifts_ptr + rows, mask=rows < n_rows, other=0.0) * _LOG2_E",
        "shift = gl.load(shifts_ptr + rows, mask=rows < n_rows, other=0.0) * 0.0",
    ),
    "the first group's shifts for both": ("rows = top + gl.arange(0, _P,", "rows = row + gl.arange(0, _P,"),
    "classes past the vocabulary counted": ("if col + _N > vocab:", "if col > vocab:"),
    "both groups at the same rows of x, in a tile's first steps": (
        "i > 0, _P, _N, STAGES, WHICH)",
        "i > 0, _P, _N, STAGES, 0)",
    ),
    "both groups at the same rows of x, in its later steps": (
        "start > 0, _P, _N, STAGES, WHICH)",
        "start > 0, _P, _N, STAGES, 0)",
    ),
    "quarters exchanged": ("return (second, third, fourth), step", "return (second, fourth, third), step"),
    "the last tile's quarters not stored": (
        "        if some:\n            send(late[i], out_desc, top, left +",
        "        if top < 0:\n            send(late[i], out_desc, top, left +",
    ),
    "quarters stored where the next tile is": (
        "send(late[i], out_desc, before[1], before[2] +",
        "send(late[i], out_desc, before[1], col +",
    ),
    "sums of one column of tiles over those of another": ("at = col // _N * n_rows + rows", "at = rows"),
    "rows of tiles counted as columns": ("return in_group // width * _M", "return in_group % width * _M"),
}

# Around Hopper's product, in `exponentials.py`.
EXPONENTIALS_BUGS = {
    "large sums taken as they are": ("too_large = total > MOST", "too_large = total > MOST * MOST"),
    "the maximum of the first tile of classes alone": (
        "total = _over_tiles(sums_ptr, rows, n_rows, n_tiles, TILES, False)\n    tl.store",
        "total = _over_tiles(sums_ptr, rows, n_rows, n_tiles, TILES, False)\n    n_tiles = 1\n    tl.store",
    ),
    "the first block computed again for another": (
        "tl.store(again_ptr + 1 + first // TILE_ROWS, 1)",
        "tl.store(again_ptr + 1, 1)",
    ),
    "not computed again": (
        "hopper.exponentiate(x, self.weight, shifts, out, sums, maxima, again)",
        "pass",
    ),
    "the old sums after the second time": (
        "if tl.load(again_ptr + 1 + first // TILE_ROWS) != 0:",
        "if tl.load(again_ptr + 1 + first // TILE_ROWS) > 1:",
    ),
    "the loss without its shift": ("(shift - chosen) + tl.log(total), chosen)", "tl.log(total), chosen)"),
    "a foreign class counted as ignored": (
        'tl.sum(products, axis=1), float("nan"))',
        "tl.sum(products, axis=1), 0.0)",
    ),
    "the target's exponential kept": (
        "tl.store(at, tl.zeros((ROWS,), dtype=exponentials_ptr.dtype.element_ty), mask=inside & counts)",
        "pass",
    ),
    "the target's probability 2 % too small": (
        "tl.where(counts, (at_target - total) / total, 0.0)",
        "tl.where(counts, (0.98 * at_target - total) / total, 0.0)",
    ),
    "what a target adds to the hidden states left out": ("others + target, 0.0)", "others, 0.0)"),
    "hidden states' gradient without its factor": (
        "tl.load(raw, mask=mask, other=0.0).to(tl.float32) * factor",
        "tl.load(raw, mask=mask, other=0.0).to(tl.float32)",
    ),
    "what targets add to the weight left out": ("        _add_targets(raw_weight,", "        (raw_weight,"),
    "rows in the order that they came in": (
        "tl.load(order_ptr + places, mask=places < n_rows, other=0)",
        "places.to(tl.int64)",
    ),
    "one row of a class for all": (
        "tl.load(gradient, mask=whole, other=0.0) + sums",
        "tl.load(gradient, mask=whole, other=0.0) + x * residual[:, None]",
    ),
    "what all rows of a program add in each": (
        "same = class_[:, None] == class_[None, :]",
        "same = class_[:, None] + class_[None, :] >= -2",
    ),
    "a class that goes on past a program cut off": (
        "        total += tl.sum(tl.load(heads",
        "        total += 0.0 * tl.sum(tl.load(heads",
    ),
    "hidden states not scaled for the weight": ("x * factor[:, None], 0.0)", "x, 0.0)"),
}
