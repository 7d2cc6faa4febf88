"""Sources of the teacher's inner states for a training step: int8 shards of an earlier stage, or the teacher itself.

Axes: N supervised positions of a micro-batch, L captured blocks, W columns kept.

A *place* is a module whose output is compared: a block for hidden states; its query, key or value projection for relations. Both
sides list their places in one order, pair by pair. Cached states are found by the row's number and then compared by its tokens;
the live teacher runs over the very batch that the student gets. Neither has a fallback: a row without states is an error.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import SoftLabelError, TrainingError
from kd_core.losses.features import FeatureLoss, TeacherFeatures
from kd_core.recipe import BlockPair, Features, RelationFeatures
from kd_core.softlabels.forward import check_teacher, decoder_blocks, module_outputs
from kd_core.softlabels.hidden import RowStates
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow, sent
from kd_core.tokens.packing import isolated_documents, unpackable
from kd_core.train.batches import FeatureSource, MicroBatch

__all__ = ["CachedStates", "FeatureTask", "LiveTeacher", "StateRows", "places"]

_PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}


@dataclass(frozen=True)
class FeatureTask:
    """Feature distillation of one run.

    Attributes:
        features: the recipe's.
        pairs: block pairs, resolved.
        source: the teacher's side.
    """

    features: Features
    pairs: tuple[BlockPair, ...]
    source: FeatureSource

    def student_places(self, student: PreTrainedModel) -> tuple[nn.Module, ...]:
        """The student's side."""
        return places(student, self.features, [pair.student for pair in self.pairs])

    def loss(self, student: PreTrainedModel, *, seed: int) -> FeatureLoss:
        """The loss with fresh projections, a function of the seed."""
        widths = [_width(student, place) for place in self.student_places(student)]
        return FeatureLoss(self.features, student_widths=widths, teacher_widths=self.source.widths, seed=seed)


def places(model: PreTrainedModel, features: Features, blocks: Sequence[int]) -> tuple[nn.Module, ...]:
    """The modules whose outputs are compared, block by block.

    Raises:
        TeacherError: the model's blocks cannot be told.
        TrainingError: relations of a model whose blocks have no projections of their own for queries, keys or values.
    """
    chosen = [decoder_blocks(model)[i] for i in blocks]
    if not isinstance(features, RelationFeatures):
        return tuple(chosen)
    found = []
    for block in chosen:
        named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
        if missing := [kind for kind in features.between if _PROJECTIONS[kind] not in named]:
            raise TrainingError(
                f"objective.features: the blocks of {type(model).__name__} have no projection for {', '.join(missing)} alone "
                f"({', '.join(_PROJECTIONS[kind] for kind in missing)}); use kind: hidden_states"
            )
        found += [named[_PROJECTIONS[kind]] for kind in features.between]
    return tuple(found)


def _width(model: PreTrainedModel, place: nn.Module) -> int:
    """Columns of a place's output: a projection knows it, a block has the residual stream's."""
    return int(getattr(place, "out_features", model.config.get_text_config().hidden_size))


class LiveTeacher:
    """The teacher beside the student, in eval mode and without gradients."""

    def __init__(self, loaded: LoadedModel, features: Features, pairs: Sequence[BlockPair]) -> None:
        """Take a teacher on any device.

        Raises:
            TeacherError: it is not in a state to be trusted.
        """
        check_teacher(loaded)
        self._model = loaded.model
        self._places = places(loaded.model, features, [pair.teacher for pair in pairs])
        self.widths = tuple(_width(loaded.model, place) for place in self._places)
        self.packable = unpackable(loaded.model) is None

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: there is nothing to fetch."""

    def expect(self, numbers: Sequence[int]) -> None:
        """Do nothing: there is nothing to fetch."""

    @torch.no_grad()
    def read(self, numbers: Sequence[int], rows: Sequence[TokenRow], batch: MicroBatch) -> TeacherFeatures:
        """Run the teacher over the batch as it lies."""
        if self._model.device != batch.labels_N.device:
            self._model.to(batch.labels_N.device)  # of this rank, which is known only now
        packed = "documents" in batch.inputs
        with isolated_documents(self._model) if packed else contextlib.nullcontext(), module_outputs(self._places) as outputs:
            self._model.get_decoder()(**batch.inputs)
        return TeacherFeatures(tuple(outputs[place][batch.predict_at] for place in self._places), _lengths(rows))


class StateRows(Protocol):
    """Rows of captured states, numbered like the training rows."""

    def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
        """Start to fetch rows."""
        ...

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while."""
        ...

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """The tokens whose states are kept."""
        ...

    def states(self, numbers: Sequence[int]) -> list[RowStates]:
        """Their states."""
        ...


class CachedStates:
    """States that the hidden_states stage captured."""

    packable = True

    def __init__(self, rows: StateRows, pairs: Sequence[BlockPair]) -> None:
        """Take rows of states.

        Raises:
            SoftLabelError: a pair's block is not among those captured.
        """
        (first,) = rows.states([0])
        wanted = [pair.teacher for pair in pairs]
        if missing := sorted(set(wanted) - set(first.blocks)):
            raise SoftLabelError(f"states of the teacher's blocks {missing} were not captured, only of {list(first.blocks)}; keep them too")
        self._rows, self._columns = rows, [first.blocks.index(block) for block in wanted]
        self.widths = (first.codes_NLW.shape[-1],) * len(wanted)

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch the shards that hold these rows."""
        self._rows.prefetch(numbers, soft=False)

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while."""
        self._rows.expect(numbers)

    def read(self, numbers: Sequence[int], rows: Sequence[TokenRow], batch: MicroBatch) -> TeacherFeatures:
        """Decode the rows' states.

        Raises:
            SoftLabelError: a row has no states, or they are of other tokens.
        """
        if self._rows.read(numbers) != list(rows):
            raise SoftLabelError(f"the hidden states of rows {list(numbers)} are of other tokens than the rows; run the recipe again")
        found, device = self._rows.states(numbers), batch.labels_N.device
        codes_NLW = sent(torch.cat([row.codes_NLW for row in found]), device)
        scales_NL = sent(torch.cat([row.scales_NL for row in found]), device)
        return TeacherFeatures(tuple(_dequantised(codes_NLW, scales_NL, column) for column in self._columns), _lengths(rows))


def _dequantised(codes_NLW: Tensor, scales_NL: Tensor, column: int) -> Tensor:
    return codes_NLW[:, column].float() * scales_NL[:, column, None]


def _lengths(rows: Sequence[TokenRow]) -> tuple[int, ...]:
    return tuple(row.num_supervised for row in rows)
