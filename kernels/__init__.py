"""The Triton kernels, installed as fastmt.kernels."""
