"""Kernels for the CPU, written in Python and compiled to machine code for this machine."""
