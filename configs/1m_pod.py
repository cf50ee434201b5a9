"""1.1B parameters, rows of 1,048,576 bytes, on a TPU pod: every row's tokens over 32 chips.

Command: python -m bsa.main --config=configs/1m_pod.py --workdir=gs://BUCKET/1m_pod
    (on every host), or without a TPU, to see whether it fits: python -m experiments.pod_compile --topology=v5e:16x16
Hardware: 256 TPU chips, 8 of fsdp x 32 of context (v5e:16x16, or v5p:4x8x8 with room to spare)
Expected: not run yet; compiled for v5e:16x16, a step takes 7.3 of a chip's 16 GB (2026-11-22). Without RoPE in its bookmark
    layers libtpu 0.0.50 aborts, see experiments/LOG.md
"""

from configs import base


def get_config():
    """Returns the base config at the size of a pod."""
    config = base.get_config()
    config.model.update(D=2048, H=16, G=4, K=128, F=5632, L=24)
    config.model.update(window_tokens=(512, 512, 512, 256), mlp_tokens=4096)
    config.model.positions = "rrrr"  # the compiler's bug, not our choice
    config.index.update(A=4, J=64, open_tokens=16, sink_tokens=64)
    config.index.update(route="chapters", chapter_bookmarks=32, chapter_R=8, beam=8)
    config.data.update(source="go", B=8, T=2**20, passkey_share=0.2)
    config.data.update(packing_bins=8, prefetch_batches=1)
    config.train.update(steps=10_000, learning_rate=4e-4, warmup_steps=500)
    config.train.update(loss_chunk_tokens=4096, evaluate_every_steps=1000)
    config.evaluation.update(batches=4, quick_batches=1, passkey_depths=3)
    config.evaluation.update(passkey_tokens=(2**17, 2**20))
    config.mesh.update(data=1, fsdp=-1, context=32, capacity_blocks=256)
    return config
