"""Attention of one row that makes its heads itself has the bits of the kernels one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.kernels.cuda import tiles
from edgeinfer.kernels.cuda.attention import AttendLaunch, n_segments, part_floats
from edgeinfer.kernels.cuda.kernel import Kernel
from edgeinfer.kernels.cuda.layout import KV_TYPES
from edgeinfer.kernels.cuda.shim import ShimDevice
from edgeinfer.kernels.cuda.tiles import x8_bytes
from tests.cuda_shim import rows_in_memory, run, same_bits, step, stride_of
from tests.shim import SEEDS, shim
from tests.test_cuda_attend import READY, Case, Rows, case_of


class Heads:
    """A row's products q, k and v, and what makes heads of them."""

    def __init__(self, case: Case, n_pairs: int, is_neox: bool, has_norms: bool) -> None:
        rng = np.random.default_rng(case.seed + 1)
        cache, self.case = case.cache, case
        floats = rng.standard_normal
        self.q = rows_in_memory(floats((1, case.n_heads * cache.k_dim), np.float32))
        self.k = rows_in_memory(floats((1, cache.n_heads * cache.k_dim), np.float32))
        self.v = rows_in_memory(floats((1, cache.n_heads * cache.v_dim), np.float32))
        norms = floats((2, cache.k_dim), np.float32) if has_norms else (None, None)
        angles = floats((2, n_pairs, 2), np.float32)
        self.args: dict[str, Any] = dict(
            k=self.k, v=None if cache.k_is_v else self.v, q_norm=norms[0], k_norm=norms[1],
            eps=1e-5, angles=angles[0], pinned_angles=angles[1], n_pairs=n_pairs,
        )  # fmt: skip
        self.is_neox = is_neox
        tables, pages = case.table_arrays()
        self.step = dict(
            step=step(1, 0, 1), pos=case.pos, seq=case.seq, tables=tables, pages=pages,
            q_stride=stride_of(self.q.shape[1]), n_heads=case.n_heads, n_kv_heads=cache.n_heads,
        )  # fmt: skip
        self.has_room = AttendLaunch.of(cache, case.n_heads, case.cap > 0).makes_heads

    def caches(self) -> dict[str, Any]:
        v = None if self.case.cache.k_is_v else self.case.v_cache()
        return dict(k_cache=self.case.k_cache(), v_cache=v)

    def at_once(self, seed: int | None = None, device: ShimDevice | None = None) -> list[Any]:
        return self._attend(
            self.caches(), device, seed,
            **self.args, q=self.q, pinned_q=None, is_neox=int(self.is_neox),
        )  # fmt: skip

    def one_by_one(self) -> list[Any]:
        cache, caches = self.case.cache, self.caches()
        out, pinned = np.zeros_like(self.q), np.zeros_like(self.q)
        run(
            Kernel.of("rotate_store", NEOX=int(self.is_neox)),
            (self.case.n_heads + cache.n_heads, 1), 32, shared=4 * cache.k_dim, **self.args,
            **self.step, **caches, q=self.q, k_stride=0, v_stride=0, out=out, pinned_out=pinned,
            k_dim=cache.k_dim, v_dim=0 if cache.k_is_v else cache.v_dim,
            k_type=KV_TYPES[cache.k_type], v_type=KV_TYPES[cache.v_type],
            transforms_k=int(cache.transforms_k), transforms_v=int(cache.transforms_v),
        )  # fmt: skip
        return self._attend(caches, None, None, **READY, q=out, pinned_q=pinned)

    def _attend(
        self, caches: dict[str, Any], device: ShimDevice | None, seed: int | None, **heads: Any
    ) -> list[Any]:
        """Results as floats and as blocks, and the caches."""
        case, cache = self.case, self.case.cache
        launch = AttendLaunch.of(cache, case.n_heads, case.cap > 0)
        n = n_segments(case.tables[0], int(case.pos[0]), cache.window) + 1
        dim = case.n_heads * cache.v_dim
        out = np.full((1, stride_of(dim)), np.nan, np.float32)
        x8 = np.zeros((1, x8_bytes(dim)), np.uint8) if cache.v_dim % 32 == 0 else None
        counters = np.zeros((1, launch.n_tiles), np.int32)
        run(
            launch.kernel, (launch.n_tiles, n, 1), launch.threads, device=device, seed=seed,
            **heads, **caches, **self.step, window=cache.window, scale=case.scale,
            soft_cap=case.cap, sinks=case.sinks, out=out, out_stride=out.shape[1], x8=x8,
            parts=np.zeros((case.n_heads, n, part_floats(cache.v_dim)), np.float32),
            counters=counters,
        )  # fmt: skip
        assert not counters.any()
        arrays = [out[:, :dim], x8, *caches.values()]
        return [each for each in arrays if each is not None]

    def check(self, seeds: tuple[int, ...], device: ShimDevice | None = None) -> None:
        expected = self.one_by_one()
        assert not np.isnan(expected[0]).any()
        for seed in seeds:
            for got, each in zip(self.at_once(seed, device), expected, strict=True):
                same_bits(got, each)


