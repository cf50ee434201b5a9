"""What an index is built and routed with. Checked once, static everywhere below."""

import dataclasses

from pallas_kernels import selection

QUERY_POOLS = ("mean", "heads")


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """Sizes and rules of a bookmark index; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a size is out of range, or two do not fit.
    """

    C: int
    query_block: int
    J: int
    sink_tokens: int
    R: int
    lloyd_steps: int
    A: int
    open_tokens: int
    X: int
    query_pool: str
    route_tokens: int

    def __post_init__(self):
        if self.C < 1 or self.R < 1 or self.A < 1 or self.J < 1 or self.open_tokens < 1:
            raise ValueError(
                f"index: C={self.C}, R={self.R}, A={self.A}, J={self.J} and open_tokens={self.open_tokens} must be at least 1"
            )
        if self.R > self.C:
            raise ValueError(
                f"index: R={self.R} points for blocks of C={self.C} tokens; at most one point a token"
            )
        if not 1 <= self.query_block <= selection.MAX_MASKED_TOKENS:
            raise ValueError(
                f"index: query_block={self.query_block}; 1 to {selection.MAX_MASKED_TOKENS} tokens have bits in a mask"
            )
        if self.open_tokens > selection.MAX_MASKED_TOKENS:
            raise ValueError(
                f"index: open_tokens={self.open_tokens}; at most {selection.MAX_MASKED_TOKENS} are supported"
            )
        if self.sink_tokens % self.C:
            raise ValueError(
                f"index: sink_tokens={self.sink_tokens} is no multiple of C={self.C}: sinks are whole blocks"
            )
        if self.X and self.X < self.A:
            raise ValueError(
                f"index: a shortlist of X={self.X} blocks cannot give A={self.A} choices; raise X or set it to 0"
            )
        if self.lloyd_steps < 0 or self.sink_tokens < 0 or self.X < 0:
            raise ValueError(
                f"index: lloyd_steps={self.lloyd_steps}, sink_tokens={self.sink_tokens}, X={self.X} cannot be negative"
            )
        if self.query_pool not in QUERY_POOLS:
            raise ValueError(
                f"index: query_pool={self.query_pool!r} is not one of {', '.join(QUERY_POOLS)}"
            )
        if self.route_tokens < 1 or self.route_tokens % self.query_block:
            raise ValueError(
                f"index: route_tokens={self.route_tokens} is no multiple of query_block={self.query_block}"
            )
