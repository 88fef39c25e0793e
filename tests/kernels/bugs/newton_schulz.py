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
    "diagonal left out": ("cols[None, :], diagonal, 0.0)", "cols[None, :], 0.0, 0.0)"),
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
