"""The bits of logits: those of every tensor type stay what they were, and are the reference's.

A change that means to change bits changes `HASHES`, and says why.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeinfer.gguf import GGUFFile
from edgeinfer.kernels.reference import ReferenceBackend
from edgeinfer.model import Model

from .models_for_tests import tiny_model
from .test_cpu_program import IDS, LIMITS, batch_of, cpu, logits

HASHES = {
    "F32": "5168de4dc7d92095",
    "F16": "e3ffc8a056342422",
    "BF16": "3014dd5eed0b1a46",
    "Q4_0": "202041e6dad848bf",
    "Q4_1": "6b70fac213fc107c",
    "Q5_0": "a7eb2781796c53a8",
    "Q5_1": "1b61618c2ca16dec",
    "Q8_0": "c973a18c32e6b1a6",
    "Q2_K": "a54c089d533d5245",
    "Q3_K": "5c74533a0e3099ef",
    "Q4_K": "ebbde256d04bc2b1",
    "Q5_K": "397f66648ba759ef",
    "Q6_K": "8698cb8f34e0508f",
    "Q4_K_M": "ae4a2570f5f3f493",
    "IQ4_NL": "4d830c325ee52122",
    "IQ4_XS": "59954b71ee26a4c8",
    "MXFP4": "521e56d61797e214",
}


def hash_of(rows: NDArray[np.float32]) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


def hash_of_type(folder: Path, quant: str) -> str:
    """Of a prompt's logits and those of a token behind it."""
    with GGUFFile.open(tiny_model(folder, quant=quant)) as file:
        with cpu(Model.load(file).graph.segment()) as program:
            first = program.submit(batch_of(IDS[:8])).wait().logits.copy()
            second = program.submit(batch_of(IDS[8:9], 8)).wait().logits
            return hash_of(np.concatenate([first, second]))


@pytest.mark.parametrize("quant", HASHES)
def test_logits_of_a_type_stay_what_they_were(tmp_path: Path, quant: str) -> None:
    assert hash_of_type(tmp_path, quant) == HASHES[quant]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quant", ["Q4_0", "F16"])
def test_an_architecture_has_the_references_bits(tmp_path: Path, arch: str, quant: str) -> None:
    with GGUFFile.open(tiny_model(tmp_path, arch=arch, quant=quant)) as file:
        segment = Model.load(file).graph.segment()
        with ReferenceBackend().compile(segment, LIMITS, mode="quantised") as program:
            expected = program.submit(batch_of(IDS)).wait().logits
        np.testing.assert_array_equal(logits(segment, IDS), expected)
