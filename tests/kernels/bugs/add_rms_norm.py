"""Bugs planted into the Triton `add_rms_norm`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "epsilon outside the root": (
        "tl.rsqrt(tl.sum(total * total, axis=1) / N + EPS)",
        "1.0 / (tl.sqrt(tl.sum(total * total, axis=1) / N) + EPS)",
    ),
    "epsilon absent": ("axis=1) / N + EPS)", "axis=1) / N)"),
    "sum instead of mean": ("tl.sum(total * total, axis=1) / N", "tl.sum(total * total, axis=1)"),
    "norm of the branch alone": (
        "total = rounded.to(tl.float32)",
        "total = tl.where(mask, x, 0.0)",
    ),
    "residual not added to the stream": (
        "tl.store(total_ptr + out, rounded, mask=mask)",
        "tl.store(total_ptr + out, x.to(total_ptr.dtype.element_ty), mask=mask)",
    ),
    "residual read with the strides of x": (
        "residual_ptr + rows64[:, None] * residual_stride",
        "residual_ptr + rows64[:, None] * x_stride",
    ),
    "2 % scale": ("normed = total * rstd[:, None]", "normed = 1.02 * total * rstd[:, None]"),
    "last column not computed": (
        "mask = row_mask[:, None] & (cols < N)[None, :]",
        "mask = row_mask[:, None] & (cols < N - 1)[None, :]",
    ),
    "last row block stale": (
        "tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num",
        "tl.cdiv(n_rows, BLOCK_M) - 1, tl.num_programs(0), num",
    ),
    "gradient of the stream dropped": ("* rstd[:, None] + dtotal", "* rstd[:, None] + 0.0 * dtotal"),
    "gradient of the stream counted twice": ("* rstd[:, None] + dtotal", "* rstd[:, None] + 2.0 * dtotal"),
    "gradient of the stream normalised too": (
        "dx = (scaled - x_hat * projection[:, None]) * rstd[:, None] + dtotal",
        "dx = (scaled - x_hat * projection[:, None] + dtotal) * rstd[:, None]",
    ),
    "projection with the wrong sign": (
        "(scaled - x_hat * projection[:, None])",
        "(scaled + x_hat * projection[:, None])",
    ),
    "weight left out of backward": ("scaled = dnormed * weight[None, :]", "scaled = dnormed + 0.0 * weight[None, :]"),
    "weight gradient of the last block only": ("dweight += dnormed * x_hat", "dweight = dnormed * x_hat"),
    "weight gradient in bfloat16": (
        "dweight += dnormed * x_hat",
        "dweight = (dweight + dnormed * x_hat).to(tl.bfloat16).to(tl.float32)",
    ),
    "last row block 2 % too large": (
        "normed = total * rstd[:, None]",
        "normed = tl.where(rows64 >= (n_rows - 1) // BLOCK_M * BLOCK_M, 1.02, 1.0)[:, None] * total * rstd[:, None]",
    ),
    "weight gradient without the norm": ("dweight += dnormed * x_hat", "dweight += dnormed * total"),
    "gradient for x alone": ("(dx, dx, dweight)", "(dx, torch.zeros_like(dx), dweight)"),
    "weight taken for contiguous": (
        "x_rows, residual_rows, weight = as_rows(x), as_rows(residual), weight.contiguous()",
        "x_rows, residual_rows = as_rows(x), as_rows(residual)",
    ),
    "weight taken for contiguous in backward": (
        "dtotal_rows, weight = as_rows(dnormed), as_rows(dtotal), weight.contiguous()",
        "dtotal_rows = as_rows(dnormed), as_rows(dtotal)",
    ),
    "residual overwritten": (
        "normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))",
        "normed, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), residual_rows",
    ),
}
