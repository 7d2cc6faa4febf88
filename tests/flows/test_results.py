"""The terminal's lines of a finished run: every suite, what intervals are about, items without a value."""

from flows.cli.results import _about, _shown


def metric(value: float, n: int = 40, left_out: int = 0) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "left_out": left_out}


MODEL = {"metrics": {"pass_at_1": metric(0.5), "truncated": metric(0.2), "second/pass_at_1": metric(0.3, 38, 2), "second/nll": metric(1.5)}}


def test_each_suite_shows_its_own_metrics() -> None:
    assert _shown(MODEL, "first", {"suite": "first"}) == "pass_at_1 0.500 [0.400, 0.600]"
    assert _shown(MODEL, "second", {"suite": "first"}) == "pass_at_1 0.300 [0.200, 0.400] on 38 of 40 items, nll 1.500 [1.400, 1.600]"
    assert _shown(MODEL, "third", {"suite": "first"}) == "not measured"


def test_what_the_intervals_are_about_is_said() -> None:
    assert _about({"seeds": [0]}) == "these checkpoints on new items (1 seed: nothing about the recipe)"
    several = _about({"seeds": [0, 1, 2], "published_seed": 1})
    assert several == "the recipe on new items and seeds (3 seeds; seed 1 would be published)"
