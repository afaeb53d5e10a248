"""Steps of one row take fewer kernels, and have the bits of steps of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer import quant
from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.backend import CudaBackend
from edgeinfer.kernels.cuda.program import CudaProgram
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model

from .backends import IDS, LIMITS, batch_of
from .models_for_tests import tiny_model
from .random_graphs import RandomGraph
from .test_cuda_program import backend, cuda

BESIDE_LAYERS = ("embed", "angles", "rms_norm", "quantise")


def kernels(program: CudaProgram, n_rows: int) -> list[str]:
    """What a step launches, by name."""
    launches = program._lowered.launches
    return [each.kernel.name for each in launches if each.takes(n_rows)]


@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (True, dict(quant="Q4_0")),
        (True, dict(quant="Q4_K_M", n_layers=3)),  # v of another type than q and k
        (True, dict(quant="Q8_0", arch="qwen2", bias=True)),
        (True, dict(quant="Q6_K", tied=True)),
        (False, dict(quant="F16")),
    ],
    ids=lambda each: each if isinstance(each, bool) else each["quant"],
)
def test_one_row_has_the_bits_of_many(tmp_path: Path, fused: bool, options: Any) -> None:
    path = tiny_model(tmp_path, **options)
    with GGUFFile.open(path) as file:
        segment = Model.load(file).graph.segment()
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as reference:
            expected = reference.submit(batch_of(IDS)).wait().logits
        with cuda(segment) as program:
            rows = [program.submit(batch_of(IDS[:2])).wait().logits.copy()]
            for i in range(2, len(IDS)):
                rows.append(program.submit(batch_of(IDS[i : i + 1], i)).wait().logits.copy())
            one, two = kernels(program, 1), kernels(program, 2)
    np.testing.assert_array_equal(np.concatenate(rows), expected)
    n_layers = options.get("n_layers", 2)
    assert one.count("norm_swiglu") == n_layers * fused
    assert ("norm_matmul" in one) == fused and "norm_matmul" not in two
    if fused:  # norms apart only before the head, and of several rows, and quantises with them
        assert [one.count(name) for name in ("rms_norm", "quantise", "pointwise")] == [1, 0, 0]
        assert two.count("rms_norm") == 1 + 2 * n_layers
        of_layers = [name.removeprefix("norm_") for name in one if name not in BESIDE_LAYERS]
        dense = ["matmul", "attend", "matmul", "swiglu", "matmul"]
        assert of_layers == [*dense * n_layers, "matmul"]  # the last is the head


@pytest.mark.parametrize(
    ("kinds", "n_kernels"),
    [
        (["Q4_0"] * 4, 2),  # three of a type, and one
        (["Q4_0", "Q8_0", "Q4_0", "Q8_0", "Q4_0", "Q8_0"], 2),
        (["Q4_0", "Q8_0", "Q4_1", "Q4_0"], 2),  # two of a type with one of another
        (["Q4_0", "Q8_0"], 2),
    ],
)
def test_one_norm_may_have_any_products(kinds: list[str], n_kernels: int) -> None:
    g = RandomGraph(1)
    x = g.embed()
    for _ in g.layers():
        h = g.rms_norm(x, "norm")
        products = []
        for i, kind in enumerate(kinds):
            g._types = (kind,)
            products.append(g.linear(h, f"product{i}", 32))
        for product in products:
            x = x + g.activation("gelu", product)
        x = g.layer_output(x)
    g.head(g.select_rows(x))
    rows = []
    for machine in (backend(), ReferenceBackend()):
        mode = {} if isinstance(machine, CudaBackend) else {"mode": "quantised"}
        with machine.compile(g.segment(), LIMITS._replace(n_pages={}), **mode) as program:
            steps = [batch_of([3, 14, 15], n_groups=0), batch_of([9], 3, n_groups=0)]
            rows.append(np.concatenate([program.submit(each).wait().logits for each in steps]))
            if isinstance(program, CudaProgram):
                assert kernels(program, 1).count("norm_matmul") == n_kernels
    np.testing.assert_array_equal(rows[0], rows[1])


def test_a_row_of_a_large_model_fits_into_shared_memory() -> None:
    assert tiles.normed_bytes([quant.Q4_K, quant.Q6_K], 4096, 4, 1) < 32 << 10
    assert tiles.normed_bytes([quant.Q4_K], 8192, 4, 1) < 48 << 10