SLID = Rows(640, n_pinned=3, n_visible=5, n_ring=8)
CASES: list[tuple[Rows, int, dict[str, Any]]] = [
    (Rows(0), 1, {}),
    (Rows(32), 2, dict(k_dim=80, v_dim=72)),
    (Rows(1100), 4, dict(k_dim=128, v_dim=128)),  # the last of several segments stores
    (Rows(540), 9, dict(k_dim=128, v_dim=128)),  # tiles of a kv head all do
    (SLID, 3, {}),  # pinned pages are read by a q of their own
    (Rows(700, n_pinned=17, n_visible=20, n_ring=21), 2, dict(k_dim=33, v_dim=33, window=90)),
    (SLID, 2, dict(k_dim=72, v_dim=64, k_is_v=True, has_sinks=True, cap=3.0)),
    (SLID, 3, dict(k_type="q8_0", v_type="q4_0")),
    (Rows(530), 8, dict(k_dim=128, v_dim=128, k_type="q4_0", v_type="q8_0", window=40)),
    (Rows(70), 3, dict(k_dim=100, v_dim=64, k_type="q8_0", v_type="f16")),
    (SLID, 3, dict(k_dim=192, v_dim=128, k_type="q8_0", v_type="q8_0", k_is_v=True)),
]


@pytest.mark.parametrize("i", range(len(CASES)))
def test_heads_made_at_once(i: int) -> None:
    """Pages, segments, gaps, windows, types: with norms and without, turned in either way."""
    rows, group, options = CASES[i]
    case = case_of([rows], group, seed=i, **options)
    n_pairs = (case.cache.k_dim // 2, 5, 0)[i % 3]
    heads = Heads(case, n_pairs, is_neox=i % 2 == 0, has_norms=i % 4 < 2)
    assert heads.has_room
    heads.check(SEEDS if i in (3, 7) else (SEEDS[i % 3],))


def test_nothing_is_stored_where_another_layer_has_the_keys() -> None:
    case = case_of([Rows(100)])
    heads = Heads(case, 32, is_neox=True, has_norms=True)
    heads.args |= {"k": None, "v": None}
    before = heads.caches()
    _, _, k_cache, v_cache = heads.at_once(1)
    same_bits(k_cache, before["k_cache"])
    same_bits(v_cache, before["v_cache"])


def test_heads_too_wide_for_their_room_are_made_before() -> None:
    assert not Heads(case_of([Rows(0)], 1, k_dim=192, v_dim=128), 32, True, True).has_room


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_any_heads_of_any_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k_dim, v_dim = (int(rng.choice([rng.integers(1, 300), 64, 128])) for _ in range(2))
    n_visible = int(rng.choice([1, 3, 20, 1 << 30]))
    row = Rows(
        first=int(rng.integers(0, 1500)),
        n_pinned=int(rng.choice([0, 1, 4, 17])),
        n_visible=n_visible,
        n_ring=0 if n_visible == 1 << 30 else n_visible + 3,
    )
    k_is_v, types = bool(v_dim <= k_dim and rng.integers(0, 2)), ["f16", "q8_0", "q4_0"]
    k_type = str(rng.choice(types))
    case = case_of(
        [row],
        group=int(rng.integers(1, 17)),
        seed=seed,
        n_heads=int(rng.integers(1, 4)),
        k_dim=k_dim,
        v_dim=v_dim,
        k_is_v=k_is_v,
        k_type=k_type,
        v_type=k_type if k_is_v else str(rng.choice(types)),
        window=int(rng.choice([0, 0, 1, 33, 700])),
    )
    n_pairs = int(rng.integers(0, k_dim // 2 + 1))
    heads = Heads(case, n_pairs, bool(rng.integers(0, 2)), bool(rng.integers(0, 2)))
    if heads.has_room:
        heads.check(SEEDS)


# What goes wrong without a line of a kernel's text.
PLANTED = {
    "a barrier before pages": ("attend.cu", "        __syncthreads();\n        for (int first ="),
    "a barrier of a head's norm": ("heads.cuh", "    }\n    __syncwarp();\n}"),
    "a barrier of a head's turn": ("attend_queries.cuh", "= value; });\n    __syncwarp();\n"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_missing_is_found(tmp_path: Path, what: str) -> None:
    file, lines = PLANTED[what]
    text = (Path(tiles.__file__).parent / file).read_text("utf-8")
    assert text.count(lines) == 1
    barrier = "        __syncthreads();\n" if "syncthreads" in lines else "    __syncwarp();\n"
    (tmp_path / file).write_text(text.replace(lines, lines.replace(barrier, "")), "utf-8")
    device = shim(tmp_path / "compiled", sources=[tmp_path])
    heads = Heads(case_of([Rows(100)], 3, k_type="q8_0", v_type="q8_0"), 16, False, True)
    for seed in (1, 7):
        with pytest.raises(AssertionError):
            heads.check((seed,), device)
    device.close()
