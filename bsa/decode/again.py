"""A layer's attention to the cache, and once more with what it found where the model asks again. Called by `step`."""

import dataclasses

from bsa.decode import attend as attends
from bsa.model import attention
from bsa.model import settings as model_settings


def attend(
    heads: attention.Heads,
    segment_id_BT,
    position_BT,
    model: model_settings.ModelSettings,
    letter: int,
    followed: attention.Followed | None = None,
    *,
    context: attends.Context,
):
    """`attends.attend`, twice for heads that ask again: each time with the earlier choices of that time.

    The second time gets the memory as it was, too: it writes the same keys and values, and the program has them once.
    """
    arguments = segment_id_BT, position_BT, model, letter, followed
    if heads.again_HKK is None:
        return attends.attend(heads, *arguments, context=context)
    found_BTHK, first = attends.attend(
        heads._replace(again_HKK=None), *arguments, context=context
    )
    memory = context.memory
    memory = dataclasses.replace(memory, recent_BGTA=memory.again_BGTA)
    out_BTHK, handed = attends.attend(
        heads.ask_again(found_BTHK),
        *arguments,
        context=dataclasses.replace(context, memory=memory),
    )
    memory = dataclasses.replace(
        handed["memory"],
        recent_BGTA=first["memory"].recent_BGTA,
        again_BGTA=handed["memory"].recent_BGTA,
    )
    return out_BTHK, handed | {"memory": memory}
