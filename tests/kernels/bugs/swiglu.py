"""Bugs planted into the Triton `swiglu`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "sigmoid for silu": ("y = gate * tl.sigmoid(gate) * up", "y = tl.sigmoid(gate) * up"),
    "gate and up exchanged": ("y = gate * tl.sigmoid(gate) * up", "y = up * tl.sigmoid(up) * gate"),
    "sigmoid of GELU's shape": ("y = gate * tl.sigmoid(gate)", "y = gate * tl.sigmoid(1.702 * gate)"),
    "2 % scale": ("y = gate * tl.sigmoid(gate) * up", "y = 1.02 * gate * tl.sigmoid(gate) * up"),
    "up read with the strides of gate": (
        "    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)\n    y =",
        "    up = tl.load(up_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)\n    y =",
    ),
    "last column not computed": ("(cols < N)[None, :]", "(cols < N - 1)[None, :]"),
    "last row not computed": ("mask = (rows < n_rows)", "mask = (rows < n_rows - 1)"),
    "last row block stale": (
        "return block_m, block_n, triton.cdiv(n_rows, block_m) *",
        "return block_m, block_n, max(1, n_rows // block_m) *",
    ),
    "derivative of the sigmoid left out": ("(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
    "derivative with the wrong sign": ("(sigmoid + silu * (1.0 - sigmoid))", "(sigmoid - silu * (1.0 - sigmoid))"),
    "derivative without its sigmoid": ("silu * (1.0 - sigmoid)", "gate * (1.0 - sigmoid)"),
    "gate's gradient without up": ("dgate = dy * up * ", "dgate = dy * "),
    "up's gradient from the sigmoid": ("dup = dy * silu", "dup = dy * sigmoid"),
    "gradients exchanged": (
        "lambda dgate_up: dgate_up.chunk(2, dim=-1)",
        "lambda dgate_up: dgate_up.chunk(2, dim=-1)[::-1]",
    ),
    "gradient halves overlap by a column": ("tl.store(out + N,", "tl.store(out + N - 1,"),
    "arriving gradient taken for contiguous": (
        "dy_ptr + rows * dy_stride + cols",
        "dy_ptr + rows * N + cols + 0 * dy_stride",
    ),
    "gate overwritten": (
        "y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)\n    if",
        "y = gate.detach()\n    if",
    ),
}
