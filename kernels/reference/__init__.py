"""The oracle: every recorded op in plain NumPy, and the normative text of edgeinfer's arithmetic.

Knows no threads, tapes or packed layouts. Two modes share one walk over the ops:

- "exact": the truth. Dequantised float32 weights, float32 matrix products, everything else in
  float64, K and V kept in float32.
- "quantised": what every kernel computes, bit for bit. All values are float32, every written
  operation rounds once to nearest even, `fma` is fused, no operation is reordered. The modules
  `quantised`, `blocks`, `functions` and `recurrent` say how; where they show a loop, its order is
  part of the contract.

Rules of the quantised mode that span functions:
- a matmul is followed by the bias, then by the residual: `residual + (acc + bias)`.
- a row of an embedding is `dequantize` of its blocks: d * q + m rounds twice.
- K and V, those of the step itself too, are rounded when stored and before any query reads
  them: to float16 (nearest even), or to blocks of 32 along a head (`caches.to_blocks`).
- where heads are multiples of 64, keys that become blocks pass `caches.hadamard` behind their
  rotation, and so does every query that reads them; so do values, and then what attention yields
  (after 1 / l) passes it back. Where K serves as V, both or neither.
- a query reads the pages of `PageTable.visible`; for pinned ones it is rotated at
  `PageTable.pinned_pos`, from the unrotated query. K is never rewritten.
"""

from __future__ import annotations

from edgeinfer.kernels.reference.backend import Mode, ReferenceBackend
from edgeinfer.kernels.reference.program import ReferenceProgram

__all__ = ["Mode", "ReferenceBackend", "ReferenceProgram"]
