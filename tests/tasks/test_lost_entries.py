"""A ledger that lost an entry: nothing is promoted, whoever still knows of the entry is named with it."""

import json
import shutil

from kd_core.artifacts import Artifact
from kd_core.ledger import Entry, append, history
from kd_core.store import LocalStore


def _again(kd, copy):
    """A run into the copy's own registry."""
    return kd("run", "--local", "--json", copy.recipe_file, "--set", f"run.tracking={copy.tracking}")


def test_the_registry_knows_what_the_store_has_forgotten(copy, kd) -> None:
    assert _again(kd, copy).code == 0
    shutil.rmtree(copy.store / "ledger")
    shutil.rmtree(copy.store / "artifacts/publish")
    called = _again(kd, copy)
    assert (called.code, called.out) == (1, "")
    assert "small-student" in called.err
    assert "was promoted by entry 1" in called.err
    assert "the ledger disagrees: it has no entry" in called.err
    assert history(LocalStore(copy.store), "small-student") == ()


def test_a_refused_student_is_not_promoted_because_an_entry_vanished(copy, kd) -> None:
    """A student that the champion beats; the champion's entry goes; the same command is an error, and no promotion."""
    store = LocalStore(copy.store)
    [first] = history(store, "small-student")
    recipe = (copy.recipe_file, "--set", "seeds=[1]", "--set", "gate.rules=[{kind: floor, metric: pass_at_1, minimum: 1.0}]")
    called = kd("run", "--local", "--json", *recipe)
    assert (called.code, json.loads(called.out)["verdict"]["promote"]) == (0, False)
    other = Artifact("train", first.artifact.fingerprint, first.artifact.digest)
    append(store, "small-student", Entry("small-student", "rollback", other, ("back",), 1, 0))
    assert kd("run", "--local", "--json", *recipe).code == 0
    (copy.store / "ledger/small-student/000001.json").unlink()
    for command in (("run", "--local"), ("status",), ("report",)):
        called = kd(*command, "--json", *recipe)
        assert (called.code, called.out) == (1, "")
        assert "ledger" in called.err
    (copy.store / "ledger/small-student/000002.json").unlink()
    called = kd("run", "--local", "--json", *recipe)
    assert (called.code, called.out) == (1, "")
    assert "ledger/small-student/000001.json" in called.err
    assert "artifacts/publish/" in called.err
    assert history(store, "small-student") == ()
