"""The doctor: a healthy recipe is healthy, and each trap that is planted is found by the check that is meant for it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.doctor import Finding, batches, divergence, examine, labels, machine, models, subject, templates, trimming, vocabulary
from kd_core.progress import Tick, silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.softlabels import SampledTargets, TopKTargets, capture, codec
from kd_core.softlabels.targets import reduce_logits
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.task_kinds import generation as data
from kd_core.teacher.models import LoadedModel, save_model
from kd_core.tokens.batches import Batch, collate
from kd_core.tokens.encoding import character_tokenizer
from kd_core.train import batches as feed
from kd_core.train import objective_model

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SUMS = [(f"{a}+{b}=", f"{a}+{b}={a + b}#{a + b}") for a in range(10) for b in range(10)]
CHAINS = [(f"{a}+{b}-{c}=", f"{a}+{b}={a + b},{a + b}-{c}={a + b - c}#{a + b - c}") for a in range(8) for b in range(8) for c in range(4)]
SMALL = (
    "teacher.architecture={hidden_size: 32, num_layers: 2, num_heads: 2, intermediate_size: 48, max_positions: 64}",
    "student.architecture={hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 32, max_positions: 64}",
    "teacher.training={steps: 3, batch_rows: 8, learning_rate: 0.001}",
    "answers=null",
    "run.device=cpu",
)
POLICIES = {
    "sampled": "soft_labels={kind: sampled, num_draws: 25, temperature: 2.0}",
    "topk": "soft_labels={kind: topk, k: 4, temperatures: [1.0, 2.0]}",
    "dense": "soft_labels={kind: dense}",
}
LABEL_CHECKS = ["teacher_as_student", "alignment", "largest_ids", "cached_soft_labels", "mass_outside"]
OWN_CHECKS = [
    "tokenizers",
    "control_tokens",
    "supervision",
    "used_rows",
    "end_token",
    "truncated_answers",
    "model_modes",
    "attention",
    "tied_head",
    "hidden_states",
    "trimmed_vocabulary",
]
BATCH_CHECKS = ["slope", "objective", "batch_split", "padding", "packing", "half_precision"]
ALL = ["packages", "device", "compared_models", "template", "models", *OWN_CHECKS, *LABEL_CHECKS, *BATCH_CHECKS]
BEFORE_A_RUN = {"cached_soft_labels", "truncated_answers"}
NOT_ASKED_FOR = {"template", "hidden_states", "trimmed_vocabulary", "half_precision"}
HARD = ("objective={supervision: hard}", "evaluation.compare=[baseline]")


@pytest.fixture
def sums(tmp_path: Path) -> Callable[..., Recipe]:
    """The quickstart, shrunken, over sums in a file, with overrides."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in SUMS + CHAINS))
    source = f'[{{kind: file, path: {path}, prompt: "{{q}}", gold: "{{a}}"}}]'

    def make(*overrides: str) -> Recipe:
        return load_recipe(QUICKSTART, [*SMALL, f"prompts.sources={source}", f"teacher.sources={source}", *overrides])

    return make


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    assert [finding.name for finding in findings] == ALL
    return {finding.name: finding for finding in findings}


