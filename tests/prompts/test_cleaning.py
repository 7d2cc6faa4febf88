import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.prompts.cleaning import clean, normalise, prompt_id, side_of
from kd_core.recipe import Split

TEXTS = [str(i) for i in range(4000)]


def test_clean_is_nfc_with_plain_line_ends() -> None:
    assert clean("\r\n e\u0301\r\nb\rc \t") == "é\nb\nc"


def test_normalise_joins_case_width_and_white_space_and_loses_nothing_of_a_program() -> None:
    assert normalise("\uff28ow  MANY\n\u00a0Straßen?") == "how many strassen?"
    programs = ["7+5=", "7-5=", "7+5-9=", "75="]
    assert [normalise(program) for program in programs] == programs


@given(st.text())
def test_cleaning_never_changes_what_a_prompt_equals(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert normalise(clean(text)) == normalise(text)
    assert unicodedata.is_normalized("NFC", clean(text))


def test_prompt_id_is_the_hash_of_the_normalised_text() -> None:
    assert prompt_id("7+5=") == hashlib.sha256(b"7+5=").hexdigest()[:32]


def test_shares_are_met_and_larger_shares_keep_what_was_held_out() -> None:
    small, large = Split(validation=0.1, test=0.2), Split(validation=0.2, test=0.3)
    before, after = [side_of(text, small) for text in TEXTS], [side_of(text, large) for text in TEXTS]
    for side, share in (("validation", 0.1), ("test", 0.2), ("train", 0.7)):
        assert before.count(side) / len(TEXTS) == pytest.approx(share, abs=0.03)
    assert all(new == old for old, new in zip(before, after, strict=True) if old != "train")


def test_the_side_is_not_the_identity_and_never_moves() -> None:
    split = Split(validation=0.0, test=0.5)
    assert {side_of(text, Split(validation=0.0, test=0.0)) for text in TEXTS} == {"train"}
    low_ids = [side_of(text, split) for text in TEXTS if prompt_id(text) < "8"]
    assert low_ids.count("test") / len(low_ids) == pytest.approx(0.5, abs=0.05)
    assert [side_of(text, split) for text in ("0", "1", "2", "3", "7+5=")] == ["test", "train", "test", "test", "train"]
