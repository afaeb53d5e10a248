"""The memory layouts that host code and native kernels share: header, argument blocks, buffers.

Imports nothing of ours; knows no operation. Every word is 8 bytes.

A kernel is `kernel(header, args, chunk, thread)`: addresses of the step's header and of the op's
argument words, which piece of the work to do, and which thread of the team does it: no two threads
of a step have the same number, and each is below the team's n_threads. Chunks of one op are
independent of each other.

Activations come in two formats, "rows" meaning tokens:
- f32: row-major floats, (rows, K).
- a32: blocks of 32 values, 44 bytes each: 32 int8 q, float d, float d * sum of q, int16 sum of the
  first 16 q, int16 sum of the last 16. x = d * q.
d = max|x| / 127 and q = roundeven(x * (127 / max|x|)), all zero where max|x| is below 1e-36. Where
a value is no number d is none, and so is every product with the block.
Blocks of a32 are stored tile by tile: rows are cut into tiles of MAX_TILE, the rest is one smaller
tile; inside a tile of n rows that starts at row t0, block b of row t0 + i lies at t0 * row_bytes +
(b * n + i) * 44, where row_bytes = K / 32 * 44.

A row of floats has room for whole vectors of 8. What a kernel leaves behind its last value is 0,
so that a matmul may read whole blocks of 4.

Packed weights are cut into groups of 8 rows, a SIMD lane or, of floats, 4 per row; each format
says in `native/formats.py` how its block looks.

A KV page holds 32 positions of one layer, K and V head after head (`page_layout.py`). Page p of a
layer starts p * page_bytes after the layer's base.

What kernels of attention alone know is in `attention_layout.py`.

What depends on a page table is told where the records of its layer's tables begin, as an offset
("tables") from H_TABLES.
"""

from __future__ import annotations

from typing import Any

WORD = 8


def whole_vectors(n: int) -> int:
    """The places that n values take: vectors of 8."""
    return (n + 7) & -8


def row_stride(n: int) -> int:
    """Bytes between rows of n floats."""
    return 4 * whole_vectors(n)


A32_BYTES = 44
A32_D = 32  # offset of d
A32_DSUM = 36  # of d * sum
A32_SUMS = 40  # of the two int16
MAX_TILE = 64  # rows

PAGE = 32  # positions
SEGMENT_PAGES = 16

# Step header: byte offsets of its words. Those that change with every step come first.
H_ROWS = 0 * WORD  # T, input rows of this step
H_WANTED_ROWS = 1 * WORD  # R, rows whose output is wanted
H_N_SEQUENCES = 2 * WORD
H_SAMPLES = 3 * WORD  # address of the sample table's argument words, 0 when not sampling
H_ABORT = 4 * WORD  # set from any thread: the rest of the step does nothing
H_POS = 5 * WORD  # address: int64[T] absolute positions
H_SEQ = 6 * WORD  # address: int32[T] sequence of each row
H_IDS = 7 * WORD  # address: int32[T] token ids
H_WANTED = 8 * WORD  # address: int32[R] row indices, ascending
H_TABLES = 9 * WORD  # address: page table records, one per sequence
H_STATES = 10 * WORD  # address: int32[n_sequences] state slots that sequences start from
H_KEPT = 11 * WORD  # address: int32[T] state slots for what is behind a row, -1: none
HEADER_WORDS = 32

# Page table record, one per sequence (batch.PageTable): byte offsets.
TABLE_PAGES = 0 * WORD  # address: int32[n_slots] page of the arena
TABLE_SLOTS = 1 * WORD
TABLE_PINNED = 2 * WORD
TABLE_VISIBLE = 3 * WORD
TABLE_BYTES = 4 * WORD

# Thread team: byte offsets of its words, the hot ones on cache lines of their own.
TEAM_EPOCH = 0
TEAM_TAPE = 64  # address of the current step's tape
TEAM_STOP = 128
TEAM_SLEEPERS = 192  # workers parked or about to
TEAM_ACTIVE = 256  # workers that may touch a tape
TEAM_YIELD, TEAM_WAIT, TEAM_FUTEX, TEAM_SLEEP_ARG = (320 + i * WORD for i in range(4))
TEAM_BYTES = 384

