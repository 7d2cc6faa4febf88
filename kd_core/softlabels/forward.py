"""One trusted pass of the teacher over fixed tokens: what scoring and the capture of hidden states stand on.

Axes: B rows, T tokens of a buffer, N supervised positions, H hidden size, V vocabulary columns.

``check_teacher`` refuses a teacher that is not itself; ``teacher_forward`` gives the hidden states that predict supervised
tokens, buffer by buffer. A model that can be packed is (``kd_core.tokens.packing``); another is run over rows of equal length, and
the log says why. There is no padding either way, and a row's numbers depend on the rows beside it by rounding only.
``Head`` turns hidden states into float32 logits, and ``Parity`` compares them with the model's own: a leak between documents, a
window that is not kept or a head with a scale that is not known here raises before a label is made.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import SoftLabelError, TeacherError
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow, collate
from kd_core.tokens.packing import equal_length_batches, isolated_documents, pack_batches, pack_rows, unpackable

__all__ = [
    "Forwarded",
    "Head",
    "Parity",
    "check_teacher",
    "decoder_blocks",
    "logit_scale",
    "module_outputs",
    "refused_rows",
    "teacher_forward",
]

_log = logging.getLogger(__name__)

_PARITY = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest distance of our logits to the model's own, relative to their spread over the vocabulary."""
_PARITY_POSITIONS = 8


_MULTIPLE = 64
"""Tokens of a buffer and positions of a tile are rounded up to it: few shapes, see ``pack_rows``."""


@dataclass(frozen=True)
class Forwarded:
    """One buffer's result.

    Attributes:
        indices: which rows it held, in order.
        hidden_NH: the backbone's output where it predicts a supervised token, row by row, in the model's dtype.
        labels_N: those tokens, int64.
        blocks_LNH: the outputs of the L blocks asked for, at the same positions.
    """

    indices: list[int]
    hidden_NH: Tensor
    labels_N: Tensor
    blocks_LNH: tuple[Tensor, ...] = ()


