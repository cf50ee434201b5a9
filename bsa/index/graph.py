"""From good bookmarks to better ones along links, parents and children alike. Called by `route`."""

import jax.numpy as jnp

from bsa.index import tree


def walk(rate, parent_MP, child_MP, id_X, low, high, *, frontier: int, hops: int):
    """Hops from a frontier to all its neighbours and keeps the best, again and again.

    Neighbours outside [low, high) are not seen, so a bookmark that was left later is never read early.

    Args:
        rate: as in `tree.search`, of bookmarks only.
        parent_MP, child_MP: int32 ids, -1 for none; each has its own P.
        id_X: int32, the first frontier, at most `frontier` ids, -1 for none.
        frontier: how many are kept after a hop.
        hops: how often.
    Returns:
        id_X, best first, -1 after the last; and int32, how many bookmarks were scored.
    """
    scored = jnp.int32(0)
    id_X = jnp.pad(id_X, (0, frontier - id_X.shape[0]), constant_values=-1)
    for _ in range(hops):
        here = jnp.maximum(id_X, 0)
        near = jnp.concatenate([parent_MP[here], child_MP[here]], axis=1)
        near = jnp.where(id_X[:, None] < 0, -1, near).reshape(-1)
        seen = jnp.concatenate([id_X, near])
        seen = jnp.sort(jnp.where((seen >= low) & (seen < high), seen, tree.NOWHERE))
        is_first = jnp.concatenate([jnp.ones(1, bool), seen[1:] != seen[:-1]])
        is_open = is_first & (seen < tree.NOWHERE)
        scored += is_open.sum(dtype=jnp.int32) - (id_X >= 0).sum(dtype=jnp.int32)
        score = rate(0, jnp.where(is_open, seen, 0), is_open)
        id_X = tree.best(score, seen, frontier)
    return id_X, scored
