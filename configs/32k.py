"""28M parameters on rows of 32,768 bytes of Go.

Command: python -m bsa.main --config=configs/32k.py --workdir=runs/32k
Hardware: one 80 GB GPU, or several over --config.mesh.context=-1 --config.mesh.data=1
Expected: not run yet
"""

from configs import base


def get_config():
    """Returns the base config for rows of 32K tokens; the longer configs begin here."""
    config = base.get_config()
    config.model.update(D=512, H=8, G=2, K=64, F=1408, L=8, mlp_tokens=32768)
    config.index.update(A=4, J=64, sink_tokens=64, store="bfloat16")
    config.data.update(source="go", B=8, T=2**15, passkey_share=0.3)
    config.train.update(start_steps=300, start_pattern="wwww")  # as in small.py
    config.train.start_window_tokens = (256, 256, 256, 672)
    config.train.update(steps=2000, learning_rate=1e-3, warmup_steps=100)
    config.train.update(loss_chunk_tokens=8192)
    config.evaluation.update(batches=8, quick_batches=2)
    config.evaluation.update(passkey_tokens=(2**11, 2**13, 2**15))
    return config
