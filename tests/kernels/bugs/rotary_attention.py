"""Bugs planted into the Triton `rotary_attention`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "halves swapped": ("(first * cos - second * sin).to(y.", "(second * cos - first * sin).to(y."),
    "rotated the other way": (
        "    table = positions[:, None] * HALF + cols\n    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)\n"
        "    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)",
        "    table = positions[:, None] * HALF + cols\n    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)\n"
        "    sin = -tl.load(sin_ptr + table, mask=mask, other=0.0)",
    ),
    "keys not rotated": (
        "_rotate(k, k_rot, rows < n_rows, position, cos_ptr",
        "_rotate(k, k_rot, rows < n_rows, position * 0, cos_ptr",
    ),
    "keys rotated by the position in the batch": (
        "_rotate(k, k_rot, rows < n_rows, position, cos_ptr",
        "_rotate(k, k_rot, rows < n_rows, (rows // (2 * KV_HEADS)), cos_ptr",
    ),
    "last key not rotated": ("_rotate(k, k_rot, rows < n_rows,", "_rotate(k, k_rot, rows < n_rows - 1,"),
    "queries one position late": (
        "rows < seq, rows, cos_ptr, sin_ptr, HEAD_DIM, BLOCK_D)\n    # Read",
        "rows < seq, tl.minimum(rows + 1, seq - 1), cos_ptr, sin_ptr, HEAD_DIM, BLOCK_D)\n    # Read",
    ),
    "gradients turned the same way": (
        "(first * cos + second * sin).to(ptr.dtype.element_ty), mask=mask)\n"
        "    tl.store(to + HALF, (second * cos - first * sin)",
        "(first * cos - second * sin).to(ptr.dtype.element_ty), mask=mask)\n"
        "    tl.store(to + HALF, (second * cos + first * sin)",
    ),
    "keys' gradient not turned back": (
        "    _store_turned_back(dk_ptr + to, dk * (SCALE * 0.6931471805599453), cols, ROW,\n"
        "                       cos_ptr, sin_ptr, seq, HEAD_DIM, BLOCK_D)",
        "    store_tile(dk_ptr + to, dk * (SCALE * 0.6931471805599453), cols, ROW, dims, seq, HEAD_DIM)",
    ),
    "halves of a gradient not taken apart": (
        "(tile.shape[0], 2, BLOCK_HALF)), (0, 2, 1))",
        "(tile.shape[0], BLOCK_HALF, 2)), (0, 1, 2))",
    ),
    "gradients of keys and values in each other's place": ("dq, dk, dv = _split(dqkv", "dq, dv, dk = _split(dqkv"),
    "values read as keys": (
        "v_ptr += batch * x_batch + kv_head * x_head",
        "v_ptr += batch * x_batch + kv_head * x_head - HEADS // GROUP * x_head",
    ),
    "row of the gradient without the keys": (
        "ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM\n    to =",
        "ROW: tl.constexpr = (HEADS + KV_HEADS) * HEAD_DIM\n    to =",
    ),
    "last block of queries stale": (
        "rotary_attention_triton_bwd_q_kernel[(triton.cdiv(seq, for_queries.rows),",
        "rotary_attention_triton_bwd_q_kernel[(max(1, triton.cdiv(seq, for_queries.rows) - 1),",
    ),
    "last block of keys stale": (
        "rotary_attention_triton_bwd_kv_kernel[(triton.cdiv(seq, for_keys.rows),",
        "rotary_attention_triton_bwd_kv_kernel[(max(1, triton.cdiv(seq, for_keys.rows) - 1),",
    ),
    "one key head for all": (
        "k_rot_ptr += (batch * (HEADS // GROUP) + kv_head) * seq",
        "k_rot_ptr += batch * (HEADS // GROUP) * seq",
    ),
    "groups interleaved": ("head = kv_head * GROUP + member", "head = kv_head + member * KV_HEADS"),
    "only one head of a group": ("for member in range(GROUP):", "for member in range(1):"),
    "future visible by one": (
        "BLOCK_D, x_seq, rows, diagonal,\n",
        "BLOCK_D, x_seq, rows + 1, diagonal,\n",
    ),
    "future visible by one in backward": (
        "BLOCK_D, v_seq, rows, diagonal,\n",
        "BLOCK_D, v_seq, rows + 1, diagonal,\n",
    ),
    "scale 2 % too small": (
        "    constants = kernel_constants(q, k, launch)\n",
        '    constants = kernel_constants(q, k, launch)\n    constants["SCALE"] *= 0.98\n',
    ),
    "queries' gradient 2 % too large": (
        "dq * (SCALE * 0.6931471805599453)",
        "dq * (1.02 * SCALE * 0.6931471805599453)",
    ),
    "keys' gradient without the scale": ("dk * (SCALE * 0.6931471805599453)", "dk"),
    "delta of half of the head": (
        "tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)",
        "tl.sum(tl.where((dims < HEAD_DIM // 2)[None, :], out.to(tl.float32) * dout.to(tl.float32), 0.0), axis=1)",
    ),
    "projection overwritten": (
        "    q_rot = k_rot.new_empty(",
        "    qkv.mul_(1.0001)\n    q_rot = k_rot.new_empty(",
    ),
}
