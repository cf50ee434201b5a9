"""Costs of router and attention are what a hand count gives, and the picture shows them."""

import dataclasses

import pytest

from bsa.train import settings
from configs import base
from experiments import selector_loss


def sizes(pattern="b", **index):
    config = base.get_config()
    config.model.update(H=6, G=2, K=8, pattern=pattern, positions="r" * len(pattern))
    config.model.window_tokens = (256,) * len(pattern)
    config.index.update(C=4, query_block=8, R=3, sink_tokens=4, **index)
    return settings.from_config(config).model


FOUND = {"scored_nodes": 100.0, "union_tokens": 50.0}


def test_a_flat_route_is_read_once_a_query_block():
    found = selector_loss.costs(sizes(query_pool="heads"), FOUND)
    assert found == {
        "router_flops": 100 * 3 * 6 * 8 * 2,
        "router_bytes": 100 * 3 * 2 * 8 * 2 / 8,
        "attention_flops": 50 * 6 * 8 * 4,
        "attention_bytes": 50 * 2 * 8 * 2 * 2 / 8,
    }


def test_pooled_queries_score_once_a_group_and_shortlists_cost_their_keys():
    found = selector_loss.costs(sizes(query_pool="mean", X=20, A=5), FOUND)
    assert found["router_flops"] == (100 * 3 + 20 * 4) * 2 * 8 * 2
    assert found["router_bytes"] == (100 * 3 / 8 + 20 * 4) * 2 * 8 * 2
    half = selector_loss.costs(sizes("bf", query_pool="mean", X=20, A=5), FOUND)
    assert half["router_flops"] == found["router_flops"] / 2
    assert half["attention_flops"] == found["attention_flops"]


@pytest.mark.parametrize("case", selector_loss.CASES)
def test_every_case_is_a_possible_index(case):
    config = base.get_config()
    config.index.update(selector_loss.CASES[case])
    settings.from_config(config)


def test_the_default_is_among_the_cases():
    index = settings.from_config(base.get_config()).model.index
    knobs = selector_loss.CASES[selector_loss.DEFAULT]
    assert dataclasses.replace(index, **knobs) == index


def test_the_picture_shows_what_nothing_beats(tmp_path):
    rows = [
        {"text": "set.mm", "case": f"{i}", "nats": nats}
        | dict.fromkeys(("router_flops", "router_bytes"), cost)
        | dict.fromkeys(("attention_flops", "attention_bytes"), 1.0)
        for i, (cost, nats) in enumerate([(1, 3.0), (2, 3.5), (3, 2.0)])
    ]
    selector_loss.draw(rows, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5_000