# Tape: words, then one slot per op. The threads of a team beyond n_threads leave it alone.
# The prologue is parts that the caller runs one after the other before chunks are counted.
TAPE_HEADER, TAPE_N_OPS, TAPE_N_THREADS, TAPE_PROLOGUE, TAPE_N_PROLOGUE = (
    i * WORD for i in range(5)
)
TAPE_SLOTS = 64
SLOT_TICKET = 0
SLOT_COUNT = 64
SLOT_DONE = 128
SLOT_PARTS, SLOT_N_PARTS = 192, 200
SLOT_RECOUNT = 208  # how many slots behind this one get their counts anew once it has run
SLOT_BYTES = 256
# An op has one or more parts: a kernel, its arguments, its chunks in this step, and the rule that
# counts them: a fixed number (>= 0) or one of COUNT_*. COUNT_ITEMS is the word that its first
# argument points to times its second argument, known before the step begins; COUNT_PLANNED is the
# same for an op behind one that plans.
PART_KERNEL, PART_ARGS, PART_COUNT, PART_RULE = (i * WORD for i in range(4))
PART_BYTES = 4 * WORD
COUNT_ROWS, COUNT_WANTED, COUNT_ITEMS, COUNT_PLANNED = -1, -2, -3, -4

# "Which rows" an op has: every row of the step; as many as are wanted, where its input has those
# alone; or the wanted ones among the rows of its input, row i being wanted[i].
ALL_ROWS = 0
WANTED_ROWS = 1
PICKED_ROWS = 2


class Block(tuple[int, ...]):
    """The argument words of a kernel: their offsets in bytes, in order, and their names."""

    names: tuple[str, ...]

    def __new__(cls, names: str, first: int = 0) -> Block:
        listed = names.split()
        block = super().__new__(cls, (WORD * (first + i) for i in range(len(listed))))
        block.names = tuple(listed)
        return block

    def pack(self, *tail: Any, **words: Any) -> list[Any]:
        """The words in order, each given by its name, then what follows them."""
        if words.keys() != set(self.names):
            raise TypeError(f"{sorted(words.keys() ^ set(self.names))} missing, or of no such name")
        return [*(words[name] for name in self.names), *tail]


