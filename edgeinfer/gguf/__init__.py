"""Opens GGUF files: metadata, and tensors that are read when asked for. Every number is checked.

Knows nothing of what the metadata means, of architectures or of running a tensor's type.
"""

from __future__ import annotations

from edgeinfer.gguf.file import GGUFFile
from edgeinfer.gguf.metadata import Array, Metadata, Scalar, Value
from edgeinfer.gguf.source import TensorBytes

__all__ = ["Array", "GGUFFile", "Metadata", "Scalar", "TensorBytes", "Value"]
