"""Bugs planted into the Triton `rms_norm`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "epsilon outside the root": (
        "tl.rsqrt(tl.sum(x * x, axis=1) / N + EPS)",
        "1.0 / (tl.sqrt(tl.sum(x * x, axis=1) / N) + EPS)",
    ),
    "epsilon absent": (" / N + EPS)", " / N + 1e-30)"),
    "sum instead of mean": ("tl.rsqrt(tl.sum(x * x, axis=1) / N + EPS)", "tl.rsqrt(tl.sum(x * x, axis=1) + EPS)"),
    "2 % too large": ("y = x * rstd[:, None] * weight[None, :]", "y = 1.02 * x * rstd[:, None] * weight[None, :]"),
    "weight left out": ("y = x * rstd[:, None] * weight[None, :]", "y = x * rstd[:, None]"),
    "weight gradient dropped": ("dweight += dy * x_hat", "dweight += 0.0 * x_hat"),
    "weight gradient in bfloat16": (
        "dweight += dy * x_hat",
        "dweight = (dweight + dy * x_hat).to(tl.bfloat16).to(tl.float32)",
    ),
    "weight gradient of the input, not the normed": ("dweight += dy * x_hat", "dweight += dy * x"),
    "wrong sign in backward": ("(scaled - x_hat * projection", "(scaled + x_hat * projection"),
    "projection left out": ("(scaled - x_hat * projection[:, None])", "(scaled)"),
    "projection without the weight": ("tl.sum(scaled * x_hat, axis=1)", "tl.sum(dy * x_hat, axis=1)"),
    "gradient 2 % too small": ("projection[:, None]) * rstd[:, None]", "projection[:, None]) * rstd[:, None] * 0.98"),
    "last column not computed": (
        "    tl.store(y_ptr + rows64[:, None] * N + cols[None, :], y",
        "    mask = mask & (cols < N - 1)[None, :]\n    tl.store(y_ptr + rows64[:, None] * N + cols[None, :], y",
    ),
    "last block of rows stale": (
        "tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl",
        "tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M) - 1, tl",
    ),
    "last block of rows 2 % too large": (
        "y = x * rstd[:, None] * weight[None, :]",
        "last = rows >= (n_rows - 1) // BLOCK_M * BLOCK_M\n"
        "    y = x * rstd[:, None] * weight[None, :] * tl.where(last, 1.02, 1.0)[:, None]",
    ),
    "first partial sum left out": ("rows = start + tl.arange", "rows = 1 + start + tl.arange"),
    "weight taken for contiguous": ("rows, weight = as_rows(x), weight.contiguous()", "rows = as_rows(x)"),
    "weight taken for contiguous in backward": (
        "dy_rows, x_rows, weight = as_rows(dy), as_rows(x), weight.contiguous()",
        "dy_rows, x_rows = as_rows(dy), as_rows(x)",
    ),
    "input overwritten": (
        "    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)\n",
        "    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)\n    x.mul_(1.5)\n",
    ),
}
