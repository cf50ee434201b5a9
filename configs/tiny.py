"""A two-core CPU learns to read Python in minutes: the whole program on a small scale.

Command: python -m bsa.main --config=configs/tiny.py --workdir=runs/tiny
Hardware: any; 2 CPU cores
Expected: 2.6 held-out bits per byte after 4 minutes (2026-11-22, commit d13709b)
"""

from configs import base


def get_config():
    """Returns the base config at a size for two CPU cores."""
    config = base.get_config()
    config.model.update(
        D=128,
        H=4,
        G=2,
        K=32,
        F=352,
        L=4,
        pattern="wb",
        positions="rn",
        window_tokens=(64, 64),
        dtype="float32",
        remat="none",
    )
    config.index.update(J=20, A=2)
    config.data.update(B=8, T=1024)
    config.train.update(
        steps=250, learning_rate=4e-3, warmup_steps=30, evaluate_every_steps=100
    )
    config.train.update(checkpoint_every_steps=100)
    config.evaluation.update(
        batches=8, quick_batches=2, passkey_tokens=(256, 512, 1024)
    )
    return config
