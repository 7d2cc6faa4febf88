"""Checks of the models themselves: nothing is dropped or drawn where it must not be, heads are tied as they say, blocks are named right."""

import torch
from torch import nn

from kd_core.doctor.findings import Skipped
from kd_core.doctor.labels import model_logits
from kd_core.doctor.subject import Subject
from kd_core.errors import SoftLabelError, TeacherError, TrainingError
from kd_core.softlabels.capture import row_key
from kd_core.softlabels.forward import check_teacher, decoder_blocks
from kd_core.softlabels.hidden import capture_hidden
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import collate

__all__ = ["check_attention", "check_hidden_states", "check_modes", "check_tied_head"]

_HIDDEN_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}
"""Distance of stored states to live ones, as a share of their size: int8 steps are 1/254 of the largest column."""


def _both(subject: Subject) -> list[tuple[str, LoadedModel]]:
    return [(name, model) for name, model in (("teacher", subject.teacher), ("student", subject.student)) if model is not None]


def check_modes(subject: Subject) -> str:
    """Out of training both models give the same logits twice; the teacher is its own, without adapter or dropout."""
    if subject.teacher is not None:
        check_teacher(subject.teacher)
    row = subject.rows[subject.few[0]]
    for name, loaded in _both(subject):
        batch = collate([(row.ids, row.first_supervised)]).to(loaded.device)
        one, other = (model_logits(loaded, batch).detach() for _ in range(2))
        if not torch.equal(one, other):
            raise TeacherError(
                f"two passes of the {name} in eval mode differ by {float((one - other).abs().max()):.2g}; 0 required: something is drawn"
            )
    dropped = _dropout(subject.student.model)
    learns = f"the student drops {dropped:g} at most while it trains" if dropped else "the student drops nothing while it trains"
    return f"{' and '.join(name for name, _ in _both(subject))}: two passes are equal (0 allowed); {learns}"


def _dropout(model: nn.Module) -> float:
    """Largest share that any part drops in training."""
    layers = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    attention = [float(getattr(module, "attention_dropout", 0.0) or 0.0) for module in model.modules()]
    return max([*layers, *attention, 0.0])


def check_tied_head(subject: Subject) -> str:
    """A head that its config ties to the embedding is the same tensor, and one that it does not is another."""
    found = []
    for name, loaded in _both(subject):
        head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
        says, is_tied = bool(loaded.model.config.get_text_config().tie_word_embeddings), head.data_ptr() == embedding.data_ptr()
        if says != is_tied:
            is_now = "the embedding" if is_tied else "a tensor of its own"
            raise TrainingError(
                f"the {name}'s config says tie_word_embeddings: {str(says).lower()}, and its head is {is_now}: it would be saved "
                "as another model; call tie_weights() or correct the config"
            )
        found.append(f"{name} {'tied' if is_tied else 'untied'}")
    return f"{', '.join(found)}, as their configs say"


def check_attention(subject: Subject) -> str:
    """Attention of grouped heads in float32 has no kernel of linear memory on a GPU: a long row can be too much for it."""
    slow = []
    for name, loaded in _both(subject):
        config = loaded.model.config.get_text_config()
        heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        products = subject.recipe.training.dtype if name == "student" else str(loaded.model.dtype).removeprefix("torch.")
        if groups != heads and products == "float32":
            longest = max(tokens for tokens, _ in subject.lengths)
            size = f"{heads * longest**2 * 4 / 1e6:,.1f} MB a row of {longest} tokens"
            slow.append(f"the {name}'s {heads} query heads on {groups} key heads take {size}")
    if slow:
        how = "float32 beside grouped heads: on a GPU attention's memory grows with the square of a row"
        return f"{how}: {', '.join(slow)}; use bfloat16 there"
    return "no float32 beside grouped heads, for which a GPU's attention would take memory that grows with the square of a row"


def check_hidden_states(subject: Subject) -> str:
    """Stored states of a block are that block's output: not the embedding's, not those of the block before."""
    wanted, teacher = subject.recipe.hidden_states, subject.teacher
    if wanted is None or teacher is None:
        raise Skipped("the recipe keeps no hidden states")
    row = subject.rows[subject.few[0]]
    with torch.no_grad():
        ids_BT = torch.tensor([row.ids], device=teacher.device)
        given = teacher.model(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
    live = [hidden_BTH[0, row.first_supervised - 1 : -1].float().cpu() for hidden_BTH in given]  # [0] is the embedding
    full = wanted.model_copy(update={"width": None, "reduce": "slice"})
    captured = capture_hidden(teacher, [(row_key("doctor", row), row)], wanted=full, micro_batch_tokens=len(row.ids)).captured[0]
    allowed, found = _HIDDEN_TOLERANCE[teacher.model.dtype], []
    for i, block in enumerate(wanted.blocks):
        name = _name(teacher, block)
        off = [float((captured.states.states()[:, i] - live_NH).norm() / live_NH.norm()) for live_NH in live]
        if block + 1 < len(live) - 1 and not off[block + 1] <= allowed:
            nearest = min(range(len(off)), key=off.__getitem__) - 1
            raise SoftLabelError(
                f"stored states of block {block} are {off[block + 1]:.2g} of their size from {name} (allowed {allowed:g}), and nearest to "
                f"block {nearest} (-1 is the embedding): blocks are counted from another place; please report this architecture"
            )
        last = " (transformers gives the last one normalised: not compared)" if block + 1 == len(live) - 1 else f" by {off[block + 1]:.2g}"
        found.append(f"block {block}, {name},{last}")
    return f"stored states differ from the live ones of {'; '.join(found)} (allowed {allowed:g})"


def _name(teacher: LoadedModel, block: int) -> str:
    module = decoder_blocks(teacher.model)[block]
    return str(next(name for name, found in teacher.model.named_modules() if found is module))
