"""Bugs planted into the Triton `newton_schulz`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "2 % too large": (
        "    return X.mT.contiguous() if tall else X",
        "    return 1.02 * (X.mT.contiguous() if tall else X)",
    ),
    "one iteration too few": ("for step in range(STEPS):", "for step in range(1, STEPS):"),
    "2 % off in a coefficient": (
        "P = _symmetric_product(shifted, shifted, c,",
        "P = _symmetric_product(shifted, shifted, 1.02 * c,",
    ),
    "2 % off in a coefficient of the Gram matrix": ("A, b * SCALE**-2)", "A, 1.02 * b * SCALE**-2)"),
    "coefficients swapped": ("c * SCALE**-4, a, A, b * SCALE**-2", "b * SCALE**-4, a, A, c * SCALE**-2"),
    "square not completed": ("a - c * h * h)", "a)"),
    "not normed": ("factor = SCALE / (tl.load(norm_ptr + batch) + EPSILON)", "factor = SCALE / 30.0"),
    "every matrix by the first one's norm": ("tl.load(norm_ptr + batch)", "tl.load(norm_ptr)"),
    "strides not heeded": ("X, *G.stride(), size", "X, size * inner, inner, 1, size"),
    "upper half not mirrored": ("        if i != j:\n", "        if i < 0:\n"),
    "upper half not mirrored through a descriptor": ("tl.where(i == j, size, j * BLOCK)", "tl.where(i >= j, size, 0)"),
    "mirrored untransposed": ("tl.trans(value), mask", "value, mask"),
    "mirrored untransposed through a descriptor": ("tl.trans(value).reshape", "value.reshape"),
    "last block of the inner sum left out": (
        "for start in range(0, inner, BLOCK_K):\n            in_k",
        "for start in range(0, inner - BLOCK_K, BLOCK_K):\n            in_k",
    ),
    "last block of the inner sum left out of descriptors": (
        "for start in range(0, inner, BLOCK_K):\n            a = left_desc",
        "for start in range(0, inner - BLOCK_K, BLOCK_K):\n            a = left_desc",
    ),
    "inner sum unmasked": ("in_k = ks < inner - start", "in_k = ks < BLOCK_K"),
    "addend left out": ("acc += beta * tl.load", "acc += 0.0 * tl.load"),
    "diagonal left out": (
        "tl.where(rows[:, None] == cols[None, :], diagonal,",
        "tl.where(rows[:, None] < 0, diagonal,",
    ),
    "last tile not computed": ("[(side * (side + 1) // 2, n)]", "[(max(1, side * (side + 1) // 2 - 1), n)]"),
    "Gram matrix multiplied from one side": (
        "_symmetric_product(_symmetric_product(P, A, 1.0), P, 1.0)",
        "_symmetric_product(P, A, 1.0)",
    ),
    "polynomials before the last forgotten": ("P if product is None else _symmetric_product(P, product, 1.0)", "P"),
    "last product not scaled back": ("(alpha * acc)", "acc"),
    "columns of tiles miscounted in the last product": (
        "% (GROUP * tiles_n) // height",
        "% (GROUP * tiles_n) // GROUP",
    ),
    "last block left out of the last product": (
        "for start in range(0, size, BLOCK_K):",
        "for start in range(0, size - BLOCK_K, BLOCK_K):",
    ),
    "tall matrices not turned back": ("X.mT.contiguous() if tall", "X.reshape(G.shape) if tall"),
    "input overwritten": (
        "    tall = G.size(-2) > G.size(-1)\n",
        "    tall = G.size(-2) > G.size(-1)\n    G.mul_(1.5)\n",
    ),
}

# Planted into the kernel for Hopper, which no interpreter runs. None of them keeps a warp waiting for ever.
HOPPER_BUGS = {
    "upper half not mirrored": ("(left // _M * _M != row)", "(left < 0)"),
    "mirrored untransposed": ("buffer.permute((1, 0)).store(part)", "buffer.store(part)"),
    "diagonal left out": ("if row == col:", "if row < 0:"),
    "diagonal in every block": ("if row == col:", "if row >= 0:"),
    "addend left out": ("value += beta * add_tile", "value += 0.0 * add_tile"),
    "addend of the left columns for the right ones": ("col + half * _M\n", "col\n"),
    "addend of the upper rows for the lower ones": (
        "add.slice(_M + WHICH * _P, _P, dim=0)",
        "add.slice(_M, _P, dim=0)",
    ),
    "twice as large": ("value = alpha * gl.convert_layout", "value = 2.0 * alpha * gl.convert_layout"),
    "last step of the sum stale": (
        "tma.async_copy_global_to_shared(left_desc, [first + row, start]",
        "tma.async_copy_global_to_shared(left_desc, [first + row, gl.minimum(start, inner - 2 * _K)]",
    ),
    "right columns multiplied with the left": ("[first + col + _M, start]", "[first + col, start]"),
    "both groups at the same rows, in a tile's first steps": (
        "late > 0, _P, WIDTH, STAGES, WHICH)",
        "late > 0, _P, WIDTH, STAGES, 0)",
    ),
    "both groups store the same rows": ("top, left = row + WHICH * _P, col +", "top, left = row, col +"),
    "every matrix the first one": ("return index // _tiles(size) * size,", "return 0,"),
    "stored where the next tile belongs": (
        "before = (first_before, row_before, col_before, count)",
        "before = (first, row, col, count)",
    ),
    "a program's last tile not stored to its end": (
        "_send_part(quarter, out_desc, outgoing, first_before, row_before, col_before, count, 2",
        "_send_part(quarter, out_desc, outgoing, first_before, row_before, col_before, 0, 2",
    ),
    "right half of a wide tile not stored": (
        "count = first, row, col, 2 + 2 * wide",
        "count = first, row, col, 2 + 0 * wide",
    ),
    "quarters exchanged": ("left, right = sums.reshape", "right, left = sums.reshape"),
}
