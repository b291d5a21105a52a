"""Triton kernels and their launchers. They import torch and triton only, and are installed as ``seqfuse.kernels``."""
