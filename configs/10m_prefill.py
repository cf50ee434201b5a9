"""Reads rows of 10,485,760 bytes of Go with the model that configs/1m.py trained, forward only.

Command: python -m bsa.main --config=configs/10m_prefill.py --workdir=runs/1m --mode=evaluate
Hardware: several GPUs or TPUs that share a row: --config.mesh.context=-1 --config.mesh.data=1
Expected: not run yet
"""

from configs import base


def get_config():
    """Returns the config of 1M tokens with rows of 10M, for --mode=evaluate."""
    config = base.get_config()
    config.model.update(D=512, H=8, G=2, K=64, F=1408, L=8, mlp_tokens=32768)
    config.index.update(A=4, J=64, sink_tokens=64)
    config.index.update(route="chapters", chapter_bookmarks=32, chapter_R=8, beam=8)
    config.index.update(chapter_levels=2)
    config.data.update(source="go", B=1, T=10 * 2**20, passkey_share=0.2)
    config.data.update(cross_document=True, packing_bins=1, prefetch_batches=1)
    config.train.update(loss_chunk_tokens=16384)
    config.evaluation.update(batches=1, quick_batches=1, passkey_samples=1)
    config.evaluation.update(passkey_tokens=(10 * 2**20,), passkey_depths=3)
    config.mesh.update(capacity_blocks=2048)
    return config
