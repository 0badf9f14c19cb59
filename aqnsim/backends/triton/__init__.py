"""Kernels in Triton: the twins of ``csrc/core``, bit-equal to ``aqnsim.reference``.

They serve CUDA tensors. With ``TRITON_INTERPRET=1`` in the environment before the first import, Triton's interpreter
runs them, on CPU tensors too: slowly, to test them without a GPU.
"""
