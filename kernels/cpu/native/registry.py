"""Kernels by name: `module.parameter.parameter`, made by the `make` function of that module.

Knows the modules, not what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from edgeinfer.kernels.cpu.native import isa
from edgeinfer.kernels.cpu.native.isa_aarch64 import NEON

FAMILIES = {**isa.FAMILIES, NEON.name: NEON}


def make(name: str, family: str) -> Callable[..., None]:
    """The Python function of kernel `name` over the vocabulary of `family`, ready for Numba."""
    module, *parameters = name.split(".")
    factory = import_module(f"edgeinfer.kernels.cpu.native.{module}")
    kernel: Callable[..., None] = factory.make(FAMILIES[family], *parameters)
    return kernel
