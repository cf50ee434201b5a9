"""Figures that tell whether selection works: how much is read, found and missed, how evenly bookmarks are used.

Called by the model, and by experiments that compare digests and routes.
"""

import jax
import jax.numpy as jnp

from bsa.index import link, local
from pallas_kernels import selection, shapes


def attended_tokens(lists: selection.BlockSelection, start_BT):
    """Keys that each query reads, counted exactly: causal, and inside the query's document.

    Args:
        start_BT: int32, place in the row where each token's document begins.
    Returns:
        float32[B, T], the mean over the G lists.
    """
    shapes.check(start_BT=start_BT, block_id_BGQJ=lists.block_id_BGQJ)
    B, T = start_BT.shape
    block, C = lists.query_block, lists.key_block
    place_Qt = jnp.arange(T, dtype=jnp.int32).reshape(1, 1, -1, 1, block)
    start = start_BT.reshape(B, 1, -1, 1, block)
    begin = lists.block_id_BGQJ[..., None] * C
    overlap = jnp.minimum(begin + C - 1, place_Qt) - jnp.maximum(begin, start) + 1
    bit = jnp.arange(block, dtype=jnp.uint32)
    reads = ((lists.token_mask_BGQJ[..., None] >> bit) & 1).astype(bool)
    keys = jnp.where(reads, jnp.maximum(overlap, 0), 0).sum(3)
    return keys.mean(1, dtype=jnp.float32).reshape(B, T)


