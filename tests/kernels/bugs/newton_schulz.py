"""Bugs planted into the Triton `newton_schulz`: name -> (text that occurs once, what stands there instead)."""

BUGS = {
    "2 % too large": ("    return X\n\n\n_operator", "    return X * 1.02\n\n\n_operator"),
    "one iteration too few": ("for _ in range(STEPS):", "for _ in range(STEPS - 1):"),
    "2 % off in a coefficient": ("B = _symmetric_product(A, A, c, b)", "B = _symmetric_product(A, A, 1.02 * c, b)"),
    "coefficients swapped": ("B = _symmetric_product(A, A, c, b)", "B = _symmetric_product(A, A, b, c)"),
    "not normed": ("(G / (norm + EPSILON))", "(G / (norm * 0 + 30.0))"),
    "norm over all matrices": (
        "dim=(-2, -1), keepdim=True, dtype=torch.float32)",
        "dim=(0, -2, -1), keepdim=True, dtype=torch.float32)",
    ),
    "upper half not mirrored": ("    if i != j:\n", "    if i < 0:\n"),
    "mirrored untransposed": ("tl.trans(value), mask", "value, mask"),
    "last block of the inner sum left out": (
        "for start in range(0, inner, BLOCK_K):",
        "for start in range(0, inner - BLOCK_K, BLOCK_K):",
    ),
    "inner sum unmasked": ("in_k = ks < inner - start", "in_k = ks < BLOCK_K"),
    "addend left out": ("    if BETA != 0.0:\n", "    if BETA > 0.0:\n"),
    "last tile not computed": ("[(side * (side + 1) // 2, n)]", "[(max(1, side * (side + 1) // 2 - 1), n)]"),
    "tall matrices multiplied from the wrong side": (
        "torch.baddbmm(X, X, B, beta=a) if tall",
        "torch.baddbmm(X, X, B.flip(-1), beta=a) if tall",
    ),
    "input overwritten": (
        "    tall = G.size(-2) > G.size(-1)\n",
        "    tall = G.size(-2) > G.size(-1)\n    G.mul_(1.5)\n",
    ),
}