# Argument words of kernels, as offsets in bytes. An address of 0 means "absent".
#
# pack.<type>: GGUF rows -> packed groups. A chunk is `per_chunk` groups; missing rows become 0.
PACK = Block("src dst n_rows n_blocks per_chunk")
PACK_SRC, PACK_DST, PACK_N_ROWS, PACK_N_BLOCKS, PACK_PER_CHUNK = PACK
#
# matmul.<type>: out[t, n] = sum_k W[n, k] x[t, k] (+ bias[n]) (+ residual[t, n]).
# x is a32 or f32 as the weight type asks; out, residual: float rows of `stride` bytes. Rows of
# out and residual, and bias, have room for 8 floats a group. A chunk is some groups of 8 weight
# rows, for all tokens: chunk c is the groups from bounds[c] up to bounds[c + 1], words that follow
# the others. Every bound but the last is a multiple of PANEL_GROUPS. Prefetches may name addresses
# up to 2 KiB behind the weights; that cannot fault.
MATMUL = Block("w n_blocks x out stride bias residual rows x_row_bytes scratch bounds")
(
    MATMUL_W, MATMUL_N_BLOCKS, MATMUL_X, MATMUL_OUT, MATMUL_STRIDE, MATMUL_BIAS,
    MATMUL_RESIDUAL, MATMUL_ROWS, MATMUL_X_ROW_BYTES, MATMUL_SCRATCH, MATMUL_BOUNDS,
) = MATMUL  # fmt: skip
# Quantised weights meet several tokens in panels of PANEL_GROUPS groups. Scratch of each thread,
# 64-byte aligned: the sums of MAX_TILE rows and a panel of at most PANEL_FIELDS vectors a group.
PANEL_GROUPS, PANEL_FIELDS = 4, 20
MATMUL_SUMS_BYTES = MAX_TILE * PANEL_GROUPS * 32
MATMUL_SCRATCH_BYTES = MATMUL_SUMS_BYTES + PANEL_FIELDS * PANEL_GROUPS * 32
#
# embed.<type>: out[t] = row ids[t] of a packed matrix, as floats. A chunk is one row.
EMBED = Block("w n_blocks out stride dim")
EMBED_W, EMBED_N_BLOCKS, EMBED_OUT, EMBED_STRIDE, EMBED_DIM = EMBED
#
# The two places where a row of floats can be left, in this order, as the tail of an argument block
# ("sinks"): f32 rows, a32. The f32 one is always there: it is what the quantiser reads. Row t that
# thread i makes lies at address + t * stride + i * thread_stride: where nobody reads the floats,
# each thread has a single row, which stays in its cache.
SINK = Block("f32 stride thread_stride a32")
SINK_F32, SINK_STRIDE, SINK_THREAD_STRIDE, SINK_A32 = SINK
#
# norm: sink[i] = rms_norm(x[row i]) * weight, of ALL_ROWS or PICKED_ROWS. A chunk is one row. eps
# is a float's bits.
NORM = Block("x stride weight eps dim rows")
NORM_X, NORM_STRIDE, NORM_WEIGHT, NORM_EPS, NORM_DIM, NORM_ROWS = NORM
NORM_SINK = 6 * WORD
#
# swiglu: sink[t] = silu(gate[t]) * up[t]. A chunk is one row.
SWIGLU = Block("gate up stride dim")
SWIGLU_GATE, SWIGLU_UP, SWIGLU_STRIDE, SWIGLU_DIM = SWIGLU
SWIGLU_SINK = 4 * WORD
#
# quantise: sink[t] = x[t], for a value that nothing else quantises on its way. A chunk is a row.
QUANTISE = Block("x stride dim rows")
QUANTISE_X, QUANTISE_STRIDE, QUANTISE_DIM, QUANTISE_ROWS = QUANTISE
QUANTISE_SINK = 4 * WORD
#
# copy_rows: sink[i] = x[row i], of ALL_ROWS or PICKED_ROWS. A chunk is one row.
COPY = Block("x stride dim rows")
COPY_X, COPY_STRIDE, COPY_DIM, COPY_ROWS = COPY
COPY_SINK = 4 * WORD
#
# norm_heads: as norm, but of each of n_heads parts of head_dim values, with one weight of head_dim
# for all or none (0). A chunk is one row.
NORM_HEADS = Block("x stride weight eps n dim rows")
(
    NORM_HEADS_X, NORM_HEADS_STRIDE, NORM_HEADS_WEIGHT, NORM_HEADS_EPS, NORM_HEADS_N,
    NORM_HEADS_DIM, NORM_HEADS_ROWS,
) = NORM_HEADS  # fmt: skip
NORM_HEADS_SINK = 7 * WORD
#
# pointwise.<kind>: sink[t] = f(a[t], b[t]) or f(a[t], parameter), the bits of a float, or of two,
# the first in the low half; a b of stride 0 is one row for all. Rows of b have room for whole
# vectors. A chunk is one row.
POINT = Block("a a_stride b b_stride parameter dim rows")
POINT_A, POINT_A_STRIDE, POINT_B, POINT_B_STRIDE, POINT_PARAMETER, POINT_DIM, POINT_ROWS = POINT
POINT_SINK = 7 * WORD
#
# mul_parts: sink[t] = x[t], each of n_parts parts of part_dim values times its factor. A chunk is
# one row.
PARTS = Block("x stride factors factors_stride n dim rows")
PARTS_X, PARTS_STRIDE, PARTS_FACTORS, PARTS_FACTORS_STRIDE, PARTS_N, PARTS_DIM, PARTS_ROWS = PARTS
PARTS_SINK = 7 * WORD
#
# route.<gating>: sink[t] = the experts of row t as floats, then their weights (ops.Route). bias is
# an address. norm is 0 or 1, scale a float's bits. Scratch of each thread, 64-byte aligned:
# route_scratch_bytes. A chunk is one row.
ROUTE = Block("x stride n_experts n_used bias n_groups n_groups_used norm scale scratch")
(
    ROUTE_X, ROUTE_STRIDE, ROUTE_N_EXPERTS, ROUTE_N_USED, ROUTE_BIAS, ROUTE_N_GROUPS,
    ROUTE_N_GROUPS_USED, ROUTE_NORM, ROUTE_SCALE, ROUTE_SCRATCH,
) = ROUTE  # fmt: skip
ROUTE_SINK = 10 * WORD


