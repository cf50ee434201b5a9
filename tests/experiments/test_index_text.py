"""Routes through a long text are compared with the flat one, and none catches more than the best choice."""

import numpy as np

from experiments import index_text


def test_each_way_to_route(tmp_path):
    random = np.random.default_rng(0)
    tokens = 2 * 16 * 32 * 32  # a volume of clusters is complete
    k_TGK = random.normal(size=(tokens, 1, 8)).astype(np.float16)
    q_THK = 3 * random.normal(size=(tokens, 2, 8)).astype(np.float16)
    variants = ("flat", "chapters-2-beam64", "clusters", "graph")
    rows = list(index_text.measure(q_THK, k_TGK, 6, variants))
    assert [row["variant"] for row in rows] == list(variants)
    assert [row["levels"] for row in rows] == [0, 2, 1, 1]
    assert rows[0]["recall"] == rows[0]["share_scored"] == 1
    assert all(0 < row["mass_caught"] <= row["oracle_mass"] for row in rows)
    index_text.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
