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
        "programs: int = triton.cdiv(n_rows, launch.block_m) *",
        "programs: int = max(1, n_rows // launch.block_m) *",
    ),
    "derivative of the sigmoid left out": ("(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
    "derivative with the wrong sign": ("(sigmoid + silu * (1.0 - sigmoid))", "(sigmoid - silu * (1.0 - sigmoid))"),
    "derivative without its sigmoid": ("silu * (1.0 - sigmoid)", "gate * (1.0 - sigmoid)"),
    "gate's gradient without up": ("dgate = dy * up * ", "dgate = dy * "),
    "up's gradient from the sigmoid": ("dup = dy * silu", "dup = dy * sigmoid"),
    "gradients exchanged": ("(dgate, dup),\n)", "(dgate, dup) if dup is None else (dup, dgate),\n)"),
    "halves of a fused projection exchanged": ("return gate_half, up_half", "return up_half, gate_half"),
    "halves of the fused gradient exchanged": (
        "dy_rows, (gate_rows, up_rows) = as_rows(dy)",
        "(dgate_rows, dup_rows) = (dgate_rows, dup_rows) if up is not None else (dup_rows, dgate_rows)\n"
        "    dy_rows, (gate_rows, up_rows) = as_rows(dy)",
    ),
    "up's half of the fused gradient not written": (
        "tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask)",
        "tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask & (GRADIENT_STRIDE == N))",
    ),
    "fused gradient with the rows of one half": ("GRADIENT_STRIDE=dgate_rows.stride(0)", "GRADIENT_STRIDE=width"),
    "gradient halves overlap by a column": (
        "tl.store(dup_ptr + out,",
        "tl.store(dup_ptr + out - (1 if GRADIENT_STRIDE > N else 0),",
    ),
    "up of a fused projection a column early": (
        "return gate_half, up_half",
        "return gate_half, gate_rows[:, gate_half.shape[1] - 1 : -1]",
    ),
    "arriving gradient taken for contiguous": (
        "dy_ptr + rows * dy_stride + cols",
        "dy_ptr + rows * N + cols + 0 * dy_stride",
    ),
    "gate overwritten": (
        "y = _output(gate, up)\n    gate_rows",
        "y = gate.detach() if up is not None else _output(gate, up)\n    gate_rows",
    ),
}
