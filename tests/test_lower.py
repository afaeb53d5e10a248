"""How work is cut into chunks, and how arguments reach kernels."""

from __future__ import annotations

from itertools import pairwise

import pytest

from edgeinfer.kernels.cpu import attention_layout, layout
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


# -- argument words ------------------------------------------------------------------------------

NAMES = vars(layout) | vars(attention_layout)
BLOCKS = {name: block for name, block in NAMES.items() if isinstance(block, layout.Block)}
OWNERS = {"ANGLES_SCALED": "ANGLES"}


@pytest.mark.parametrize("name", BLOCKS)
def test_words_are_written_where_kernels_read_them(name: str) -> None:
    block, prefix = BLOCKS[name], OWNERS.get(name, name)
    read = [NAMES[f"{prefix}_{word.upper()}"] for word in block.names]
    assert read == list(block) == [block[0] + layout.WORD * i for i in range(len(block))]
    if f"{prefix}_SINK" in NAMES:  # of whoever has a tail, where that begins
        assert NAMES[f"{prefix}_SINK"] == block[-1] + layout.WORD


def test_a_word_that_is_missing_or_of_no_such_name_is_refused() -> None:
    assert layout.COPY.pack(5, x=1, stride=2, dim=3, rows=4) == [1, 2, 3, 4, 5]
    for words in ({}, {"x": 1, "stride": 2, "dim": 3}, dict(x=1, stride=2, dim=3, rows=4, y=5)):
        with pytest.raises(TypeError, match="missing"):
            layout.COPY.pack(**words)
