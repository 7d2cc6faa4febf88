"""The promotion ledger on a real store: append, races, replays, rollback, damage, and whom to compare with."""

import dataclasses
import json
import threading

import pytest

from kd_core.artifacts import Artifact
from kd_core.errors import ArtifactError, IntegrityError, VersionError
from kd_core.ledger import Entry, append, champion_before, current, history
from kd_core.store import LocalStore


def artifact(name):
    return Artifact("publish", f"fingerprint-{name}", f"digest-{name}")


def entry(name, previous=None, kind="promote", time=1_700_000_000):
    return Entry("calc", kind, artifact(name), (f"because {name}",), previous, time)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def test_an_empty_ledger(store):
    assert current(store, "calc") is None
    assert history(store, "calc") == ()
    assert champion_before(store, "calc", "digest-a") is None


def test_entries_come_back_as_written_and_models_do_not_mix(store):
    first, second = append(store, "calc", entry("a")), append(store, "calc", entry("b", previous=1))
    assert (first.number, second.number) == (1, 2)
    assert history(store, "calc") == (entry("a"), entry("b", previous=1))
    assert current(store, "calc") == entry("b", previous=1)
    assert [info.key for info in store.list("ledger/")] == ["ledger/calc/000001.json", "ledger/calc/000002.json"]
    assert current(store, "cal") is None
    with pytest.raises(ArtifactError, match="the entry is for calc"):
        append(store, "other", entry("a"))


def test_a_decision_on_an_old_champion_is_refused(store):
    append(store, "calc", entry("a"))
    append(store, "calc", entry("b", previous=1))
    for stale in (None, 1, 7):
        with pytest.raises(ArtifactError, match=r"replaces entry (None|1|7), and the newest is entry 2 \(promote of digest-b\)"):
            append(store, "calc", entry("c", previous=stale))
    assert len(history(store, "calc")) == 2


def test_the_same_move_twice_is_written_once(store):
    append(store, "calc", entry("a"))
    again = append(store, "calc", entry("a", time=1_800_000_000))
    assert again.unix_time == 1_700_000_000
    assert len(history(store, "calc")) == 1


def test_the_loser_of_a_race_is_told(store):
    """Both saw an empty ledger; the winner's entry appears between the loser's look and its write."""

    class Late(LocalStore):
        def create(self, key, data):
            append(store, "calc", entry("winner"))
            return super().create(key, data)

    with pytest.raises(ArtifactError, match=r"the newest is entry 1 \(promote of digest-winner\)"):
        append(Late(store.local_path("x").parent), "calc", entry("loser"))
    assert history(store, "calc") == (entry("winner"),)


def test_many_promoters_one_winner(store):
    outcomes = []

    def promote(name):
        try:
            outcomes.append(append(store, "calc", entry(name)).artifact.digest)
        except ArtifactError:
            outcomes.append(None)

    threads = [threading.Thread(target=promote, args=(f"m{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [digest for digest in outcomes if digest is not None]
    assert winners == [current(store, "calc").artifact.digest]
    assert len(outcomes) == 8


def test_rollback_is_a_new_entry(store):
    append(store, "calc", entry("a"))
    append(store, "calc", entry("b", previous=1))
    append(store, "calc", entry("a", previous=2, kind="rollback"))
    assert current(store, "calc").artifact == artifact("a")
    assert [e.kind for e in history(store, "calc")] == ["promote", "promote", "rollback"]


def test_whom_to_compare_with(store):
    append(store, "calc", entry("a"))
    assert champion_before(store, "calc", "digest-a") is None
    append(store, "calc", entry("b", previous=1))
    append(store, "calc", entry("b", previous=2))
    assert champion_before(store, "calc", "digest-new").number == 3
    assert champion_before(store, "calc", "digest-b").number == 1  # a second run of b meets a again, not itself
    assert champion_before(store, "calc", "digest-a").number == 3


def damage(store, number, change):
    path = store.local_path(f"ledger/calc/{number:06d}.json")
    raw = json.loads(path.read_bytes())
    change(raw)
    path.chmod(0o644)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["entry"]["artifact"].update(digest="digest-evil"), "checksum does not hold"),
        (lambda raw: raw.pop("entry"), "'entry'"),
    ],
)
def test_damage_is_named(store, change, message):
    append(store, "calc", entry("a"))
    damage(store, 1, change)
    with pytest.raises(IntegrityError, match=message):
        current(store, "calc")


def test_another_version_is_refused_by_name(store):
    append(store, "calc", entry("a"))
    damage(store, 1, lambda raw: raw.update(version=7))
    with pytest.raises(VersionError, match=r"000001\.json: a ledger entry of version 7; this code reads version 1; update the package, or"):
        current(store, "calc")


def test_holes_copies_and_foreign_objects_are_named(store):
    append(store, "calc", entry("a"))
    append(store, "calc", entry("b", previous=1))
    second = store.get("ledger/calc/000002.json")
    store.delete("ledger/calc/000001.json")
    with pytest.raises(IntegrityError, match=r"missing \['ledger/calc/000001.json'\], not expected \['ledger/calc/000002.json'\]"):
        append(store, "calc", entry("c", previous=2))
    store.create("ledger/calc/000001.json", second)
    with pytest.raises(IntegrityError, match="entry of another place"):
        history(store, "calc")


def test_entries_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry("a").previous = 5
