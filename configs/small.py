"""15M parameters at 8K tokens, one GPU: bookmark, window and dense attention beside each other.

Command: python -m bsa.main --config=configs/small.py:bookmark --workdir=runs/small_bookmark
    (or :window, :dense). Only the last layer of each four differs: a bookmark layer, a window that reads as many
    tokens, or dense attention. Bookmark and dense begin as windows: selection is learned once heads look back (with
    bookmarks from the first step, the loss falls to copying 100 steps later).
Hardware: one H100
Expected: 3 minutes of training for bookmark and window, 5 in all; bookmark 0.752 and window 0.791 held-out bits per
    byte, passkeys as in experiments/RESULTS.md (2026-11-22, commit 8803685)
"""

from configs import base

ARGUMENTS = ("bookmark", "window", "dense")


def get_config(attention: str = "bookmark"):
    """Returns the config with one of `ARGUMENTS` as every fourth layer.

    Raises:
        ValueError: `attention` is none of them.
    """
    if attention not in ARGUMENTS:
        raise ValueError(
            f"configs/small.py:{attention} is unknown; try one of {', '.join(ARGUMENTS)}"
        )
    config = base.get_config()
    config.model.update(D=384, H=6, G=2, K=64, F=1280, L=8, remat="none")
    config.index.update(A=4, J=64)
    config.data.update(B=8, T=8192, passkey_share=0.5)
    config.train.update(steps=2000, learning_rate=2e-3, warmup_steps=100)
    wide = (256, 256, 256, 672)
    if attention == "window":
        config.model.update(pattern="wwww", window_tokens=wide)
    else:
        config.train.update(
            start_steps=300, start_pattern="wwww", start_window_tokens=wide
        )
    if attention == "dense":
        config.model.update(pattern="wwwd")
    config.evaluation.update(
        passkey_tokens=(1024, 2048, 4096, 8192), passkey_samples=16
    )
    return config
