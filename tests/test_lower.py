"""How work is cut into chunks."""

from __future__ import annotations

import pytest

from edgeinfer.kernels.cpu.lower import cut


@pytest.mark.parametrize("n_groups", [1, 2, 7, 8, 72, 576, 4000, 16032])
@pytest.mark.parametrize("group_bytes", [160, 9216, 60_000, 1 << 20])
@pytest.mark.parametrize("n_threads", [1, 2, 16])
def test_chunks_cover_every_group_once(n_groups: int, group_bytes: int, n_threads: int) -> None:
    chunks = cut(n_groups, group_bytes, n_threads)
    sizes = [chunks.big] * chunks.n_big + [chunks.small] * (chunks.n - chunks.n_big)
    assert 0 <= sum(sizes) - n_groups < chunks.small, "the last chunk is cut by the kernel"
    assert sum(sizes[:-1]) < n_groups
    assert chunks.small <= chunks.big
