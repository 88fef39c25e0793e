"""Bugs planted into the Triton `swiglu_mlp`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "sigmoid for silu": ("hidden = wide * tl.sigmoid(wide) * up", "hidden = tl.sigmoid(wide) * up"),
    "gate and up exchanged": ("    gate, up = tl.split(", "    up, gate = tl.split("),
    "gate and up exchanged in forward alone": (
        "hidden = wide * tl.sigmoid(wide) * up.to(tl.float32)",
        "hidden = up.to(tl.float32) * tl.sigmoid(up.to(tl.float32)) * wide",
    ),
    "halves not taken apart": ("(BLOCK_M, 2, BLOCK_N)), (0, 2, 1))", "(BLOCK_M, BLOCK_N, 2)), (0, 1, 2))"),
    "2 % scale": ("hidden = wide * tl.sigmoid(wide) * up", "hidden = 1.02 * wide * tl.sigmoid(wide) * up"),
    "gate stored without its last column": (
        "tl.store(to, gate, mask=mask)",
        "tl.store(to, gate, mask=mask & (cols < d_ff - col - 1))",
    ),
    "up stored over the gate": ("tl.store(to + d_ff, up, mask=mask)", "tl.store(to, up, mask=mask)"),
    "rows of what comes out of the activation one too close where they are odd": (
        "to = hidden_ptr + row.to(tl.int64) * d_ff + col + rows * d_ff + cols",
        "to = hidden_ptr + row.to(tl.int64) * d_ff + col + rows * (d_ff - d_ff % 2) + cols",
    ),
    "last step of the sum left out": (
        "for start in range(0, width, BLOCK_K):\n        x = ",
        "for start in range(0, width - BLOCK_K * (width > BLOCK_K), BLOCK_K):\n        x = ",
    ),
    "last step of the sum left out in backward": (
        "for start in range(0, width, BLOCK_K):\n        dy = ",
        "for start in range(0, width - BLOCK_K * (width > BLOCK_K), BLOCK_K):\n        dy = ",
    ),
    "up's weight a unit early, by pointers": ("(half * d_ff + unit)", "(half * (d_ff - 1) + unit)"),
    "weights by pointers past the last unit": ("mask=(unit < d_ff)[:, None] &", "mask=(unit < d_ff - 1)[:, None] &"),
    "rows of tiles in a group too many": (
        "height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - group * GROUP, GROUP)",
        "height = GROUP",
    ),
    "columns of tiles counted as rows": ("in_group // height * BLOCK_N", "in_group % height * BLOCK_N"),
    "last row of tiles stale": (
        "return (triton.cdiv(n_rows, launch.block_m) *",
        "return (max(1, n_rows // launch.block_m) *",
    ),
    "derivative of the sigmoid left out": ("(sigmoid + silu * (1.0 - sigmoid))", "sigmoid"),
    "derivative with the wrong sign": ("(sigmoid + silu * (1.0 - sigmoid))", "(sigmoid - silu * (1.0 - sigmoid))"),
    "gate's gradient without up": ("dgate = dhidden * up * ", "dgate = dhidden * "),
    "up's gradient from the sigmoid": ("dup = dhidden * silu", "dup = dhidden * sigmoid"),
    "up's gradient over the gate's, by descriptors": (
        "dgate_up_desc.store([row, 1, col]",
        "dgate_up_desc.store([row, 0, col]",
    ),
    "up's gradient not written, by pointers": ("tl.store(to + d_ff, dup, mask=mask)", "pass"),
    "gate read for up in backward by descriptors": (
        "up = gate_up_desc.load([row, 1, col])",
        "up = gate_up_desc.load([row, 0, col])",
    ),
    "gate read for up in backward by pointers": ("tl.load(halves + d_ff, mask", "tl.load(halves, mask"),
    "activation's result written again without the gate": ("hidden = (silu * up).to(", "hidden = up.to("),
    "activation's result written again a row too low, by descriptors": (
        "hidden_desc.store([row, col], hidden)",
        "hidden_desc.store([row + 1, col], hidden)",
    ),
    "activation's result not written again, by pointers": (
        "tl.store(hidden_ptr + row.to(tl.int64) * d_ff + col + rows * d_ff + cols, hidden, mask=mask)",
        "pass",
    ),
    "input's gradient of the gate alone": (
        "(dgate_up @ gate_up_weight)",
        "(dgate_up[:, : hidden.shape[1]] @ gate_up_weight[: hidden.shape[1]])",
    ),
    "weight's gradient 2 % too large": (
        "_summed_over_rows(dgate_up, as_rows(x))",
        "_summed_over_rows(1.02 * dgate_up, as_rows(x))",
    ),
    "weight's gradient without the last row": (
        "_summed_over_rows(dy_rows, hidden)",
        "_summed_over_rows(dy_rows[:-1], hidden[:-1])",
    ),
    "input taken for contiguous": (
        "_activate(as_rows(x).contiguous(),",
        "_activate(x.as_strided(as_rows(x).shape, (x.shape[-1], 1)),",
    ),
    "arriving gradient overwritten": (
        "rewritten = _activation_gradient(dy_rows,",
        "rewritten = _activation_gradient(dy_rows.mul_(2),",
    ),
}

# Planted into the kernels for Hopper, which no interpreter runs. None of them keeps a warp waiting for ever.
HOPPER_BUGS = {
    "sigmoid for silu": ("return (wide * _sigmoid(wide) * up", "return (_sigmoid(wide) * up"),
    "sigmoid 2 % too large": ("inverse = 1.0 + gl.exp2(", "inverse = 0.98 + gl.exp2("),
    "gate and up exchanged": ("gates, ups = rounded", "ups, gates = rounded"),
    "halves of the gate exchanged": ("first_gate, second_gate = gates", "second_gate, first_gate = gates"),
    "up's weight taken from the gate's": (
        "tma.async_copy_global_to_shared(weight_desc, [d_ff + col, start]",
        "tma.async_copy_global_to_shared(weight_desc, [col, start]",
    ),
    "up stored over the gate": (
        "send(first_up, gate_up_desc, top, d_ff + col,",
        "send(first_up, gate_up_desc, top, col,",
    ),
    "a second half of hidden units over the first": ("col = at[2] + _P", "col = at[2]"),
    "both groups at the same rows of x, in a tile's first steps": (
        "i > 0, _P, 2 * _M, STAGES, WHICH)",
        "i > 0, _P, 2 * _M, STAGES, 0)",
    ),
    "both groups at the same rows of x, in its later steps": (
        "start > 0, _P, 2 * _M, STAGES, WHICH)",
        "start > 0, _P, 2 * _M, STAGES, 0)",
    ),
    "the last tile's second half not stored": (
        "        if some:\n            _send_late(",
        "        if top < 0:\n            _send_late(",
    ),
    "up's second half over the gate's": (
        "send(late[1], gate_up_desc, at[1], d_ff + col,",
        "send(late[1], gate_up_desc, at[1], col,",
    ),
    "both groups store the same rows": ("    top = row + WHICH * _P\n", "    top = row\n"),
    "lower rows of dy taken from the upper": ("dy.slice(_P, _P, dim=0)", "dy.slice(0, _P, dim=0)"),
    "derivative of the sigmoid left out": ("(silu * (1.0 - sigmoid) + sigmoid)", "sigmoid"),
    "derivative with the wrong sign": ("(silu * (1.0 - sigmoid) + sigmoid)", "(sigmoid - silu * (1.0 - sigmoid))"),
    "gate's gradient without up": ("dgate = arriving * up * ", "dgate = arriving * "),
    "up's gradient from the sigmoid": ("dup = arriving * silu", "dup = arriving * sigmoid"),
    "up's gradient over the gate's": ("[top, d_ff + left], up_buffer)", "[top, left], up_buffer)"),
    "gate read for up": ("up = up_buffer.load(layout)", "up = gate_buffer.load(layout)"),
    "quarters exchanged": ("_differentiate(third, dgate_up_desc,", "_differentiate(fourth, dgate_up_desc,"),
    "activation's result written again without the gate": (".store((silu * up).to(", ".store(up.to("),
    "activation's result written again in the upper rows alone": (
        "tma.async_copy_shared_to_global(hidden_desc, [top, left],",
        "tma.async_copy_shared_to_global(hidden_desc, [row, left],",
    ),
    "rows of tiles in a group too many": (
        "gl.minimum(gl.cdiv(n_rows, _M) - group * _GROUP_ROWS, _GROUP_ROWS)",
        "_GROUP_ROWS",
    ),
    "columns of tiles counted as rows": ("in_group // height * _M", "in_group % height * _M"),
}
