"""Knowledge of a recipe that needs none of it computed: counts, lengths, cached rows and sizes.

Reads the store and the sources, writes nothing, needs no torch.
"""

from dataclasses import dataclass
from functools import cached_property

from kd_core.planning.basis import Basis
from kd_core.planning.cached import Cached
from kd_core.planning.counts import Counts
from kd_core.planning.lengths import Lengths
from kd_core.planning.sizes import Sizes

__all__ = ["Known"]


@dataclass(frozen=True)
class Known:
    """One recipe against one store, and what follows from both; each part is found when it is asked for."""

    basis: Basis

    @cached_property
    def counts(self) -> Counts:
        """Numbers of prompts and rows."""
        return Counts(self.basis)

    @cached_property
    def cached(self) -> Cached:
        """Rows that the store holds."""
        return Cached(self.basis, self.counts)

    @cached_property
    def lengths(self) -> Lengths:
        """Expected lengths of texts, in tokens."""
        return Lengths(self.basis, self.counts, self.cached)

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters and vocabulary columns of models."""
        return Sizes(self.basis)