def route_scratch_bytes(n_experts: int) -> int:
    """Of one thread: gated logits, scores and marks, each in whole blocks of 32 values."""
    return 3 * 4 * ((n_experts + 31) & -32)


#
# dispatch (one chunk): which rows meet which expert, for all ops that read a route. It leaves the
# number of items, an item for every expert that some row has chosen, then a record for each (row,
# place in its route), those of an item side by side, rows ascending.
DISPATCH = Block("out route stride n_used n_experts")
(
    DISPATCH_OUT, DISPATCH_ROUTE, DISPATCH_STRIDE, DISPATCH_N_USED, DISPATCH_N_EXPERTS,
) = DISPATCH  # fmt: skip
DISPATCH_ITEMS = WORD
DISPATCH_EXPERT, DISPATCH_FIRST, DISPATCH_N_ROWS = (i * WORD for i in range(3))  # of an item
DISPATCH_ITEM_BYTES = 3 * WORD
DISPATCH_ROW, DISPATCH_SLOT = 0, WORD  # of a record
DISPATCH_RECORD_BYTES = 2 * WORD


def dispatch_records(n_experts: int) -> int:
    """Where its records are."""
    return DISPATCH_ITEMS + DISPATCH_ITEM_BYTES * n_experts


def dispatch_bytes(n_experts: int, n_records: int) -> int:
    """Bytes of what it leaves, and of a count of rows for every expert behind that."""
    return dispatch_records(n_experts) + DISPATCH_RECORD_BYTES * n_records + WORD * n_experts


