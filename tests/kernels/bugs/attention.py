"""Bugs planted into the Triton `attention`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "future visible by one": (
        "scores = tl.where(rows[:, None] >= cols[None, :]",
        "scores = tl.where(rows[:, None] + 1 >= cols[None, :]",
    ),
    "diagonal hidden": (
        "scores = tl.where(rows[:, None] >= cols[None, :]",
        "scores = tl.where((rows[:, None] > cols[None, :]) | (cols[None, :] == 0)",
    ),
    "scale 2 % too small": ('"SCALE": head_dim**-0.5 * _LOG2_E', '"SCALE": 0.98 * head_dim**-0.5 * _LOG2_E'),
    "sum not rescaled": ("total = total * rescale +", "total = total +"),
    "accumulator not rescaled": ("acc * rescale[:, None]", "acc"),
    "not divided by the sum": ("acc / total[:, None]", "acc"),
    "queries one position late": (
        "    q = load_tile(q_ptr, rows, q_seq, dims, seq, HEAD_DIM, EVEN)\n\n",
        "    q = load_tile(q_ptr, rows + 1, q_seq, dims, seq, HEAD_DIM, EVEN)\n\n",
    ),
    "one key head for all": (
        "KV_HEADS: tl.constexpr = HEADS // GROUP",
        "KV_HEADS: tl.constexpr = HEADS // GROUP\n    k_head = 0",
    ),
    "delta left out of the keys' gradient": ("(dp - delta[None, :])", "dp"),
    "delta left out of the queries' gradient": ("(dp - delta[:, None])", "dp"),
    "keys' gradient without the scale": ("dk * (SCALE * 0.6931471805599453)", "dk"),
    "queries' gradient 2 % too large": (
        "dq * (SCALE * 0.6931471805599453)",
        "dq * (1.02 * SCALE * 0.6931471805599453)",
    ),
    "backward unmasked": ("p = tl.where(rows[None, :] >= cols[:, None], p, 0.0)", "p = p"),
    "only one head of a group": ("for member in range(GROUP):", "for member in range(1):"),
    "values' gradient in place of the keys'": ("store_tile(dk_ptr + out, dk * (", "store_tile(dk_ptr + out, dv * ("),
    "last block of keys left out": (
        "attention_triton_bwd_kv_kernel[(triton.cdiv(seq, for_keys.rows),",
        "attention_triton_bwd_kv_kernel[(max(1, triton.cdiv(seq, for_keys.rows) - 1),",
    ),
    "queries overwritten": (
        "    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)\n    lse",
        "    out = q.mul_(1.0001)\n    lse",
    ),
}
