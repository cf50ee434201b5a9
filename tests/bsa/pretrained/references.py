"""Makes references.npz: logits that transformers computes from the checkpoints of `checkpoints.py`, on a CPU in float32.

Command: python -m tests.bsa.pretrained.references [GGUF]
    in an environment with torch and transformers; these were made with torch 2.14.1 and transformers 5.23.0. With the path
    of SmolLM2-135M-Instruct.Q4_1.gguf the file also gets that model's logits after `SENTENCE`.
"""

import pathlib
import sys
import tempfile

import numpy as np

from tests.bsa.pretrained import checkpoints

FILE = pathlib.Path(__file__).with_name("references.npz")
SENTENCE = "Emma Woodhouse, handsome, clever, and rich, 12 345 naïve\n\tcafés: 日本"
KEPT = 64
"""Logits that are kept of each position of the real model, evenly spread over its vocabulary."""


def logits(folder, token_BT, **options) -> np.ndarray:
    """float32[T, V] of a checkpoint, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.no_grad():
        return model(torch.tensor(token_BT)).logits[0].numpy()


def main() -> None:
    """Writes the file; the real model's part stays as it was unless its path is given."""
    found = {}
    if FILE.exists():
        found = {k: v for k, v in np.load(FILE).items() if k.startswith("real_")}
    for name in checkpoints.CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = checkpoints.config(name)
            checkpoints.write(config, pathlib.Path(folder))
            found[name] = logits(folder, checkpoints.tokens())
    if sys.argv[1:]:
        import transformers

        path = pathlib.Path(sys.argv[1])
        where = {"gguf_file": path.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        ids = tokenizer(SENTENCE)["input_ids"]
        real = logits(path.parent, [ids], **where)
        found["real_tokens"] = np.array(ids)
        found["real_logits"] = real[:, :: real.shape[1] // KEPT]
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
