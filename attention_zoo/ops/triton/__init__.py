"""Our own kernels, for what no library computes: one operation a file, forward and backward, in Triton.

Nothing here is imported before a kernel is wanted: Triton is an optional part of PyTorch's installation. A kernel is reached
through its operation in `ops` only, whose plain PyTorch code is its specification. On a CPU the kernels run under
TRITON_INTERPRET=1.
"""