def complete_blocks(view: local.LocalView):
    """Whole blocks of its document that each token has seen the end of: int32[B, T]."""
    T = shapes.check(start_BT=view.start_BT)["T"]
    end_BT = (jnp.arange(T, dtype=jnp.int32) + 1) // view.key_block
    return jnp.maximum(end_BT + -view.start_BT // view.key_block, 0)


def count_choices(choice_BGTA, num_bookmarks: int):
    """How many of these tokens chose each bookmark: float32[B, G, M]."""
    shapes.check(choice_BGTA=choice_BGTA)
    place_BGTA = jnp.where(choice_BGTA < 0, num_bookmarks, choice_BGTA)

    def of_group(place):
        count_M = jnp.zeros(num_bookmarks, jnp.float32)
        return count_M.at[place.reshape(-1)].add(1.0, mode="drop")

    return jax.vmap(jax.vmap(of_group))(place_BGTA)


def bookmark_use(count_BGM, view: local.LocalView):
    """How evenly the bookmarks that somebody could choose were chosen.

    Args:
        count_BGM: of `count_choices`, all tokens together.
    Returns:
        entropy: nats, of the share of choices that fell on each bookmark; log of their number if all are alike.
        unread: share of the bookmarks that no token chose. Both are means over rows and heads; 0 where no bookmark was
        open to any token.
    """
    num_bookmarks = shapes.check(count_BGM=count_BGM, low_BT=view.low_BT)["M"]
    T = view.low_BT.shape[1]
    share = count_BGM / jnp.maximum(count_BGM.sum(-1, keepdims=True), 1)
    entropy = -jnp.where(
        share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0
    ).sum(-1)

    # Bookmark n opens to the first token of block n + window, if that is still of n's document.
    block = jnp.arange(num_bookmarks, dtype=jnp.int32)
    reader = (block + view.num_blocks) * view.key_block
    inside = reader < T
    reader = jnp.minimum(reader, T - 1)
    first = view.open_blocks[0][:, reader]
    could_BM = inside & (block >= first)
    unread = (could_BM[:, None] & (count_BGM == 0)).sum(-1) / jnp.maximum(
        could_BM.sum(-1), 1
    )[:, None]
    return entropy.mean(), unread.mean()


def recall(choice_BGTA, wanted_BGTA):
    """Share of the wanted blocks (of a flat route, say) that were chosen too, over all tokens; 1 if none is wanted."""
    shapes.check(choice_BGTA=choice_BGTA)
    is_wanted = wanted_BGTA >= 0
    found = (wanted_BGTA[..., None] == choice_BGTA[..., None, :]).any(-1) & is_wanted
    return jnp.where(is_wanted.any(), found.sum() / jnp.maximum(is_wanted.sum(), 1), 1)


def share_scored(scored_BGT, view: local.LocalView):
    """Nodes that tokens compared their queries with, per bookmark that was open to them; a flat route's is 1."""
    shapes.check(scored_BGT=scored_BGT, low_BT=view.low_BT)
    low_BT, high_BT = view.open_blocks
    num_BT = jnp.maximum(high_BT - low_BT, 0)
    num_open = num_BT.sum(dtype=jnp.float32) * scored_BGT.shape[1]
    return scored_BGT.sum(dtype=jnp.float32) / jnp.maximum(num_open, 1)


def share_proven(proven_BGT, low_BT, high_BT):
    """Share of the tokens with a choice whose choice is proven to be the flat route's (`certificate.prove`); 1 if none has one."""
    shapes.check(proven_BGT=proven_BGT, low_BT=low_BT)
    chooses_BT = high_BT > low_BT
    num = chooses_BT.sum() * proven_BGT.shape[1]
    proven = (proven_BGT & chooses_BT[:, None]).sum() / jnp.maximum(num, 1)
    return jnp.where(num > 0, proven, 1)


def neighbour_overlap(choice_BGTA):
    """`overlap` of tokens with those right after them."""
    return overlap(choice_BGTA[:, :, :-1], choice_BGTA[:, :, 1:])


def overlap(choice_BGTA, other_BGTA):
    """Blocks that a token chose both times, in two layers, say, per block that it chose at all; the mean over those with any."""
    shapes.check(choice_BGTA=choice_BGTA)
    is_both = (choice_BGTA[..., None] == other_BGTA[..., None, :]).any(-1)
    both = (is_both & (choice_BGTA >= 0)).sum(-1)
    either = (choice_BGTA >= 0).sum(-1) + (other_BGTA >= 0).sum(-1) - both
    share = both / jnp.maximum(either, 1)
    return share.sum() / jnp.maximum((either > 0).sum(), 1)


def most_children(links: link.Links):
    """int32, how often the most popular bookmark is a parent: its in-degree, whatever its list has room for."""
    return links.num_children_BGM.max(initial=0)


def block_mass(q_BTHK, k_BSGK, token_id_T, start_BT, *, key_block: int, scale: float):
    """Dense attention of a few tokens, summed over each block of keys: the truth that a selection is judged by.

    Args:
        q_BTHK: queries of the T tokens that are looked at. Memory is T x H x S.
        token_id_T: int32, their places in the row.
        start_BT: int32, place where the document of each begins.
    Returns:
        mass_BGTN: float32, sums to 1 over N; the mean over the H/G heads of a group.
    """
    sizes = shapes.check(
        q_BTHK=q_BTHK, k_BSGK=k_BSGK, token_id_T=token_id_T, start_BT=start_BT
    )
    B, T, H, S, G, K = (sizes[letter] for letter in "BTHSGK")
    q = q_BTHK.reshape(B, T, G, H // G, K).astype(jnp.float32) * scale
    logit = jnp.einsum("btghk,bsgk->bghts", q, k_BSGK.astype(jnp.float32))
    place_S = jnp.arange(S, dtype=jnp.int32)
    is_seen = (place_S <= token_id_T[:, None]) & (place_S >= start_BT[..., None])
    weight = jax.nn.softmax(
        jnp.where(is_seen[:, None, None], logit, -jnp.inf), axis=-1
    ).mean(2)
    return weight.reshape(B, G, T, S // key_block, key_block).sum(-1)


def mass_caught(mass_BGTN, choice_BGTA, low_BT, high_BT):
    """Attention mass of the chosen blocks, and of the best choice of as many.

    Args:
        mass_BGTN: of `block_mass`.
        choice_BGTA: int32 block ids of the same tokens, -1 for none.
        low_BT, high_BT: the blocks open to them, `LocalView.open_blocks`.
    Returns:
        caught: share of the mass on open blocks that the chosen ones hold.
        oracle: the same for the A open blocks that hold most.
        open_share: share of all mass that lies on open blocks, the rest being window and sinks. All three are ratios of
            sums over tokens; 0 where nothing is open.
    """
    shapes.check(mass_BGTN=mass_BGTN, choice_BGTA=choice_BGTA, low_BT=low_BT)
    block = jnp.arange(mass_BGTN.shape[-1], dtype=jnp.int32)
    is_open = (block >= low_BT[..., None]) & (block < high_BT[..., None])
    open_BGTN = jnp.where(is_open[:, None], mass_BGTN, 0)
    chosen = jnp.take_along_axis(open_BGTN, jnp.maximum(choice_BGTA, 0), axis=-1)
    best, _ = jax.lax.top_k(open_BGTN, min(choice_BGTA.shape[-1], block.shape[0]))
    total = open_BGTN.sum()
    share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    caught = jnp.where(choice_BGTA >= 0, chosen, 0).sum() * share
    return caught, best.sum() * share, total / mass_BGTN.sum()
