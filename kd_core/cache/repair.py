"""Move what ``verify`` found damaged out of the way, so that the next run computes it again.

Nothing is thrown away: an object is copied to ``quarantine/<its key>`` before it is deleted. Records go first (those that are
damaged, whose files are, or that froze a lost shard), then commits, then the rest: a repair that is killed half-way leaves work
to do, never a false record. The ledger is not touched: without an entry another student would be champion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kd_core.artifacts import Record
from kd_core.cache.verify import Damage, readable_records
from kd_core.errors import StoreError
from kd_core.fingerprint import sha256_bytes
from kd_core.progress import Tick, Ticker, silent
from kd_core.store import Store
from kd_core.summaries import shards_of

__all__ = ["Move", "plan_repair", "repair"]


@dataclass(frozen=True)
class Move:
    """One object to be put aside: its key, and why."""

    key: str
    reason: str


def plan_repair(store: Store, damage: Sequence[Damage]) -> tuple[Move, ...]:
    """List what has to be put aside, in the order in which it is done. Changes nothing."""
    lost = {found.shard: found for found in damage if found.shard is not None}
    frozen: dict[str, str] = {}
    for key, record in readable_records(store):
        own = shards_of(record) if isinstance(record, Record) else None
        if own is not None and (shards := sorted(lost.keys() & set(own.commits))):
            frozen[key] = f"it froze the lost shard {shards[0][:12]}"
    also = {key: f"nothing without {found.key.rpartition('/')[2][:24]}" for found in damage for key in found.also}
    itself = {found.key: found.reason for found in damage if not found.key.startswith("ledger/")}
    reasons = {**also, **frozen, **itself}
    steps = sorted(reasons, key=lambda key: (not key.endswith("/record.json"), key not in also, key))
    return tuple(Move(key, reasons[key]) for key in steps if store.info(key) is not None)


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
