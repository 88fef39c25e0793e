"""Bugs planted into the Triton `rotary`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "halves swapped": ("x1 = tl.load(x, mask=mask, other=0.0)", "x1 = tl.load(x + HALF, mask=mask, other=0.0)"),
    "wrong sign": ("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
    "sine and cosine swapped": ("x2 * cos + x1 * sin", "x2 * sin + x1 * cos"),
    "backward rotates forward": (
        "n_q_rows, block, seq,\n                     Q_HEADS, HALF, BLOCK_M, BLOCK_HALF, -1.0)",
        "n_q_rows, block, seq,\n                     Q_HEADS, HALF, BLOCK_M, BLOCK_HALF, 1.0)",
    ),
    "keys' gradient rotated forward": (
        "K_HEADS, HALF, BLOCK_M, BLOCK_HALF, -1.0)",
        "K_HEADS, HALF, BLOCK_M, BLOCK_HALF, 1.0)",
    ),
    "keys' gradient dropped": ('gradients=("q", "k")', 'gradients=("q", "q")'),
    "position of the head": ("position = (token % seq)", "position = (rows % seq)"),
    "position off by one": ("position = (token % seq)", "position = tl.minimum(token % seq + 1, seq - 1)"),
    "positions run over the batch": ("token // seq).to(tl.int64) * batch_stride", "token // seq).to(tl.int64) * 0"),
    "last column not computed": (
        "(rows < n_rows)[:, None] & (cols < HALF)[None, :]",
        "(rows < n_rows)[:, None] & (cols < HALF - 1)[None, :]",
    ),
    "last row stale": ("mask = (rows < n_rows)[:, None]", "mask = (rows < n_rows - 1)[:, None]"),
    "2 % too large": ("(x2 * cos + x1 * sin)", "(1.02 * (x2 * cos + x1 * sin))"),
    "interleaved instead of halves": (
        "x = x_ptr + base[:, None] + cols[None, :]",
        "x = x_ptr + base[:, None] + (2 * cols[None, :]) % HALF",
    ),
    "queries overwritten": (
        "    block_half = triton.next_power_of_2(half)\n",
        "    block_half = triton.next_power_of_2(half)\n    q.mul_(2.0)\n",
    ),
}
