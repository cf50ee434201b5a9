"""What an index is built and routed with. Checked once, static everywhere below."""

import dataclasses

from pallas_kernels import selection

QUERY_POOLS = ("mean", "heads")
DIGESTS = ("clusters", "spread", "submeans", "minmax", "meanvar", "distinctive")
SIMILARITIES = ("dot", "cosine", "pearson")
SPANS = ("alike", "learned")
LINKED = ("means", "points")
GROUPED = ("position", "cluster", "chain")
STORES = ("float32", "bfloat16", "int8")
CHAPTER_STORES = ("float32", "float8")
PATTERNS = ("strided", "fixed", "random")
GRANULARITIES = ("token", "block")
POINT_POOLS = ("logsumexp", "max")
ROUTES = ("flat", "chapters", "graph", *PATTERNS)


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """Sizes and rules of a bookmark index; `configs/base.py` gives unit and reason of each.

    Raises:
        ValueError: a size is out of range, or two do not fit.
    """

    C: int
    span_blocks: int
    span_min_blocks: int
    span_similarity: float
    query_block: int
    J: int
    sink_tokens: int
    R: int
    lloyd_steps: int
    A: int
    top_p: float
    min_share: float
    open_tokens: int
    X: int
    query_pool: str
    route_tokens: int
    digest: str
    store: str
    route: str
    chapter_bookmarks: int
    chapter_by: str
    volume_chapters: int
    chapter_levels: int
    chapter_R: int
    beam: int
    P: int
    children: int
    similarity: str
    link_by: str
    frontier: int
    hops: int
    stride: int = 1
    spans: str = "alike"
    granularity: str = "token"
    point_pool: str = "logsumexp"
    chapter_store: str = "float32"

    def __post_init__(self):
        self._check_choices()
        self._check_search()
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
        if not 1 <= self.span_min_blocks <= self.span_blocks:
            raise ValueError(
                f"index: spans of {self.span_min_blocks} to {self.span_blocks} blocks; set span_min_blocks to 1 or more and "
                "span_blocks to no less"
            )
        if self.spans == "learned" and self.span_min_blocks == self.span_blocks:
            raise ValueError(
                f"index: spans='learned' of {self.span_min_blocks} to {self.span_blocks} blocks have nothing to learn; raise "
                "span_blocks above span_min_blocks"
            )
        if self.store == "int8" and self.span_blocks > 1:
            raise ValueError(
                f"index: store='int8' with span_blocks={self.span_blocks}: spans are made of points that are kept, which "
                "int8 would round twice; use bfloat16"
            )
        if self.chapter_store == "float8" and self.digest in ("meanvar", "spread"):
            raise ValueError(
                f"index: chapter_store='float8' with digest={self.digest!r}: squares beside a vector's numbers are too far from "
                "them for float8; use float32"
            )
        if not (0 < self.top_p <= 1 and 0 <= self.min_share < 1):
            raise ValueError(
                f"index: top_p={self.top_p} and min_share={self.min_share} are shares of attention: above 0 up to 1, and 0 "
                "or more but below 1"
            )
        if self.lloyd_steps < 0 or self.sink_tokens < 0 or self.X < 0:
            raise ValueError(
                f"index: lloyd_steps={self.lloyd_steps}, sink_tokens={self.sink_tokens}, X={self.X} cannot be negative"
            )
        if self.route_tokens < 1 or self.route_tokens % self.query_block:
            raise ValueError(
                f"index: route_tokens={self.route_tokens} is no multiple of query_block={self.query_block}"
            )

    def longest_list(self, window_tokens: int) -> int:
        """Blocks of a list in which all that can be chosen finds room, beside a window."""
        num_local = (window_tokens + self.sink_tokens) // self.C
        num_local += more_reached(self.query_block, self.C)
        return num_local + (self.query_block + self.open_tokens - 1) * self.A

    def _check_choices(self):
        for name, known in (
            ("query_pool", QUERY_POOLS),
            ("digest", DIGESTS),
            ("spans", SPANS),
            ("store", STORES),
            ("chapter_store", CHAPTER_STORES),
            ("route", ROUTES),
            ("chapter_by", GROUPED),
            ("similarity", SIMILARITIES),
            ("link_by", LINKED),
            ("granularity", GRANULARITIES),
            ("point_pool", POINT_POOLS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"index: {name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )

    def _check_search(self):
        for name in (
            "volume_chapters",
            "chapter_levels",
            "chapter_R",
            "beam",
            "frontier",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"index: {name}={getattr(self, name)} must be at least 1"
                )
        if self.chapter_bookmarks < 2:
            raise ValueError(
                f"index: chapter_bookmarks={self.chapter_bookmarks}; a chapter groups at least 2"
            )
        if (self.chapter_by == "position") != (self.volume_chapters == 1):
            raise ValueError(
                f"index: chapter_by={self.chapter_by!r} with volume_chapters={self.volume_chapters}; by position a chapter "
                "is a volume of its own (1), otherwise at least 2 share one"
            )
        if self.P < 0 or self.hops < 0 or self.children < 0:
            raise ValueError(
                f"index: P={self.P}, hops={self.hops} and children={self.children} cannot be negative"
            )
        if self.digest in ("minmax", "meanvar") and (self.R, self.chapter_R) != (2, 2):
            raise ValueError(
                f"index: digest={self.digest!r} keeps two vectors; set R={self.R} and chapter_R={self.chapter_R} to 2"
            )
        if self.chapter_R > self.chapter_bookmarks * self.R:
            raise ValueError(
                f"index: chapter_R={self.chapter_R} points for the {self.chapter_bookmarks * self.R} points of a chapter's "
                "bookmarks; lower it"
            )
        searches = self.X or self.span_blocks > 1 or self.top_p < 1 or self.min_share
        if self.stride < 1 or (searches and self.route in PATTERNS):
            raise ValueError(
                f"index: stride={self.stride} must be at least 1, and route={self.route!r} with X={self.X}: patterns "
                "have no shortlist, spans (span_blocks) or budget (top_p, min_share)"
            )
        if self.route == "graph" and not self.P:
            raise ValueError("index: route='graph' walks along links; set P above 0")
        if self.route == "graph" and self.frontier < max(self.X, self.A):
            raise ValueError(
                f"index: a frontier of {self.frontier} cannot give the {max(self.X, self.A)} bookmarks wanted of it; raise it"
            )


def more_reached(query_block: int, key_block: int) -> int:
    """How many more blocks the windows of a query block's tokens reach together than one token's does."""
    if query_block % key_block == 0 or key_block % query_block == 0:
        return max(query_block // key_block, 1) - 1
    return (query_block + key_block - 2) // key_block
