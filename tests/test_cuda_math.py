"""Functions of math.cuh against the reference and the CPU's, over bit patterns of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.shim import ShimDevice
from edgeinfer.kernels.reference import functions
from edgeinfer.kernels.reference.quantised import Quantised
from tests.cuda_shim import Floats, run, same_bits, step
from tests.shim import shim

PROBE = """
#include "math.cuh"
// Variants: FUNCTION = exp tanh silu gelu sigmoid softplus relu2 soft_cap order
enum Function { exp, tanh, silu, gelu, sigmoid, softplus, relu2, soft_cap, order };
EI_KERNEL(32) probe(const Step* step, const float* x, float* out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) {
        out[i] = FUNCTION == exp ? ei_exp(x[i])
            : FUNCTION == tanh ? ei_tanh(x[i])
            : FUNCTION == silu ? ei_silu(x[i])
            : FUNCTION == gelu ? ei_gelu(x[i])
            : FUNCTION == sigmoid ? ei_sigmoid(x[i])
            : FUNCTION == softplus ? ei_softplus(x[i])
            : FUNCTION == relu2 ? ei_relu2(x[i])
            : FUNCTION == soft_cap ? ei_soft_cap(x[i], 0.7f)
            : __int_as_float(ei_order(x[i]));
    }
}
"""
SINCOS = """
#include "math.cuh"
EI_KERNEL(32) probe_sincos(const Step* step, const double* x, double2* out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) {
        ei_sincos(x[i], &out[i].x, &out[i].y);
    }
}
"""
LAW: dict[str, Callable[[Floats], Floats]] = {
    "exp": functions.exp,
    "tanh": functions.tanh,
    "silu": functions.silu,
    "gelu": functions.gelu,
    "sigmoid": functions.sigmoid,
    "softplus": functions.softplus,
    "relu2": functions.relu2,
    "soft_cap": lambda x: Quantised().soft_cap(x, 0.7),
}
# Borders of ranges, zeros, infinities, the smallest and the largest, and their neighbours.
CORNERS = [
    0.0, 0.625, 87.3, 88.3, 126.0, 127.0, 20.0, 9.0, 1.0, 0.5, 1e-30, 1e-38, 1e-40, 1.4e-45,
    1.17549435e-38, 3.4028235e38, np.inf, np.nan, 43.65, 44.15, 0.34657359, 1e-4, 2**-12, 2**-24,
]  # fmt: skip


def samples(n: int) -> Floats:
    """Corners, any bits, and numbers of every size that functions are interesting at."""
    rng = np.random.default_rng(0)
    corners = np.array(CORNERS, np.float32)
    with np.errstate(all="ignore"):
        near = [np.nextafter(corners, np.float32(to)) for to in (-np.inf, np.inf)]
    bits = rng.integers(0, 1 << 32, n, np.uint64).astype(np.uint32).view(np.float32)
    usual = rng.standard_normal(n) * 10 ** rng.uniform(-6, 2, n), np.linspace(-100, 100, n)
    x = np.concatenate([corners, *near, bits, *(each.astype(np.float32) for each in usual)])
    return np.concatenate([x, -x])


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> ShimDevice:
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probe.cu").write_text(PROBE)
    (folder / "probe_sincos.cu").write_text(SINCOS)
    return shim(sources=[folder])


def probed(device: ShimDevice, function: str, x: Floats) -> Floats:
    out = np.empty_like(x)
    kernel = Kernel.of("probe", FUNCTION=function)
    run(kernel, (1,), 32, device=device, step=step(1), x=x, out=out, n=len(x))
    return out


@pytest.mark.parametrize("function", LAW)
def test_functions_are_the_references(function: str, device: ShimDevice) -> None:
    x = samples(50_000)
    with np.errstate(all="ignore"):
        expected = LAW[function](x)
    same_bits(probed(device, function, x), expected)


def test_order_is_that_of_floats(device: ShimDevice) -> None:
    x = samples(2_000)
    order = probed(device, "order", x).view(np.int32)
    x = np.where(np.isnan(x), np.float32(-np.inf), x)
    places = np.argsort(x)
    x, order = x[places], order[places]
    assert (order > np.iinfo(np.int32).min).all()
    np.testing.assert_array_equal(order[1:] > order[:-1], x[1:] > x[:-1])
    assert (order[1:] >= order[:-1]).all()


def test_sine_and_cosine_are_the_cpus(device: ShimDevice) -> None:
    from edgeinfer.kernels.cpu.native.math import sincos

    rng = np.random.default_rng(0)
    n = 30_000
    x = np.concatenate([
        [0.0, -0.0, 1e-300, 1e-9, np.pi / 4, np.pi / 2, 355.0, 1e9],
        rng.integers(0, 10**6, n) * rng.uniform(0, 1, n), 10 ** rng.uniform(-3, 13, n),
        np.arange(1, n) * (np.pi / 4), -rng.uniform(0, 1e5, n),
    ])  # fmt: skip
    out = np.empty((len(x), 2))
    run(Kernel("probe_sincos"), (1,), 32, device=device, step=step(1), x=x, out=out, n=len(x))
    expected = np.array([sincos(each) for each in x.tolist()])
    same_bits(out, expected)
