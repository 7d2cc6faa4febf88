"""The promotion ledger: which artifact is champion, and every one that was, as append-only entries in the store.

    ledger/<model>/000001.json, 000002.json ...   {"entry": ..., "sha256": over the entry's canonical JSON}

The newest entry names the champion; registry aliases follow it. An entry says which entry it replaces, and its number is
one more, so that two promoters who saw the same champion compete for one key and the store lets one of them win.
Nothing is rewritten: a rollback is a new entry. An entry that vanished would leave an older champion, or none, to be
compared with: so the ledger is held against the publication records, which say which entry they saw.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, cast

from kd_core.artifacts import Artifact, find, record_keys
from kd_core.errors import ArtifactError, IntegrityError
from kd_core.store import Store
from kd_core.store.sealed import read_parsed, seal, unseal
from kd_core.summaries import LedgerReference, PublishSummary, of

__all__ = ["Entry", "append", "champion_before", "check_against_records", "current", "history", "lost_entry", "seen_in"]


@dataclass(frozen=True)
class Entry:
    """One move of the champion.

    Attributes:
        model: registered model name.
        kind: promote or rollback.
        artifact: what became champion; its ``seconds`` and ``hit`` are not kept.
        reasons: lines for the audit: the verdict, or who rolled back and why.
        previous: number of the entry this one replaces, as the writer saw it; None for the first.
        unix_time: when it was decided, seconds.
    """

    model: str
    kind: Literal["promote", "rollback"]
    artifact: Artifact
    reasons: tuple[str, ...]
    previous: int | None
    unix_time: int

    @property
    def number(self) -> int:
        """1 for the first entry of a model; one more than ``previous`` after that."""
        return (self.previous or 0) + 1

    def same_move(self, other: "Entry") -> bool:
        """Whether both make the same artifact champion in the same place; time and reasons may differ."""
        return _identity(self) == _identity(other)


def append(store: Store, model: str, entry: Entry) -> Entry:
    """Write the next entry: the commit of a promotion or rollback.

    Sending the same move twice (a retry, a doubled event, a lost reply) writes it once: the second gets the stored entry.

    Returns:
        The entry that the ledger holds under this number.

    Raises:
        ArtifactError: another entry was appended since ``entry.previous``; the decision rests on an old champion.
        IntegrityError: the ledger is damaged.
    """
    if entry.model != model:
        raise ArtifactError(f"ledger of {model}: the entry is for {entry.model}")
    latest = current(store, model)
    seen = latest.number if latest else None
    if seen == entry.previous and store.create(_key(model, entry.number), _encode(entry)):
        return entry
    held = current(store, model)
    if held is not None and held.same_move(entry):
        return held
    found = "nothing" if held is None else f"entry {held.number} ({held.kind} of {held.artifact.digest})"
    raise ArtifactError(
        f"{store.uri}: the {model} ledger has moved: this {entry.kind} of {entry.artifact.digest} replaces entry {entry.previous}, "
        f"and the newest is {found}; evaluate against the current champion and decide again"
    )


def history(store: Store, model: str) -> tuple[Entry, ...]:
    """All entries of a model, oldest first, each verified.

    Raises:
        IntegrityError: a number is missing, or an entry's bytes are not what was written.
    """
    return tuple(_read(store, model, number) for number in range(1, _num_entries(store, model) + 1))


def current(store: Store, model: str) -> Entry | None:
    """The newest entry, which names the champion; None if there never was one.

    Raises:
        IntegrityError: as ``history``.
    """
    number = _num_entries(store, model)
    return _read(store, model, number) if number else None


def champion_before(store: Store, model: str, digest: str | None) -> Entry | None:
    """The champion that an artifact has to be compared with, once the ledger has been held against the publication records.

    It is the current one, unless that is this very artifact: then the newest earlier entry with other bytes, so that a
    second identical run meets the same opponent and decides the same.

    Args:
        store: where the ledger is.
        model: registered model name.
        digest: digest of the artifact to decide on; None while it is not made.

    Raises:
        IntegrityError: as ``check_against_records``.
    """
    return next((entry for entry in reversed(check_against_records(store, model)) if entry.artifact.digest != digest), None)


def _key(model: str, number: int) -> str:
    return f"ledger/{model}/{number:06d}.json"


def _num_entries(store: Store, model: str) -> int:
    found = [info.key for info in store.list(f"ledger/{model}/")]
    expected = [_key(model, number) for number in range(1, len(found) + 1)]
    if found != expected:
        missing, foreign = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise IntegrityError(
            f"{store.uri}: the {model} ledger has holes or foreign objects: missing {missing}, not expected {foreign}; "
            "restore it from a backup"
        )
    return len(found)


def _identity(entry: Entry) -> dict[str, Any]:
    artifact = {"stage": entry.artifact.stage, "fingerprint": entry.artifact.fingerprint, "digest": entry.artifact.digest}
    return {"model": entry.model, "kind": entry.kind, "artifact": artifact, "previous": entry.previous}


def _encode(entry: Entry) -> bytes:
    body = {**_identity(entry), "number": entry.number, "reasons": list(entry.reasons), "unix_time": entry.unix_time}
    return seal("entry", body)


def _read(store: Store, model: str, number: int) -> Entry:
    parse = partial(_parse, model, number)
    return read_parsed(store, _key(model, number), parse, what="ledger entry", advice="restore it from a backup")


def _parse(model: str, number: int, data: bytes) -> Entry:
    body = unseal("entry", data)
    if (body["model"], body.pop("number")) != (model, number):
        raise ValueError("it is the entry of another place")
    entry = Entry(**{**body, "artifact": Artifact(**body["artifact"]), "reasons": tuple(body["reasons"])})
    if entry.number != number:
        raise ValueError(f"it replaces entry {entry.previous}")
    return entry


# ---------------------------------------------------------------------------------------------- held against what others saw


def seen_in(entry: Entry | None) -> LedgerReference | None:
    """Reference to an entry that was seen, for ``lost_entry``; None for no entry."""
    return None if entry is None else LedgerReference(entry.number, entry.artifact.digest)


def lost_entry(entries: tuple[Entry, ...], number: int, digest: str) -> str | None:
    """What is wrong with a ledger in which somebody saw this entry; None if it is there."""
    if number > len(entries):
        return f"it ends with entry {len(entries)}" if entries else "it has no entry"
    if entries[number - 1].artifact.digest != digest:
        return f"its entry {number} is of {entries[number - 1].artifact.digest}"
    return None


def check_against_records(store: Store, model: str) -> tuple[Entry, ...]:
    """The whole history of a model, held against the publication records of the store.

    Raises:
        IntegrityError: a record saw an entry that the ledger does not have; or ledger or record are damaged.
        ArtifactError: the summary of a record is not of this version.
    """
    keys = record_keys(store, "publish")  # before the ledger: an entry is written before the record that names it
    entries = history(store, model)
    with ThreadPoolExecutor(_READERS) as pool:
        seen = list(pool.map(lambda key: _seen(cast(Any, store), key), keys))  # any store is hashable, by its identity
    for key, found in zip(keys, seen, strict=True):
        if found is None or found[0] != model:
            continue
        _, number, digest = found
        if (reason := lost_entry(entries, number, digest)) is not None:
            raise IntegrityError(
                f"{store.uri}/{_key(model, number)}: {store.uri}/{key} saw entry {number} of the {model} ledger make {digest} champion, "
                f"and the ledger disagrees: {reason}. Restore the ledger from a backup; if the step back is meant, delete that record"
            )
    return entries


_READERS = 16


@lru_cache(maxsize=4096)
def _seen(store: Store, key: str) -> tuple[str, int, str] | None:
    """(model, entry number, digest) in a publication record; None if it saw no entry. Records do not change, so each is read once."""
    record = find(store, "publish", key.split("/")[2])
    summary = None if record is None else of(record, PublishSummary)
    return None if summary is None or summary.ledger is None else (summary.model, summary.ledger.number, summary.ledger.digest)
