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
    "groups interleaved": (
        "head = kv_head * GROUP + member\n        statistics",
        "head = kv_head + member * KV_HEADS\n        statistics",
    ),
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
        "**kernel_constants(q, k, launch),",
        '**(kernel_constants(q, k, launch) | {"SCALE": 0.98 * q.shape[3] ** -0.5 * 1.4426950408889634}),',
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

# Planted into the kernels for Hopper, which no interpreter runs. None of them keeps a warp waiting for ever.
HOPPER_BUGS = {
    "queries rotated the other way": (
        "gl.join(first * cos - second * sin, second * cos + first * sin)",
        "gl.join(first * cos + second * sin, second * cos - first * sin)",
    ),
    "halves of a query exchanged": (
        "gl.join(first * cos - second * sin, second * cos + first * sin)",
        "gl.join(second * cos + first * sin, first * cos - second * sin)",
    ),
    "queries rotated by their position in the block": (
        "rotation(next_block * _B + WHICH * _H,",
        "rotation(WHICH * _H,",
    ),
    "a program's first queries rotated as the first of all": (
        "rotation(gl.program_id(0) % pairs * _B + WHICH * _H,",
        "rotation(WHICH * _H,",
    ),
    "queries rotated as those of the next pair": (
        "next_block = gl.where(block < partner, partner,",
        "next_block = gl.where(block < 0, partner,",
    ),
    "queries of the next task rotated as those of this one": (
        "(task + gl.num_programs(0)) % pairs)",
        "task % pairs)",
    ),
    "rotated queries kept for another sequence": (
        "tma.async_copy_shared_to_global(q_rot_desc, [sequence * seq + row, 0], q)",
        "tma.async_copy_shared_to_global(q_rot_desc, [row, 0], q)",
    ),
    "one key of the future": (
        "gl.where(rows[:, None] >= cols[None, :], scores,",
        "gl.where(rows[:, None] + 1 >= cols[None, :], scores,",
    ),
    "own key left out": (
        "gl.where(rows[:, None] >= cols[None, :], scores,",
        "gl.where((rows[:, None] > cols[None, :]) | (cols[None, :] == 0), scores,",
    ),
    "sum of weights not rescaled": ("total = total * rescale + gl.sum(p, axis=1)", "total = total + gl.sum(p, axis=1)"),
    "output not rescaled": ("acc *= gl.convert_layout(rescale,", "acc *= gl.convert_layout(rescale * 0 + 1,"),
    "output 2 % too large": ("gl.convert_layout(1.0 / total,", "gl.convert_layout(1.02 / total,"),
    "statistics in natural logarithms": ("peak + gl.log2(total)", "peak + gl.log(total)"),
    "both groups store the same rows": (
        "at = sequence // HEADS * seq + row\n",
        "at = sequence // HEADS * seq + block * _B\n",
    ),
    "output of the first head": ("store_head(out_desc, at, sequence % HEADS,", "store_head(out_desc, at, 0,"),
    "keys of another group": (
        "sequence // HEADS, sequence % HEADS\n        kv_head = head // GROUP\n",
        "sequence // HEADS, sequence % HEADS\n        kv_head = head % KV_HEADS\n",
    ),
    "keys for values": (
        "fetch_head(v_desc, batch * seq + start, HEADS + KV_HEADS + kv_head,",
        "fetch_head(v_desc, batch * seq + start, HEADS + kv_head,",
    ),
    "last block of a pair left out": ("gl.maximum(seq // _B - 1 - 2 * pair, 1)", "gl.maximum(seq // _B - 2 * pair, 1)"),
    "delta left out for the queries": ("(p * (dp - delta[:, None]))", "(p * dp)"),
    "delta not handed over to the keys": (
        "gl.store(delta_ptr + statistics, delta)",
        "gl.store(delta_ptr + statistics, lse)",
    ),
    "queries' gradient sees the future": (
        "p = gl.where(rows[:, None] >= cols[None, :], p, 0.0)",
        "p = gl.where(rows[:, None] >= 0 * cols[None, :], p, 0.0)",
    ),
    "queries' gradient turned back by its position in the block": (
        "if TABLES_FIRST:\n                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dq",
        "if TABLES_FIRST:\n                cos, sin = rotation(WHICH * _H, cos_ptr, sin_ptr, dq",
    ),
    "queries' gradient turned back by its position in the block, wide heads": (
        "if not TABLES_FIRST:\n                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dq",
        "if not TABLES_FIRST:\n                cos, sin = rotation(WHICH * _H, cos_ptr, sin_ptr, dq",
    ),
    "keys' gradient turned back by its position in the block": (
        "if TABLES_FIRST:\n                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dk",
        "if TABLES_FIRST:\n                cos, sin = rotation(WHICH * _H, cos_ptr, sin_ptr, dk",
    ),
    "keys' gradient turned back by its position in the block, wide heads": (
        "if not TABLES_FIRST:\n                cos, sin = rotation(first + WHICH * _H, cos_ptr, sin_ptr, dk",
        "if not TABLES_FIRST:\n                cos, sin = rotation(WHICH * _H, cos_ptr, sin_ptr, dk",
    ),
    "queries' gradient in powers of two": ("_turned_back(acc * (SCALE * _LN_2),", "_turned_back(acc * SCALE,"),
    "gradients turned the same way": (
        "return first * cos + second * sin, second * cos - first * sin",
        "return first * cos - second * sin, second * cos + first * sin",
    ),
    "delta left out for the keys": (
        "gl.zeros((_H, _H), gl.float32, layout) - delta_tiles",
        "gl.zeros((_H, _H), gl.float32, layout) - 0 * delta_tiles",
    ),
    "weights of the keys 2 % off": ("p = gl.exp2(scores * SCALE)", "p = 1.02 * gl.exp2(scores * SCALE)"),
    "keys' gradient from the past": (
        "gl.where(_opaque(gl.arange(0, _H, along))[None, :] >=",
        "gl.where(_opaque(gl.arange(0, _H, along))[None, :] >= 0 *",
    ),
    "values' gradient over the keys'": (
        "_send(first_half, second_half, dqkv_desc, at, head + KV_HEADS, v_tiles.index(kv_slot), D)",
        "_send(first_half, second_half, dqkv_desc, at, head, v_tiles.index(kv_slot), D)",
    ),
    "keys of the block before": (
        "kv_slot, _ = place(_opaque(turn), WHICH, 2)",
        "kv_slot, _ = place(_opaque(turn) + 1, WHICH, 2)",
    ),
    "the group's first head alone": (
        "for member in range(0, GROUP):\n                head = kv_head * GROUP + member\n",
        "for member in range(0, GROUP):\n                head = kv_head * GROUP\n",
    ),
    "halves of a gradient exchanged": (
        "tma.async_copy_shared_to_global(desc, [row, head * D], upper)",
        "tma.async_copy_shared_to_global(desc, [row, head * D], lower)",
    ),
    "halves of the second head are those of the first": (
        "desc, [2 * head, row, 0], bar,",
        "desc, [head, row, 0], bar,",
    ),
    "halves of the second head stored over the first": (
        "desc, [2 * head, row, 0], halves",
        "desc, [head, row, 0], halves",
    ),
    "a narrow head rotated by the angles of a wide one": (
        "positions[:, None] * (HEAD_DIM // 2) + cols",
        "positions[:, None] * (D // 2) + cols",
    ),
}
