"""``kd status`` of a whole store, and which recipes use a row store."""

import json
from typing import Any

import pytest

from kd_core.artifacts import find, forget
from kd_core.cache.contents import reported
from kd_core.store import LocalStore


def test_a_store_shows_its_recipes_row_stores_and_sizes(finished: Any, kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.home)
    said = json.loads(kd("status", "--json").out)
    assert set(said) == {"store", "recipes", "namespaces", "sizes"}
    [recipe] = said["recipes"]
    assert (recipe["name"], recipe["model"], recipe["promote"]) == ("small", "small-student", True)
    assert recipe["headline"] == finished.said["verdict"]["headline"]
    assert (recipe["champion"]["number"], recipe["champion"]["is_this_student"]) == (1, True)
    assert sorted(row["namespace"] for row in said["namespaces"]) == recipe["namespaces"]
    assert {row["table"] for row in said["namespaces"]} == {"answers", "soft_labels"}
    store = LocalStore(finished.store)
    assert sum(part["bytes"] for part in said["sizes"].values()) == sum(info.size_bytes for info in store.list(""))
    shown = kd("status").out
    assert all(word in shown for word in ("small", "this student", finished.said["verdict"]["headline"], "used by small", " in all: "))


def test_the_row_stores_name_the_recipes_that_use_them(copy: Any, kd: Any) -> None:
    assert [row["recipes"] for row in json.loads(kd("cache", "ls", "--json").out)["namespaces"]] == [["small"], ["small"]]
    store = LocalStore(copy.store)
    report = next(node["fingerprint"] for node in copy.said["nodes"] if node["name"] == "report")
    record = find(store, "report", report)
    assert record is not None
    forget(store, record)
    assert reported(store) == []
    assert "in no report yet" in kd("cache", "ls").out
    assert kd("status").out.startswith("No recipe has come to a report here yet.\n")


def test_a_store_or_a_recipe_not_both(finished: Any, kd: Any, tmp_path: Any) -> None:
    assert kd("status", "--store", str(finished.store)).code == 0
    for words, said in (
        (("status", finished.recipe_file, "--store", "x"), "a recipe names its store itself"),
        (("status", "--set", "seeds=[1]"), "there is no recipe to change"),
        (("status",), f"no store at {tmp_path / '.kd/store'}: name one with --store"),
    ):
        called = kd(*words)
        assert (called.code, called.out) == (2, "")
        assert said in called.err
