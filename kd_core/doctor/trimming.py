"""The check of a trimmed vocabulary: on these rows, the student and its small tokenizer say what the whole ones say."""

import copy

import numpy as np
import torch

from kd_core.doctor.findings import Skipped
from kd_core.doctor.subject import Subject
from kd_core.errors import TeacherError
from kd_core.recipe import TopK
from kd_core.softlabels.kept import kept_mass
from kd_core.student.vocabulary import kept_tokens, trim_model, trim_tokenizer
from kd_core.tokens.encoding import encode_prompt
from kd_core.train.trimmed import trimmed_row

__all__ = ["check_trimmed_vocabulary"]

_ROUNDING = 1e-4  # of logits, float32: products over other numbers of columns are summed in another order


@torch.no_grad()
def check_trimmed_vocabulary(subject: Subject) -> str:
    """Texts are read alike, ids lead back, and logits of kept tokens are the whole student's; all other checks look at that one."""
    spec, student = subject.recipe.student.vocabulary, subject.student
    if spec is None:
        raise Skipped("the student keeps all tokens")
    prompts = [(text, encode_prompt(student.tokenizer, text, subject.recipe.text_task)) for text in subject.texts]
    seen = {i for ids in [*(row.ids for row in subject.rows), *(ids for _, ids in prompts)] for i in ids}
    token_map = kept_tokens(student.tokenizer, seen, num_common=spec.num_common)
    tokenizer = trim_tokenizer(student.tokenizer, token_map)
    for text, theirs in prompts:
        if token_map.restore(np.array(encode_prompt(tokenizer, text, subject.recipe.text_task))).tolist() != theirs:
            raise TeacherError(
                f"the trimmed tokenizer reads {text[:40]!r} as other tokens than the whole one; leave student.vocabulary out"
            )
    model = trim_model(copy.deepcopy(student.model), token_map)
    kept_S = torch.from_numpy(token_map.full_ids).to(student.device)
    apart = 0.0
    for row in (subject.rows[i] for i in subject.few):
        whole_TS = student.model(input_ids=torch.tensor([row.ids], device=student.device), use_cache=False).logits[0][:, kept_S]
        ids_T = torch.tensor([trimmed_row(row, token_map).ids], device=student.device)
        apart = max(apart, float((model(input_ids=ids_T, use_cache=False).logits[0] - whole_TS).abs().max() / whole_TS.std()))
    if not apart <= _ROUNDING:
        raise TeacherError(
            f"logits of kept tokens are {apart:.2g} of their spread away from the whole student's, at most {_ROUNDING:g} is rounding; its "
            "embeddings are laid out in a way that is not known here, leave student.vocabulary out"
        )
    kept = f"{len(token_map.kept):,} of {token_map.num_full:,} tokens are kept for these rows"
    found = f"{kept}, logits within {apart:.2g} of the whole student's"
    if subject.teacher is None or subject.recipe.soft_labels is None or isinstance(subject.recipe.soft_labels, TopK):
        return found
    masses = torch.cat([kept_mass(targets, token_map) for targets in subject.targets])
    return f"{found}; they hold {float(masses.mean()):.3f} of the teacher's probability (a run keeps the tokens of all its rows)"
