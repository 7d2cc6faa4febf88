"""Move what ``verify`` found damaged out of the way, so that the next run computes those rows again.

Nothing is thrown away: an object is copied to ``quarantine/<its key>`` before it is deleted. Records that froze a lost
shard go first, then its commit, then the shard: a repair that is killed half-way leaves work to do, never a false record.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kd_core.artifacts import Record
from kd_core.cache.verify import Damage, frozen_records
from kd_core.errors import StoreError
from kd_core.fingerprint import sha256_bytes
from kd_core.progress import Tick, Ticker, silent
from kd_core.store import Store

__all__ = ["Move", "plan_repair", "repair"]


@dataclass(frozen=True)
class Move:
    """One object to be put aside: its key, and why."""

    key: str
    reason: str


def plan_repair(store: Store, damage: Sequence[Damage]) -> tuple[Move, ...]:
    """List what has to be put aside, in the order in which it is done. Changes nothing."""
    lost = {found.shard: found for found in damage if found.shard is not None}
    records: dict[str, str] = {}
    for key, record in frozen_records(store):
        frozen = sorted(lost.keys() & set(record.summary["commits"])) if isinstance(record, Record) else []
        if frozen:
            records[key] = f"it froze the lost shard {frozen[0][:12]}"
    commits = {key: f"commit of the lost shard {str(found.shard)[:12]}" for found in damage for key in found.also}
    own = {found.key: found.reason for found in damage}
    steps = [*(key for key in own if key.startswith("artifacts/")), *records, *commits, *own]
    reasons = {**commits, **records, **own}
    there = (key for key in dict.fromkeys(steps) if store.info(key) is not None)
    return tuple(Move(key, reasons[key]) for key in there)


def repair(store: Store, moves: Sequence[Move], *, tick: Ticker = silent) -> None:
    """Put objects aside, in order.

    Raises:
        StoreError: the store failed; what is not moved yet stays as it is.
    """
    for done, move in enumerate(moves, 1):
        _put_aside(store, move.key)
        tick(Tick(done, len(moves), "objects"))


def _put_aside(store: Store, key: str) -> None:
    data = store.get(key)
    for name in (f"quarantine/{key}", f"quarantine/{key}.{sha256_bytes(data)[:16]}"):  # the name may hold an earlier damage
        if store.create(name, data):
            return store.delete(key)
    raise StoreError(f"{store.uri}/quarantine/{key} holds other bytes; move it elsewhere and run again")