# Ops along a route have what dispatch left as their first argument, and how many chunks an item has
# as their second: those of item i are its chunks from i * per_item on.
PLANNED = Block("at per_item n_experts")
PLANNED_AT, PLANNED_PER_ITEM, PLANNED_N_EXPERTS = PLANNED
#
# gather.<a32|f32>: the rows that meet an expert, for each item as if they were a step of their own,
# those of floats row by row. x has n_parts parts a row, one for each place of a route, or one. A
# chunk is an item.
GATHER = Block("x stride dim n_parts out", first=3)
GATHER_X, GATHER_STRIDE, GATHER_DIM, GATHER_N_PARTS, GATHER_OUT = GATHER
#
# experts.<type>: out[row, place] = W_e x * scale[e] + bias[e], dim values for each place of a row.
# x is what gather left, x_row_bytes for each record. A chunk is some groups of one expert.
EXPERTS = Block(
    "w bytes n_blocks n_groups dim x x_row_bytes out stride scale bias n_used scratch",
    first=3,
)
(
    EXPERTS_W, EXPERTS_BYTES, EXPERTS_N_BLOCKS, EXPERTS_N_GROUPS, EXPERTS_DIM, EXPERTS_X,
    EXPERTS_X_ROW_BYTES, EXPERTS_OUT, EXPERTS_STRIDE, EXPERTS_SCALE, EXPERTS_BIAS,
    EXPERTS_N_USED, EXPERTS_SCRATCH,
) = EXPERTS  # fmt: skip
#
# expert_sum: sink[t] = the sum over places of weight * part of x[t]. A chunk is one row.
SUM = Block("x stride route route_stride n_used dim")
SUM_X, SUM_STRIDE, SUM_ROUTE, SUM_ROUTE_STRIDE, SUM_N_USED, SUM_DIM = SUM
SUM_SINK = 6 * WORD
#
# plan_runs (part of the prologue): for all ops with states, the number of runs of rows of one
# sequence, then a record of each: its rows, and the slot that it starts from.
RUNS = Block("at")
(RUNS_AT,) = RUNS
RUNS_FIRST = WORD  # behind their number
RUN_ROW, RUN_N_ROWS, RUN_STATE = (i * WORD for i in range(3))
RUN_BYTES = 3 * WORD
#
# An op with states has the runs as its first argument, and how many chunks a run has as its second.
# Its part of slot i is at states + i * slot_bytes.
OF_RUNS = Block("at per_run states slot_bytes")
OF_RUNS_AT, OF_RUNS_PER_RUN, OF_RUNS_STATES, OF_RUNS_SLOT_BYTES = OF_RUNS
#
# conv: out[t] = bias + sum over n_taps of weight[j] * x[t - n_taps + 1 + j], rows of one stride
# with zeros behind dim; weight: n_taps such rows. A state is n_taps - 1 of them. A chunk is
# CONV_BYTES of each of a run's rows. conv.silu: silu of it.
CONV = Block("x stride weight bias n_taps out", first=4)
CONV_X, CONV_STRIDE, CONV_WEIGHT, CONV_BIAS, CONV_N_TAPS, CONV_OUT = CONV
CONV_BYTES = 1024  # of a row, of one chunk
#
# delta_net: ops.DeltaNet, a run's rows one after the other. A state of dim x dim is cut into groups
# of 8 columns, dim vectors each, zeros in columns behind the last; heads lie side by side. A chunk
# is up to DELTA_GROUPS of one head. Head h reads key head h % n_key_heads if is_tiled, else
# h * n_key_heads // n_heads. Scratch of each thread, 64-byte aligned: delta_scratch_bytes.
DELTA = Block(
    "q k key_stride v out stride decay beta gate_stride n_heads n_key_heads is_tiled dim scratch",
    first=4,
)
(
    DELTA_Q, DELTA_K, DELTA_KEY_STRIDE, DELTA_V, DELTA_OUT, DELTA_STRIDE, DELTA_DECAY, DELTA_BETA,
    DELTA_GATE_STRIDE, DELTA_N_HEADS, DELTA_N_KEY_HEADS, DELTA_IS_TILED, DELTA_DIM, DELTA_SCRATCH,
) = DELTA  # fmt: skip
DELTA_GROUPS = 4


def runs_bytes(max_sequences: int) -> int:
    """Bytes of the runs of a step."""
    return RUNS_FIRST + max_sequences * RUN_BYTES


def group_bytes(dim: int) -> int:
    """Bytes of 8 columns of a state."""
    return 32 * dim


def delta_state_bytes(n_heads: int, dim: int) -> int:
    """Bytes of the matrices of all heads."""
    return n_heads * whole_vectors(dim) // 8 * group_bytes(dim)


def delta_scratch_bytes(dim: int) -> int:
    """Of one thread: the groups of a chunk, and a vector."""
    return DELTA_GROUPS * 32 * dim + 64


#
# sample: for wanted row i (a chunk), the token that row i of the table at H_SAMPLES asks for.
# Changed logits are restored. Scratch: 64-byte aligned, SCRATCH_BYTES for each thread.
SAMPLE = Block("logits stride n_vocab scratch scratch_bytes")
SAMPLE_LOGITS, SAMPLE_STRIDE, SAMPLE_N_VOCAB, SAMPLE_SCRATCH, SAMPLE_SCRATCH_BYTES = SAMPLE
# It holds the record of candidates.py, the last floats of the logits, the stack of the sort, then a
# key and a float per token. The table and its rows are records of sampling.params.
SAMPLE_TAIL, SAMPLE_STACK = 64, 128
SAMPLE_STACK_RANGES = 66  # two words each
SAMPLE_KEYS = 1216
SAMPLE_SPARE_KEYS = 64


def sample_scratch_bytes(n_vocab: int) -> int:
    """Bytes of one thread."""
    return -(-(SAMPLE_KEYS + 8 * (n_vocab + SAMPLE_SPARE_KEYS) + 4 * n_vocab) // 64) * 64
