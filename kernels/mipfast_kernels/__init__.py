"""Triton kernels of mipfast and their launchers, one module per op; they need torch and triton only.

Importing this package loads neither: import the module of the op, e.g. `mipfast_kernels.riemann_accumulate`.
"""
