"""How work is cut into chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edgeinfer.kernels.cpu.commands import cut
from edgeinfer.kernels.cpu.layout import PANEL_GROUPS


@pytest.mark.parametrize("n_groups", [1, 2, 7, 8, 72, 576, 4000, 16032])
@pytest.mark.parametrize("group_bytes", [160, 9216, 60_000, 1 << 20])
@pytest.mark.parametrize("n_threads", [1, 2, 16])
@pytest.mark.parametrize("others", [0, 1 << 20])
def test_chunks_cover_every_group_once_in_whole_panels(
    n_groups: int, group_bytes: int, n_threads: int, others: int
) -> None:
    bounds = cut(n_groups, group_bytes, n_groups * group_bytes + others, n_threads)
    assert bounds[0] == 0 and bounds[-1] == n_groups
    assert all(low < high for low, high in pairwise(bounds))
    assert all(bound % PANEL_GROUPS == 0 for bound in bounds[:-1])


def test_every_thread_gets_work_and_chunks_shrink() -> None:
    bounds = cut(576, 2880, 576 * 2880, 4)
    sizes = [high - low for low, high in pairwise(bounds)]
    assert len(sizes) > 8
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] * 4 < 576
