"""Block-sparse attention kernels over lists of key blocks chosen at run time.

Import `block_sparse_attention` and `BlockSelection` into your own model; nothing else in this repository is needed.
"""

from pallas_kernels.dispatch import IMPLEMENTATIONS, block_sparse_attention
from pallas_kernels.selection import BlockSelection, SegmentIds

__all__ = ["IMPLEMENTATIONS", "BlockSelection", "SegmentIds", "block_sparse_attention"]
