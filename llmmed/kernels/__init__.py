"""Kernels: one folder an operation, one file an implementation.

`base` says what an operation and an implementation are, `catalog` finds them, `operator` turns a forward and a backward
function into a PyTorch operator. Every other name here is the folder of an operation.
"""