def failed(findings: Mapping[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "failed"}


def pretrained(tmp_path: Path, loaded: LoadedModel, name: str = "teacher") -> str:
    save_model(loaded, tmp_path / name)
    return f"{name.partition('-')[0]}={{kind: pretrained, model: {tmp_path / name / 'model'}}}"


# ------------------------------------------------------------------------------------------- healthy


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_healthy_recipe_is_healthy(sums, store: LocalStore, policy: str) -> None:
    ticks: list[Tick] = []
    found = by_name(examine(sums(policy), store, tick=ticks.append))
    skipped = BEFORE_A_RUN | NOT_ASKED_FOR | ({"mass_outside"} if "dense" in policy else set())
    assert {name: f.status for name, f in found.items()} == {**dict.fromkeys(ALL, "ok"), **dict.fromkeys(skipped, "skipped")}, found
    assert "not trained yet: its architecture with random weights" in found["models"].detail
    assert "not trained yet" in found["teacher_as_student"].detail
    assert [tick.done for tick in ticks] == list(range(len(ALL) + 1))
    assert {tick.total for tick in ticks} == {len(ALL)}
    assert not Path(store.uri).exists()  # nothing is written


def test_the_quickstart_itself_is_healthy(store: LocalStore) -> None:
    recipe = load_recipe(QUICKSTART, [*SMALL, "prompts.sources.0.num=120", "teacher.sources.0.num=10"])
    assert not failed(by_name(examine(recipe, store)))


@pytest.mark.parametrize("seed", range(4))
def test_chance_does_not_fail_a_healthy_recipe(sums, store: LocalStore, seed: int) -> None:
    recipe = sums(f"seeds=[{seed}, 9]", "soft_labels={kind: sampled, num_draws: 3, temperature: 1.0}", "objective.temperature=1")
    assert not failed(by_name(examine(recipe, store)))


def test_a_finished_teacher_and_its_soft_labels_are_examined(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sums()
    for node in build_graph(recipe, store).values():
        if node.stage == "train":
            break
        run_node(recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={})
    found = by_name(examine(recipe, store))
    assert {name for name, f in found.items() if f.status != "ok"} == {*NOT_ASKED_FOR, "mass_outside"}, found
    assert found["mass_outside"].detail == "every position keeps all columns"
    assert "not trained" not in found["models"].detail
    assert found["truncated_answers"].detail.startswith("0 of ")
    assert "3 rows: gold log-probabilities off by" in found["cached_soft_labels"].detail

    real = subject.load_text_teacher

    def drifted(job: Any) -> LoadedModel:  # trap 20: the teacher is not the teacher that was scored
        loaded = real(job)
        loaded.model.model.norm.weight.mul_(1.5)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(subject, "load_text_teacher", drifted)
        found = by_name(examine(recipe, store))
    assert failed(found) == {"cached_soft_labels"}
    assert "the cache is not of this teacher as it runs here; delete rows/soft_labels/" in found["cached_soft_labels"].detail
    (shard, *_) = sorted(Path(store.uri).glob("rows/soft_labels/*/shards/*"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = by_name(examine(recipe, store))
    assert failed(found) == {"cached_soft_labels"}
    assert "sha256 differs from its name" in found["cached_soft_labels"].detail


def test_pretrained_models_with_padded_columns_are_healthy(sums, store: LocalStore, tmp_path: Path, tiny_model) -> None:
    teacher = pretrained(tmp_path, tiny_model(num_layers=4))
    found = by_name(examine(sums(teacher, "student={kind: from_teacher, every_nth_block: 2}"), store))
    assert not failed(found), found
    assert "columns of the teacher: 17 of 24; columns of the student: 17 of 24" in found["tokenizers"].detail


def test_half_precision_teachers_have_bounds_of_their_own(sums, store: LocalStore, tmp_path: Path, tiny_model) -> None:
    teacher = pretrained(tmp_path, tiny_model(num_layers=4)).replace("}", ", dtype: bfloat16}")
    found = by_name(examine(sums(teacher, "student={kind: from_teacher, every_nth_block: 2}", POLICIES["dense"]), store))
    assert not failed(found), found
    assert "allowed 0.02)" in found["teacher_as_student"].detail


def test_prompts_without_gold_are_examined_too(sums, store: LocalStore, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"q": f"{a}+{b}-{a}="}) + "\n" for a in range(5) for b in range(9)))
    suite = f"{{kind: file, path: {tmp_path / 'sums.jsonl'}, prompt: '{{q}}', gold: '{{a}}'}}"
    recipe = sums(
        f"prompts.sources=[{{kind: file, path: {prompts}, prompt: '{{q}}'}}]",
        f"evaluation.suites=[{{kind: source, name: s, source: {suite}}}]",
        "answers={num_samples: 1, temperature: 0, max_tokens: 8}",
        "evaluation.compare=[]",
        "gate.rules=[{kind: ceiling, metric: bytes, maximum: 1}]",
    )
    found = by_name(examine(recipe, store))
    assert not failed(found), found
    assert "prompts (none has a gold answer) of 6 to 6 tokens" in found["models"].detail
    assert "no gold rows, so no end token to look for" in found["supervision"].detail


# ------------------------------------------------------------------------------------------- planted traps


def test_a_shift_by_one_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 1: logits are taken one position late."""

    def late(rows: Any) -> Batch:
        batch = collate(rows)
        return replace(batch, predict_BT=batch.predict_BT.roll(1, dims=1))

    for module in (vocabulary, labels):
        monkeypatch.setattr(module, "collate", late)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"supervision", "teacher_as_student", "alignment"}
    assert "the shift is wrong" in found["supervision"].detail
    assert "off by one position" in found["alignment"].detail


def test_soft_labels_of_the_next_token_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 1 on the teacher's side: what is captured belongs one position earlier."""

    def early(logits_NV: torch.Tensor, *given: Any, **named: Any) -> Any:
        return reduce_logits(logits_NV.roll(-1, dims=0), *given, **named)

    monkeypatch.setattr(capture, "reduce_logits", early)
    assert failed(by_name(examine(sums(), store))) == {"teacher_as_student", "alignment"}


def test_lost_answer_tokens_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 2: all answers are cut at the longest prompt of the batch."""

    def at_longest_prompt(rows: Any) -> Batch:
        longest = max(first for _, first in rows)
        return collate([(ids, min(longest, len(ids) - 1)) for ids, _ in rows])

    monkeypatch.setattr(vocabulary, "collate", at_longest_prompt)
    found = by_name(examine(sums(), store))
    assert "supervision" in failed(found)
    assert "answers are cut" in found["supervision"].detail


def test_counted_padding_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 3: padded positions take part in the loss."""

    def counting(rows: Any) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        batch = collate([([*ids, *[0] * (width - len(ids))], first) for ids, first in rows])
        return replace(batch, attention_BT=collate(rows).attention_BT)

    for module in (vocabulary, feed):
        monkeypatch.setattr(module, "collate", counting)
    found = by_name(examine(sums(*HARD), store))
    assert failed(found) == {"supervision", "packing"}, found
    monkeypatch.setattr(feed, "collate", lambda rows: replace(counting(rows), attention_BT=torch.ones_like(counting(rows).attention_BT)))
    monkeypatch.setattr(batches, "unpackable", lambda model: "planted")
    found = by_name(examine(sums(*HARD), store))
    assert {"supervision", "objective", "batch_split"} <= failed(found), found


def test_a_mean_over_micro_batches_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 12: each micro-batch is normalised by its own tokens."""
    real = objective_model.fused_loss

    def averaged(hidden_NH: torch.Tensor, *given: Any) -> Any:
        loss, parts = real(hidden_NH, *given)
        return loss / len(hidden_NH), {name: value / len(hidden_NH) for name, value in parts.items()}

    monkeypatch.setattr(objective_model, "fused_loss", averaged)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"batch_split", "objective"}
    assert "a mean is taken over micro-batches" in found["batch_split"].detail


def test_an_answer_without_end_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 4."""
    real = subject.encode_gold
    monkeypatch.setattr(subject, "encode_gold", lambda *given: real(*given)[:-1])
    found = by_name(examine(sums(), store))
    assert failed(found) == {"supervision"}
    assert "the student would not learn to stop" in found["supervision"].detail


def test_an_uncut_vocabulary_is_found(sums, store: LocalStore, tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 6: columns that no text can have take part."""
    teacher = pretrained(tmp_path, tiny_model(num_layers=4))
    recipe = sums(teacher, "student={kind: from_teacher, every_nth_block: 2}")
    real = subject.load_model
    monkeypatch.setattr(subject, "load_model", lambda *given, **named: replace(real(*given, **named), num_columns=24))
    found = by_name(examine(recipe, store))
    assert failed(found) == {"tokenizers"}
    assert "cut to 24 columns, and its tokenizer has 17; cut before normalising" in found["tokenizers"].detail


def test_a_vocabulary_cut_after_normalising_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 6, the other order: seven padded columns kept a share of the mass."""

    def cut_late(logits_NV: torch.Tensor, *given: Any, **named: Any) -> Any:
        padded_NV = torch.cat([logits_NV, logits_NV.new_zeros(len(logits_NV), 7)], -1)
        found, finite_N = reduce_logits(padded_NV, *given, **named)
        return replace(found, common=replace(found.common, num_columns=logits_NV.shape[-1])), finite_N

    monkeypatch.setattr(capture, "reduce_logits", cut_late)
    assert "teacher_as_student" in failed(by_name(examine(sums(POLICIES["topk"]), store)))


def test_ids_of_too_few_bits_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 7."""

    def three_bits(*given: Any) -> Any:
        found = codec.decode_rows(*given)
        assert isinstance(found, SampledTargets)
        return replace(found, ids_E=found.ids_E & 7)

    monkeypatch.setattr(subject, "decode_rows", three_bits)
    assert {"teacher_as_student", "largest_ids"} <= failed(by_name(examine(sums(), store)))


@pytest.mark.parametrize("kind", POLICIES)
def test_an_ignored_temperature_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Traps 8 and 22: labels are kept at T = 1 under the name of T = 2 (dense ones: from a teacher that ran at T = 2)."""

    def at_one(logits_NV: torch.Tensor, labels_N: torch.Tensor, policy: Any, **named: Any) -> Any:
        if kind == "dense":
            return reduce_logits(logits_NV / 2.0, labels_N, policy, **named)
        if kind == "sampled":
            found, finite_N = reduce_logits(logits_NV, labels_N, policy.model_copy(update={"temperature": 1.0}), **named)
            return replace(found, temperature=2.0), finite_N
        found, finite_N = reduce_logits(logits_NV, labels_N, policy, **named)
        assert isinstance(found, TopKTargets)
        return replace(found, log_tail_NG=found.log_tail_NG[:, [0, 0]]), finite_N

    monkeypatch.setattr(capture, "reduce_logits", at_one)
    found = by_name(examine(sums(POLICIES[kind]), store))
    assert "teacher_as_student" in failed(found)
    assert "the teacher as its own student is not at zero" in found["teacher_as_student"].detail


def test_soft_labels_in_half_precision_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 19."""

    def rounded(*given: Any) -> Any:
        found = codec.decode_rows(*given)
        return replace(found, logprobs_NV=found.logprobs_NV.bfloat16().float() * 1.02)

    monkeypatch.setattr(subject, "decode_rows", rounded)
    assert "teacher_as_student" in failed(by_name(examine(sums(POLICIES["dense"]), store)))


def test_other_tokenizers_and_templates_are_found(sums, store: LocalStore, tmp_path: Path, tiny_model) -> None:
    """Trap 14: another vocabulary of the same size; then the same one with another chat template."""
    teacher = pretrained(tmp_path, tiny_model())
    other = tiny_model(seed=1)
    alphabet = sums().teacher.tokenizer
    swapped = character_tokenizer(alphabet.model_copy(update={"alphabet": alphabet.alphabet[::-1]}))
    student = pretrained(tmp_path, replace(other, tokenizer=swapped), "student-swapped")
    found = by_name(examine(sums(teacher, student), store))
    assert "tokenizers" in failed(found)
    assert "tokenizers differ in vocabulary" in found["tokenizers"].detail
    for name, template in (("teacher-chat", "{{ messages[0]['content'] }}"), ("student-chat", "{{ messages[0]['content'] }}=")):
        tokenizer = character_tokenizer(alphabet)
        tokenizer.chat_template = template
        pretrained(tmp_path, replace(tiny_model(), tokenizer=tokenizer), name)
    chats = [f"{role}={{kind: pretrained, model: {tmp_path / f'{role}-chat' / 'model'}}}" for role in ("teacher", "student")]
    found = by_name(examine(sums(*chats, "task.template=chat"), store))
    assert failed(found) == {"tokenizers"}
    assert "tokenizers differ in template" in found["tokenizers"].detail


def test_a_tokenizer_larger_than_the_model_is_found(sums, store: LocalStore, tmp_path: Path, tiny_model) -> None:
    teacher = pretrained(tmp_path, tiny_model(num_layers=4, vocab_size=16))
    found = by_name(examine(sums(teacher, "student={kind: from_teacher, every_nth_block: 2}"), store))
    assert "tokenizers" in failed(found)
    assert "ids up to 16, and its logits only 16 columns" in found["tokenizers"].detail


def test_old_packages_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.metadata, "version", lambda name: {"transformers": "5.2.9", "torch": "2.13.0+cpu"}[name])
    found = by_name(examine(sums(), store))
    assert failed(found) == {"packages"}
    assert found["packages"].detail.startswith("transformers 5.2.9 is below 5.3: earlier ones run code from a model's config.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("cuda", "says"), [(None, "is built without CUDA"), ("13.0", "is built for CUDA 13.0 and sees none")])
def test_a_gpu_that_torch_cannot_use_is_named(
    sums, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, says: str
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "_GPU_SIGNS", (tmp_path / "none", tmp_path / "nvidia0"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = by_name(examine(sums("run.device=auto"), store))
    assert failed(found) == {"device"}
    assert f"there is a GPU here ({tmp_path / 'nvidia0'}), and torch {torch.__version__} {says}" in found["device"].detail
    assert "make setup TORCH=cu130" in found["device"].detail
    assert not failed(by_name(examine(sums("run.device=cpu"), store))), "who asks for the CPU gets it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_found_and_the_rest_is_skipped(sums, store: LocalStore) -> None:
    found = by_name(examine(sums("run.device=cuda"), store))
    assert failed(found) == {"device", "models"}
    assert {found[name].status for name in ALL[ALL.index("models") + 1 :]} == {"skipped"}


def test_unreadable_prompts_are_found_and_the_rest_is_skipped(sums, store: LocalStore) -> None:
    found = by_name(examine(sums("teacher.tokenizer.alphabet='012345678+-=,#'"), store))
    assert failed(found) == {"models"}
    assert "add its characters to teacher.tokenizer.alphabet" in found["models"].detail
    assert {found[name].status for name in ALL[ALL.index("models") + 1 :]} == {"skipped"}


# ------------------------------------------------------------------------------------------- templates and lengths


def test_a_template_without_a_system_role_is_found(sums, store: LocalStore, tmp_path: Path, tiny_model) -> None:
    """Trap 37."""
    tokenizer = character_tokenizer(sums().teacher.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}<eos>"
    )
    chats = [pretrained(tmp_path, replace(tiny_model(), tokenizer=tokenizer), name) for name in ("teacher", "student")]
    found = by_name(examine(sums(*chats, "task.template=chat", "task.system=1+1"), store))
    assert failed(found) == {"template", "models"}
    assert found["template"].detail.startswith("task.system: the chat template takes no system message (no system role)")
    found = by_name(examine(sums(*chats, "task.template=chat"), store))
    assert found["template"].detail == "the template takes no system message, ends a turn with '<eos>'"


def test_control_tokens_that_texts_write_are_found(sums, store: LocalStore, trimmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 35."""
    found = by_name(examine(trimmed, store))
    assert found["control_tokens"].detail.startswith("'<|end|>' typed in a prompt or an answer stays text; 0 of ")
    monkeypatch.setattr(templates, "encode_prompt", lambda tokenizer, prompt, task: tokenizer.encode(prompt))
    found = by_name(examine(trimmed, store))
    assert failed(found) == {"control_tokens"}
    assert "'<|end|>' inside a text becomes control ids" in found["control_tokens"].detail


def test_rows_that_are_too_long_are_found(sums, store: LocalStore) -> None:
    """Trap 40."""
    found = by_name(examine(sums("training.max_tokens=14"), store))
    assert failed(found) == {"used_rows"}
    assert "rows are left out, longer than training.max_tokens = 14; training.least_rows_share asks for 90.0%" in found["used_rows"].detail


def test_float32_beside_grouped_heads_is_said(sums, store: LocalStore) -> None:
    """Trap 45."""
    plain, grouped = (by_name(examine(sums(f"student.architecture.num_kv_heads={n}"), store))["attention"] for n in (2, 1))
    assert plain.detail.startswith("no float32 beside grouped heads")
    assert "the student's 2 query heads on 1 key heads take 0.0 MB a row of" in grouped.detail


# ------------------------------------------------------------------------------------------- traps in the objective and the batches


def test_a_temperature_that_the_gradient_has_not_seen_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 9: T^2 on the logged value only."""
    real = objective_model.fused_loss

    def value_only(*given: Any) -> Any:
        loss, parts = real(*given)
        return loss.detach() + (loss - loss.detach()) / given[4].temperature ** 2, parts

    for module in (objective_model, divergence):
        monkeypatch.setattr(module, "fused_loss", value_only)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"slope", "objective"}
    assert "4.00" in found["slope"].detail


@pytest.mark.parametrize("kind", ["renormalised", "clamped"])
def test_free_mass_and_a_clamp_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Traps 10 and 11."""

    def over_k(logits_NV: torch.Tensor, targets: TopKTargets, *_: Any, temperature: float) -> torch.Tensor:
        log_q_NK = torch.log_softmax(logits_NV / temperature, -1).gather(-1, targets.ids_NK)
        log_p_NK = targets.logprobs_NK / temperature - targets.log_normalizer_NG[:, [targets.temperatures.index(temperature)]]
        if kind == "renormalised":
            log_p_NK, log_q_NK = (torch.log_softmax(x, -1) for x in (log_p_NK, log_q_NK))
        found_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
        return found_N.clamp(min=0.0) if kind == "clamped" else found_N

    monkeypatch.setattr(divergence, "soft_divergence", over_k)
    found = by_name(examine(sums(POLICIES["topk"]), store))
    assert failed(found) == {"mass_outside"}
    assert {"renormalised": "mass outside is free", "clamped": "it is clamped at zero"}[kind] in found["mass_outside"].detail


def test_a_leak_between_packed_documents_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 15."""
    real = feed.pack_rows

    def one_document(rows: Any) -> Any:
        pack = real(rows)
        return replace(pack, documents=replace(pack.documents, lengths=(sum(pack.documents.lengths),)))

    monkeypatch.setattr(feed, "pack_rows", one_document)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"objective", "batch_split", "packing"}
    assert "documents see each other" in found["packing"].detail


def test_labels_that_may_be_missing_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 13: rows without soft labels are quietly trained on hard ones."""
    real = objective_model.fused_loss

    def lenient(hidden_NH: Any, projection: Any, labels_N: Any, targets: Any, weights: Any, kind: Any) -> Any:
        weights = replace(weights, hard=1.0, soft=0.0) if targets is None else weights
        return real(hidden_NH, projection, labels_N, targets, weights, kind)

    monkeypatch.setattr(objective_model, "fused_loss", lenient)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"objective"}
    assert "nobody is told" in found["objective"].detail


def test_a_masked_end_token_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 4: the end token is taken for padding where the gradient is made."""

    def pad_is_end(rows: Any) -> Batch:
        batch = collate(rows)
        return replace(batch, labels_N=torch.where(batch.labels_N == 1, 0, batch.labels_N))

    monkeypatch.setattr(feed, "collate", pad_is_end)
    assert "end_token" in failed(by_name(examine(sums(*HARD), store)))


def test_an_unfair_baseline_is_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 27."""
    real = machine.build_graph

    def fewer_steps(*given: Any) -> Any:
        nodes = real(*given)
        theirs = nodes["baseline.0"]
        training = {**theirs.identity["training"], "steps": 7}
        return nodes | {"baseline.0": replace(theirs, identity={**theirs.identity, "training": training})}

    monkeypatch.setattr(machine, "build_graph", fewer_steps)
    found = by_name(examine(sums(), store))
    assert failed(found) == {"compared_models"}
    assert "baseline.0 differs from student.0 in training" in found["compared_models"].detail


def test_bfloat16_is_held_to_float32(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 19."""
    found = by_name(examine(sums("training.dtype=bfloat16"), store))
    assert (found["half_precision"].status, failed(found)) == ("ok", set()), found
    real = objective_model.fused_loss

    def rough(hidden_NH: torch.Tensor, *given: Any) -> Any:
        return real(hidden_NH if hidden_NH.dtype == torch.float32 else hidden_NH * 1.3, *given)

    monkeypatch.setattr(objective_model, "fused_loss", rough)
    found = by_name(examine(sums("training.dtype=bfloat16"), store))
    assert failed(found) == {"half_precision"}
    assert "use training.dtype: float32" in found["half_precision"].detail


# ------------------------------------------------------------------------------------------- traps in the models


def test_a_teacher_that_is_not_itself_is_found(
    sums, store: LocalStore, tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 20: it is in training mode."""
    teacher = pretrained(tmp_path, tiny_model(num_layers=4))
    real = subject.load_model

    def training(*given: Any, **named: Any) -> LoadedModel:
        loaded = real(*given, **named)
        loaded.model.train()
        return loaded

    monkeypatch.setattr(subject, "load_model", training)
    found = by_name(examine(sums(teacher, "student={kind: from_teacher, every_nth_block: 2}"), store))
    assert "model_modes" in failed(found)
    assert "the teacher is not in eval mode" in found["model_modes"].detail


def test_a_head_that_is_not_tied_as_it_says_is_found(
    sums, store: LocalStore, tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = pretrained(tmp_path, tiny_model(num_layers=4))
    real = subject.student_from_teacher

    def says_tied(*given: Any, **named: Any) -> Any:
        model = real(*given, **named)
        model.config.tie_word_embeddings = True
        return model

    monkeypatch.setattr(subject, "student_from_teacher", says_tied)
    found = by_name(examine(sums(teacher, "student={kind: from_teacher, every_nth_block: 2}"), store))
    assert failed(found) == {"tied_head"}
    assert "the student's config says tie_word_embeddings: true, and its head is a tensor of its own" in found["tied_head"].detail


def test_blocks_counted_from_the_embedding_are_found(
    sums, store: LocalStore, tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 23."""
    teacher = pretrained(tmp_path, tiny_model(num_layers=4))
    recipe = sums(teacher, "student={kind: from_teacher, every_nth_block: 2}", "hidden_states={blocks: [1, 3]}")
    found = by_name(examine(recipe, store))
    assert not failed(found), found
    assert "block 1, model.layers.1, by 0.00" in found["hidden_states"].detail
    real = models.capture_hidden

    def one_below(*given: Any, wanted: Any, **named: Any) -> Any:
        return real(*given, wanted=wanted.model_copy(update={"blocks": tuple(b - 1 for b in wanted.blocks)}), **named)

    monkeypatch.setattr(models, "capture_hidden", one_below)
    found = by_name(examine(recipe, store))
    assert failed(found) == {"hidden_states"}
    assert "nearest to block 0 (-1 is the embedding)" in found["hidden_states"].detail


def test_truncated_answers_with_an_end_are_found(sums, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 5."""
    recipe = sums("answers={num_samples: 1, temperature: 0, max_tokens: 4}", "curate={verify: false, keep_truncated: true}")
    real = data._row

    def ended(prompt_id: str, source: str, sample: int, reason: str, text: str, prompt_ids: list[int], answer_ids: list[int]) -> Any:
        return real(prompt_id, source, sample, reason, text, prompt_ids, [*answer_ids, 1] if reason == "length" else answer_ids)

    monkeypatch.setattr(data, "_row", ended)
    for node in build_graph(recipe, store).values():
        run_node(recipe, build_graph(recipe, store), node.name, store=store, tick=silent, extra={})
        if node.stage == "curate":
            break
    found = by_name(examine(recipe, store))
    assert failed(found) == {"truncated_answers"}
    assert "the student would learn to stop in the middle" in found["truncated_answers"].detail


# ------------------------------------------------------------------------------------------- what is skipped


def test_a_server_teacher_is_skipped_with_the_reason_and_its_student_is_examined(
    sums, store: LocalStore, tmp_path: Path, tiny_model
) -> None:
    server = ("teacher={kind: server, model: m, revision: r}", "soft_labels=null", "objective={supervision: hard}")
    rest = ("evaluation.compare=[baseline]", "gate.rules=[{kind: ceiling, metric: bytes, maximum: 1}]")
    student = pretrained(tmp_path, tiny_model(), "student")
    found = by_name(examine(sums(*server, *rest, student), store))
    assert not failed(found), found
    for name in LABEL_CHECKS:
        assert found[name] == Finding(name, "skipped", "a server teacher only speaks text: there is nothing to score here")
    assert {found[name].status for name in ("tokenizers", "supervision", "end_token", "objective", "batch_split", "packing")} == {"ok"}


def test_a_recipe_without_soft_labels_says_so(sums, store: LocalStore) -> None:
    found = by_name(examine(sums("soft_labels=null", "objective={supervision: hard}", "evaluation.compare=[baseline]"), store))
    assert not failed(found)
    assert found["alignment"] == Finding("alignment", "skipped", "the recipe keeps no soft labels")
    assert found["batch_split"].status == "ok"


# ------------------------------------------------------------------------------------------- a trimmed vocabulary


@pytest.fixture
def trimmed(sums, bpe_tokenizer, tmp_path: Path) -> Recipe:
    """A teacher of 420 tokens, and a student of its own blocks that keeps what its data uses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=420, initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes)
    teacher = pretrained(tmp_path, LoadedModel(LlamaForCausalLM(config), bpe_tokenizer, 420))
    return sums(teacher, "student={kind: from_teacher, vocabulary: {keep: data}}")


def test_a_trimmed_vocabulary_is_examined_on_these_rows(trimmed: Recipe, store: LocalStore) -> None:
    found = by_name(examine(trimmed, store))
    assert not failed(found), found
    assert "of 420 tokens are kept for these rows" in found["trimmed_vocabulary"].detail
    assert "of the teacher's probability" in found["trimmed_vocabulary"].detail


@pytest.mark.parametrize("trap", ["rows", "merges"])
def test_a_vocabulary_that_was_trimmed_wrongly_is_found(
    trap: str, trimmed: Recipe, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_model, whole_tokenizer = trimming.trim_model, trimming.trim_tokenizer

    def rolled(model: Any, token_map: Any) -> Any:
        cut = whole_model(model, token_map)
        cut.lm_head.weight.data = cut.lm_head.weight.data.roll(1, 0)
        return cut

    def spelt_out(tokenizer: Any, token_map: Any) -> Any:
        cut = whole_tokenizer(tokenizer, token_map)
        state = json.loads(cut.backend_tokenizer.to_str())
        state["pre_tokenizer"]["add_prefix_space"] = True
        cut._tokenizer = Tokenizer.from_str(json.dumps(state))
        return cut

    if trap == "rows":
        monkeypatch.setattr(trimming, "trim_model", rolled)
    else:
        monkeypatch.setattr(trimming, "trim_tokenizer", spelt_out)
    found = by_name(examine(trimmed, store))
    assert failed(found) == {"trimmed_vocabulary"}
    assert {"rows": "away from the whole student's", "merges": "as other tokens than the whole one"}[trap] in found[
        "trimmed_vocabulary"
    ].detail
