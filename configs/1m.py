"""28M parameters on rows of 1,048,576 bytes of Metamath, after shorter ones: a million tokens in a training step.

Command: python -m bsa.main --config=configs/1m.py --workdir=runs/1m
Hardware: one 80 GB GPU, or several that share a row: --config.mesh.context=-1 --config.mesh.data=1
Expected: 1.1M tokens a second and 40 GB in the last stage on one H100 (2026-11-22, commit fc76eff, 20 steps by
    experiments/train_1m.py); the whole run has not been made
"""

from configs import base


def get_config():
    """Returns the base config for rows that grow from 8K over 128K to 1M tokens."""
    config = base.get_config()
    config.model.update(D=512, H=8, G=2, K=64, F=1408, L=8, mlp_tokens=32768)
    config.index.update(A=4, J=64, sink_tokens=64, store="bfloat16")
    config.index.update(route="chapters", chapter_bookmarks=32, chapter_R=8, beam=8)
    config.data.update(source="setmm", B=1, T=2**20, passkey_share=0.2)
    config.data.update(curriculum=((400, 32, 2**13), (200, 2, 2**17)))
    config.data.update(packing_bins=4, prefetch_batches=1)
    config.train.update(start_steps=300, start_pattern="wwww")  # as in small.py
    config.train.start_window_tokens = (256, 256, 256, 672)
    config.train.update(steps=800, learning_rate=1e-3, warmup_steps=50)
    config.train.update(loss_chunk_tokens=16384, evaluate_every_steps=200)
    config.train.update(checkpoint_every_steps=100)
    config.evaluation.update(batches=2, quick_batches=1, passkey_samples=2)
    config.evaluation.update(passkey_tokens=(2**17, 2**20), passkey_depths=3)
    config.mesh.update(capacity_blocks=8192)
    return config
