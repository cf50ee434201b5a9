"""28M parameters on rows of 131,072 bytes of Go, after shorter ones.

Command: python -m bsa.main --config=configs/128k.py --workdir=runs/128k
Hardware: one 80 GB GPU, or several that share a row: --config.mesh.context=-1 --config.mesh.data=1
Expected: not run yet
"""

from configs import base


def get_config():
    """Returns the base config for rows that grow from 8K to 128K tokens."""
    config = base.get_config()
    config.model.update(D=512, H=8, G=2, K=64, F=1408, L=8, mlp_tokens=32768)
    config.index.update(A=4, J=64, sink_tokens=64, store="bfloat16")
    config.index.update(route="chapters", chapter_bookmarks=32, chapter_R=8, beam=8)
    config.data.update(source="go", B=2, T=2**17, passkey_share=0.3)
    config.data.update(curriculum=((500, 32, 2**13),), packing_bins=16)
    config.train.update(start_steps=300, start_pattern="wwww")  # as in small.py
    config.train.start_window_tokens = (256, 256, 256, 672)
    config.train.update(steps=1500, learning_rate=1e-3, warmup_steps=100)
    config.train.update(loss_chunk_tokens=8192)
    config.evaluation.update(batches=8, quick_batches=2)
    config.evaluation.update(passkey_tokens=(2**13, 2**15, 2**17))
    return config
