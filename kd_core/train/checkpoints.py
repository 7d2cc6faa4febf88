"""Checkpoints: atomic, verified, the newest complete one wins.

    checkpoints/<fingerprint>/<step>/<sha256>.pt   the state
    checkpoints/<fingerprint>/<step>/record.json   written last, with the sha256 and the version of the state

A state holds all that a run needs to go on bit for bit: ``model`` and ``optimiser`` (whole, whatever the number of ranks), ``history``
(what was logged, the validations that learning rate, early stopping and the best step follow from), ``average`` (moving average of
the weights, or None), ``best`` (weights with the least validation loss so far, or None) and, where the objective has features,
``feature_loss`` (their projections). The place in the data and random numbers are functions of the seed and the step, and need no
saving. Because each state holds the best weights too, the newest ones are all that is kept; a finished run removes them.

Only tensors and plain values are loaded (``weights_only``).
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_core.errors import IntegrityError, StoreError
from kd_core.failpoints import reach
from kd_core.fingerprint import sha256_file
from kd_core.store import Store
from kd_core.store.versions import VERSION, expect_version

__all__ = ["Checkpoints"]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run, named by its fingerprint; the ``keep`` newest stay."""

    store: Store
    fingerprint: str
    keep: int = 2

    def _prefix(self, step: int | None = None) -> str:
        return f"checkpoints/{self.fingerprint}/" + ("" if step is None else f"{step:08d}")

    def steps(self) -> list[int]:
        """List the steps of complete checkpoints, rising."""
        return sorted(int(info.key.split("/")[-2]) for info in self.store.list(self._prefix()) if info.key.endswith("/record.json"))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` optimiser steps, then forget all but the newest."""
        with tempfile.TemporaryDirectory(prefix="kd-") as name:
            path = Path(name) / "state.pt"
            torch.save(state, path)
            sha256 = sha256_file(path)
            self.store.create(f"{self._prefix(step)}/{sha256}.pt", path)
        reach("checkpoint.state")
        self.store.create(f"{self._prefix(step)}/record.json", json.dumps({"sha256": sha256, "version": VERSION}).encode())
        reach("checkpoint.record")
        for old in self.steps()[: -self.keep]:
            self._remove(self._prefix(old))

    def load_newest(self, device: torch.device) -> tuple[int, dict[str, Any]] | None:
        """Load (step, state) of the newest complete checkpoint; None without one.

        Raises:
            IntegrityError: its bytes are not the recorded ones.
            VersionError: it is of another version.
        """
        for step in reversed(self.steps()):
            try:
                return step, self._load(step, device)
            except StoreError:
                if step in self.steps():
                    raise
                # else another worker of the same run has gone on, or finished, and removed it meanwhile
        return None

    def _load(self, step: int, device: torch.device) -> dict[str, Any]:
        record = json.loads(self.store.get(f"{self._prefix(step)}/record.json"))
        where = f"{self.store.uri}/{self._prefix(step)}"
        expect_version(record.get("version"), f"{where}: a checkpoint", otherwise="delete it to resume from an earlier one")
        key = f"{self._prefix(step)}/{record['sha256']}.pt"
        with tempfile.TemporaryDirectory(prefix="kd-") as name:
            path = Path(name) / "state.pt"
            self.store.download(key, path)
            if sha256_file(path) != record["sha256"]:
                raise IntegrityError(
                    f"{self.store.uri}/{key}: sha256 differs from its record; delete {self._prefix(step)} to resume from an earlier one"
                )
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state

    def clear(self) -> None:
        """Remove all checkpoints of this run."""
        self._remove(self._prefix())

    def _remove(self, prefix: str) -> None:
        for info in sorted(self.store.list(prefix), key=lambda info: not info.key.endswith("/record.json")):
            self.store.delete(info.key)
