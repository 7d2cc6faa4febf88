"""Checkpoints: atomic, verified, the newest whole one wins.

    checkpoints/<fingerprint>/<step>/<sha256>.pt   the state
    checkpoints/<fingerprint>/<step>/record.json   written last, sealed: fingerprint, step, the state's sha256

A state holds all that a run needs to go on bit for bit: ``model`` and ``optimiser`` (whole, whatever the number of ranks), ``history``
(what was logged, the validations that learning rate, early stopping and the best step follow from), ``average`` (moving average of
the weights, or None), ``best`` (weights with the least validation loss so far, or None) and, where the objective has features,
``feature_loss`` (their projections). The place in the data and random numbers are functions of the seed and the step, and need no
saving. Because each state holds the best weights too, the newest ones are all that is kept; a finished run removes them.

A damaged checkpoint is named and passed over for an older whole one. Only tensors and plain values are loaded (``weights_only``).
"""

import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_core.errors import IntegrityError, StoreError, TrainingError
from kd_core.failpoints import reach
from kd_core.fingerprint import sha256_file
from kd_core.store import Store
from kd_core.store.scratch import scratch
from kd_core.store.sealed import check_object, read_parsed, seal, unseal

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoints"]

READ_BYTES = 256 << 20
"""States up to this size are read whole only to say from which a run would go on (0.2 s on a local disk)."""
_KEY = re.compile(r"checkpoints/[^/]+/(\d+)/record\.json")
_ADVICE = "kd cache repair puts it aside"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run, named by its fingerprint; the ``keep`` newest stay."""

    store: Store
    fingerprint: str
    keep: int = 2

    def _prefix(self, step: int | None = None) -> str:
        return f"checkpoints/{self.fingerprint}/" + ("" if step is None else f"{step:08d}")

    def record_key(self, step: int) -> str:
        """Object key of a checkpoint's record."""
        return f"{self._prefix(step)}/record.json"

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, rising."""
        return sorted(int(found[1]) for info in self.store.list(self._prefix()) if (found := _KEY.fullmatch(info.key)))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` optimiser steps, then forget the older ones but the newest.

        Raises:
            StoreError: there is no space for it, with path and bytes; older checkpoints stay.
        """
        import torch

        with scratch() as folder:
            path = folder / "state.pt"
            torch.save(state, path)
            sha256 = sha256_file(path)
            self._write(f"{self._prefix(step)}/{sha256}.pt", path)
        reach("checkpoint.state")
        body = {"fingerprint": self.fingerprint, "step": step, "state": sha256}
        self._write(self.record_key(step), seal("checkpoint", body))
        reach("checkpoint.record")
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            self._remove(self._prefix(old))

    def _write(self, key: str, data: bytes | Path) -> None:
        """Write an object; other bytes under its name are a damaged checkpoint that was passed over, and make room."""
        if not self.store.create(key, data):
            self.store.delete(key)
            if not self.store.create(key, data):
                raise TrainingError(f"{self.store.uri}/{key}: another run writes other bytes here at the same time; end one, and run again")

    def load_newest(self, device: "torch.device") -> tuple[int, dict[str, Any]] | None:
        """Load (step, state) of the newest whole checkpoint, or None. A damaged one is told, and stays where it is.

        Raises:
            VersionError: it is of another version.
            StoreError: the store failed.
        """
        for step in reversed(self.steps()):
            try:
                return step, self._load(step, device)
            except IntegrityError as error:
                if self.store.info(self.record_key(step)) is not None:
                    _LOG.warning("%s; training goes on from an older checkpoint, or from the beginning", error)
            except StoreError:
                if self.store.info(self.record_key(step)) is not None:
                    raise
                # else another worker of the same run has gone on, or finished, and removed it meanwhile
        return None

    def newest_whole(self) -> int | None:
        """Step from which a run would go on; the bytes of states over ``READ_BYTES`` are not read for it."""
        for step in reversed(self.steps()):
            try:
                self.check(step, at_most_bytes=READ_BYTES)
            except IntegrityError:
                continue
            return step
        return None

    def check(self, step: int, *, at_most_bytes: int | None = None) -> None:
        """Check a checkpoint where it is: its record, and the bytes of its state; of a larger state than said, that it is there.

        Raises:
            IntegrityError: its record or its state is damaged, or gone.
            VersionError: it is of another version.
        """
        key, sha256 = self._read_record(step)
        info = self.store.info(key)
        if info is None or at_most_bytes is None or info.size_bytes <= at_most_bytes:
            check_object(self.store, key, sha256, advice=_ADVICE)

    def _read_record(self, step: int) -> tuple[str, str]:
        parse = partial(_parse, self.fingerprint, step)
        sha256 = read_parsed(self.store, self.record_key(step), parse, what="checkpoint record", advice=_ADVICE)
        return f"{self._prefix(step)}/{sha256}.pt", sha256

    def _load(self, step: int, device: "torch.device") -> dict[str, Any]:
        import torch

        key, sha256 = self._read_record(step)
        with scratch() as folder:
            path = folder / "state.pt"
            check_object(self.store, key, sha256, advice=_ADVICE, download=path)
            state: dict[str, Any] = torch.load(self.store.local_path(key) or path, map_location=device, weights_only=True)
            return state

    def clear(self) -> None:
        """Remove all checkpoints of this run."""
        self._remove(self._prefix())

    def _remove(self, prefix: str) -> None:
        for info in sorted(self.store.list(prefix), key=lambda info: not info.key.endswith("/record.json")):
            self.store.delete(info.key)


def _parse(fingerprint: str, step: int, data: bytes) -> str:
    """The sha256 of the state."""
    body = unseal("checkpoint", data)
    if (body["fingerprint"], body["step"]) != (fingerprint, step):
        raise ValueError(f"it is the record of step {body['step']} of {body['fingerprint']}")
    return str(body["state"])