def check_teacher(loaded: LoadedModel) -> None:
    """Refuse a teacher that would not give its own distribution.

    Raises:
        TeacherError: a module in training mode, an adapter, gradient checkpointing.
    """
    model = loaded.model
    training = next((name or type(model).__name__ for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise TeacherError(
            f"the teacher is not in eval mode ({training} is training): dropout would make its labels noise; call model.eval()"
        )
    adapter = next((name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")), None)
    if adapter is not None:
        raise TeacherError(
            f"the teacher carries an adapter ({adapter}): its labels would not be the base model's; merge or unload it first"
        )
    if model.is_activation_checkpointing:
        raise TeacherError(
            "the teacher has gradient checkpointing on, so it is set up to train; call model.activation_checkpointing_disable()"
        )


def refused_rows(loaded: LoadedModel, rows: Sequence[tuple[str, TokenRow]]) -> dict[str, str]:
    """Key -> reason of the rows that this teacher cannot read.

    Raises:
        SoftLabelError: a token id beyond the teacher's vocabulary: the rows are another tokenizer's.
    """
    highest = max((max(row.ids) for _, row in rows), default=0)
    if highest >= loaded.num_columns:
        raise SoftLabelError(
            f"token id {highest} is beyond the teacher's {loaded.num_columns} columns: these rows were made with another tokenizer; "
            "make them with the teacher's"
        )
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return {}
    return {key: f"{len(row.ids)} tokens, and the teacher has {limit} positions" for key, row in rows if len(row.ids) > limit}


def teacher_forward(
    loaded: LoadedModel, rows: Sequence[TokenRow], *, micro_batch_tokens: int, parity: "Parity | None", blocks: Sequence[int] = ()
) -> Iterator[Forwarded]:
    """Run the backbone over rows, longest first.

    Args:
        loaded: a checked teacher.
        rows: what it reads.
        micro_batch_tokens: tokens of a buffer; a longer row has a buffer of its own.
        parity: notes the model's own logits of a few rows first; None where the head does not run.
        blocks: numbers of the blocks whose outputs are kept.

    Raises:
        TeacherError: the teacher has no such block, or its blocks cannot be told.
    """
    model = loaded.model
    watched = [decoder_blocks(model)[i] for i in blocks]
    reason = unpackable(model)
    if reason is not None:
        _log.info("%s cannot be packed: %s; its rows are scored by equal length", type(model).__name__, reason)
    lengths = [len(row.ids) for row in rows]
    batches = list((pack_batches if reason is None else equal_length_batches)(lengths, micro_batch_tokens))
    if parity is not None and batches:
        parity.note(rows, batches, multiple=_MULTIPLE if reason is None else 1)
    with isolated_documents(model) if reason is None else contextlib.nullcontext(), module_outputs(watched) as outputs:
        for indices in batches:
            picked = [(rows[i].ids, rows[i].first_supervised) for i in indices]
            if reason is None:
                pack = pack_rows(picked, multiple=_MULTIPLE).to(loaded.device)
                batch, inputs = pack.batch, pack.inputs()
            else:
                batch = collate(picked).to(loaded.device)
                inputs = {"input_ids": batch.ids_BT, "use_cache": False}
            hidden_BTH = model.get_decoder()(**inputs).last_hidden_state
            blocks_LNH = tuple(outputs[module][batch.predict_BT] for module in watched)
            yield Forwarded(indices, hidden_BTH[batch.predict_BT], batch.labels_N, blocks_LNH)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, first above the embedding first: block i's output is ``hidden_states[i + 1]`` of transformers' list,
    but for the last one, which transformers gives normalised.

    Raises:
        TeacherError: they cannot be told.
    """
    num = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.get_decoder().children() if isinstance(module, nn.ModuleList) and len(module) == num]
    if len(found) != 1:
        raise TeacherError(
            f"{type(model).__name__}: {len(found)} lists of {num} blocks in its decoder, expected one; hidden states cannot be kept"
        )
    return found[0]


@contextlib.contextmanager
def module_outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within: the last output of each module, as it ran."""
    last: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
        last[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


class Head:
    """The model's output projection over the valid columns, in float32.

    Half-precision weights are multiplied in their own precision and summed and returned in float32: logits of 20 rounded to bfloat16
    would be off by 0.06. On a CPU that takes a float32 copy of the projection.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        head, config = loaded.model.get_output_embeddings(), loaded.model.config.get_text_config()
        if type(head) is not nn.Linear:
            raise TeacherError(
                f"{type(loaded.model).__name__}: its output projection is {type(head).__name__}, and only a plain linear one can be "
                "scored in tiles; load the teacher without quantisation"
            )
        self._products = _bf16_products if head.weight.dtype == torch.bfloat16 else contextlib.nullcontext
        weight_VH = head.weight[: loaded.num_columns]
        self.weight_VH = weight_VH.float() if loaded.device.type == "cpu" else weight_VH
        self.bias_V = None if head.bias is None else head.bias[: loaded.num_columns].float()
        self.scale = logit_scale(config)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._room_NV = torch.empty(0, loaded.num_columns)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32, shape (N, V); valid until the next call, which writes over it: fresh memory costs a third of the product."""
        num = len(hidden_NH)
        if self.weight_VH.dtype == torch.float32:
            hidden_NH = torch.nn.functional.pad(hidden_NH.float(), (0, 0, 0, -num % _MULTIPLE))
            if len(self._room_NV) < len(hidden_NH):
                self._room_NV = torch.empty(len(hidden_NH), len(self.weight_VH), device=hidden_NH.device)
            with self._products():
                torch.mm(hidden_NH, self.weight_VH.T, out=self._room_NV[: len(hidden_NH)])
            logits_NV = self._room_NV[:num]
        else:
            logits_NV = torch.mm(hidden_NH, self.weight_VH.T, out_dtype=torch.float32)
        if self.bias_V is not None:
            logits_NV += self.bias_V
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def logit_scale(config: object) -> float:
    """The factor some architectures put on their logits: Cohere's, Granite's (a divisor; HyperCLOVA X multiplies), Falcon-H1's."""
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return scale * scaling if getattr(config, "model_type", "") == "hyperclovax" else scale / scaling


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Within: float32 products on a CPU that can are made of bfloat16 factors (exact here: they were bfloat16) and float32 sums."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Parity:
    """The model's own logits of a few rows, alone and with its own attention, against those that are about to become labels.

    Compared are the longest row (a sliding window that is not kept shows there) and the last one of the first shared buffer (a
    leak between documents shows there), at their last positions.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._own: dict[int, Tensor] = {}

    def note(self, rows: Sequence[TokenRow], batches: Sequence[list[int]], *, multiple: int) -> None:
        """Run the model itself over the rows to compare, each rounded up to ``multiple`` tokens by some that come after it."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        shared = next((batch for batch in batches if len(batch) > 1), [])
        for i in {*batches[0][:1], *shared[-1:]}:
            num, keep = len(rows[i].ids), min(_PARITY_POSITIONS, rows[i].num_supervised)
            fill = -num % multiple if limit is None else min(-num % multiple, limit - num)
            ids_BT = torch.tensor([[*rows[i].ids, *[0] * fill]], device=self._model.device)
            kept = torch.arange(num - keep - 1, num - 1, device=self._model.device)
            self._own[i] = self._model(input_ids=ids_BT, logits_to_keep=kept, use_cache=False).logits[0].float()

    def check(self, row: int, hidden_NH: Tensor, head: Head) -> None:
        """Compare a row's last positions, if it was noted.

        Raises:
            TeacherError: they differ by more than rounding.
        """
        own_NV = self._own.pop(row, None)
        if own_NV is None or not bool(torch.isfinite(own_NV).all()):
            return  # a broken row is refused by itself
        ours_NV = head.logits(hidden_NH[-len(own_NV) :])
        own_NV = own_NV[:, : ours_NV.shape[-1]]
        distance = float((ours_NV - own_NV).std(-1).square().mean().sqrt() / own_NV.std(-1).square().mean().sqrt())
        bound = _PARITY[self._model.dtype]
        if not distance <= bound:
            raise TeacherError(
                f"{type(self._model).__name__}: logits of the scoring pass are {distance:.2g} of their spread away from the model's own "
                f"(at most {bound:g}): its attention or its head does something that is not known here; please report it, and add it to "
                "kd_core/tokens/packing.py unpackable() or to Head in kd_core/softlabels/forward.py"
            )
