import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.errors import SourceError
from kd_core.prompts import estimate_rows, source_identity
from kd_core.prompts.generated import generate_rows, running_totals
from kd_core.recipe import ReasoningGymSource, S3Options


def gym_source(**fields: object) -> ReasoningGymSource:
    return ReasoningGymSource.model_validate({"kind": "reasoning_gym", "task": "chain_sum", "num": 20, "seed": 7, **fields})


def generate(**fields: object) -> list[tuple[str | None, str | None, str | None]]:
    return [(row.prompt, row.gold, row.reference) for row in generate_rows(gym_source(**fields), where="prompts.sources.0")]


@pytest.mark.parametrize(
    ("expression", "prompt", "gold"),
    [
        ("7 + 5", "7+5=", "7+5=12#12"),
        ("7 + 5 - 9", "7+5-9=", "7+5=12,12-9=3#3"),
        ("3 - 9 + 2", "3-9+2=", "3-9=-6,-6+2=-4#-4"),
        ("0 - 0", "0-0=", "0-0=0#0"),
    ],
)
def test_running_totals_by_hand(expression: str, prompt: str, gold: str) -> None:
    assert running_totals(expression) == (prompt, gold)


@given(st.lists(st.integers(0, 9999), min_size=2, max_size=8), st.data())
def test_every_running_total_is_true(terms: list[int], data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from("+-"), min_size=len(terms) - 1, max_size=len(terms) - 1))
    expression = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    prompt, gold = running_totals(expression)
    steps, _, final = gold.rpartition("#")
    assert prompt == expression.replace(" ", "") + "="
    assert all(eval(left) == int(right) for left, right in (step.split("=") for step in steps.split(",")))
    assert int(final) == eval(expression)
    assert len(steps.split(",")) == len(terms) - 1


def test_styles_of_one_family_agree_and_a_larger_num_keeps_the_first_rows() -> None:
    config = {"min_terms": 2, "max_terms": 4, "max_digits": 2}
    questions, totals = generate(config=config), generate(config=config, style="running_totals")
    assert [reference for _, _, reference in questions] == [(gold or "").rpartition("#")[2] for _, gold, _ in totals]
    assert all(gold is None for _, gold, _ in questions)
    assert generate(config=config, num=30)[:20] == questions != generate(config=config, seed=8)


def test_other_families_have_a_reference() -> None:
    assert all(prompt and reference for prompt, _, reference in generate(task="gcd", num=5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chain_sums"}, r"prompts\.sources\.0\.task: .*'chain_sums'; did you mean .*chain_sum"),
        ({"task": "zzzzqq"}, r"there are: .*chain_sum"),
        ({"config": {"max_term": 3}}, r"sources\.0\.config: chain_sum has no setting 'max_term'; did you mean max_terms"),
        ({"config": {"size": 3}}, r"has no setting 'size'.*stand beside it"),
        ({"config": {"min_terms": 0}}, r"sources\.0\.config: chain_sum refuses .*min_terms must be positive"),
        ({"config": {"max_terms": "x"}}, r"sources\.0\.config: chain_sum refuses"),
        ({"task": "gcd", "style": "running_totals"}, r"sources\.0\.style: running_totals is for chain_sum only, found gcd"),
        ({"config": {"allow_negation": True}, "style": "running_totals"}, r"config\.allow_negation: running_totals"),
        ({"config": {"min_terms": 1}, "style": "running_totals"}, r"config\.min_terms: a running total needs two terms"),
    ],
)
def test_what_the_package_would_not_take_is_said_clearly(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        generate(**fields)


def test_identity_has_the_package_version_and_estimate_is_num() -> None:
    identity = source_identity(gym_source(), s3=S3Options())
    assert set(identity) == {"version", "kind", "task", "config", "num", "seed", "style"}
    assert identity["version"]
    assert estimate_rows(gym_source(num=33)) == 33


def test_reading_a_plan_does_not_import_the_slow_packages() -> None:
    slow = ("reasoning_gym", "datasets", "math_verify", "torch", "boto3")
    code = f"import kd_core.prompts, sys; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
