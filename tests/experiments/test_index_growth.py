"""A flat route scores what is open to a token, levels score less; and rows are compared by nats and by all their costs."""

import dataclasses

import numpy as np

from bsa.train import settings
from configs import base
from experiments import index_growth

MODEL = settings.from_config(base.get_config()).model


def test_levels_score_fewer_nodes_the_longer_the_text():
    index, tokens = MODEL.index, 2**15
    place = np.linspace(tokens // 2, tokens - 1, index_growth.SAMPLED_TOKENS, dtype=int)
    found = index_growth.count_scored(index, tokens, 256)
    assert found == (place // 16 - 16).mean(), "all but sink and window"
    one, two = (
        index_growth.count_scored(
            dataclasses.replace(index, route="chapters", chapter_levels=levels),
            *(tokens, 256),
        )
        for levels in (1, 2)
    )
    assert two < one < found / 5


def test_a_case_is_beaten_by_what_is_cheaper_and_better(tmp_path):
    def row(case, nats, router):
        costs = dict.fromkeys(("router_bytes", "attention_flops", "attention_bytes"), 1)
        return (
            {"case": case, "text": "a", "nats": nats} | costs | {"router_flops": router}
        )

    ours, dear, worse = row("ours", 2.0, 5), row("dear", 1.0, 6), row("worse", 3.0, 1)
    said = index_growth.judge(ours, [ours, dear, worse], MODEL)
    assert [line.partition("beaten by ")[2] for line in said] == ["nothing", "dear"]

    rows = [
        index_growth.cost(MODEL, tokens, levels, 800.0)
        for tokens in index_growth.TOKENS[:1]
        for levels in index_growth.LEVELS
    ]
    index_growth.draw(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5_000
    assert rows[0]["total_flops"] == rows[0]["router_flops"] + 4 * 64 * 4 * 800
