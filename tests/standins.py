"""A small summary of each stage, for records that no stage has made; tests change what they ask about."""

from kd_core.summaries import (
    AnswersSummary,
    CurateSummary,
    EvaluateSummary,
    GateSummary,
    LedgerReference,
    ModelIdentity,
    PromptsSummary,
    PublishSummary,
    ReportSummary,
    RowLimit,
    RuleResult,
    ScoringSummary,
    ShardedRows,
    StudentReference,
    Summary,
    TeacherSummary,
    TokenizerIdentity,
    TrainingRun,
    TrainSummary,
    TrimmedVocabulary,
    UsedRows,
    VocabularySummary,
)

SHARDS = ShardedRows(rows=4, rows_computed=3, namespace="a" * 32, bytes=400, commits=("b" * 64,))
TRAINING = TrainingRun(
    rows=4,
    used_rows=UsedRows(rows=4, used=3, positions=40, used_positions=30, limit=RowLimit(tokens=20, by="training.max_tokens")),
    steps=5,
    kept_step=4,
    resumed_from=0,
    supervised_tokens=60,
    validation_nll=0.5,
    skipped_steps=(2,),
    loss_spikes=(),
    packed=True,
    seconds=1.5,
    speed=({"step": 5, "tokens_per_second": 80.0},),
)
TEACHER = ModelIdentity(
    weights={"content": "c" * 32, "dtype": "float32"},
    tokenizer=TokenizerIdentity(vocabulary="d" * 32, probe="e" * 32, template="f" * 32, eos=0),
    num_columns=17,
    dtype="float32",
    engine="transformers",
)
SCORING = ScoringSummary(shards=SHARDS, rows_refused=1, supervised_tokens=30)

SUMMARIES: dict[str, Summary] = {
    "prompts": PromptsSummary(rows=4, counts={"read": 5, "duplicate": 1}),
    "teacher": TeacherSummary(TEACHER, parameters=100, bytes=400, max_positions=64, counts={"read": 4}, training=TRAINING),
    "answers": AnswersSummary(shards=SHARDS, tokens=30, finish_reasons={"stop": 3, "length": 1}),
    "curate": CurateSummary(rows=4, supervised_tokens=30, tokens=50, counts={"gold": 1}),
    "soft_labels": SCORING,
    "hidden_states": SCORING,
    "vocabulary": VocabularySummary(tokens=12, full_tokens=17, seen_tokens=9, texts=8),
    "train": TrainSummary("student", 0, 50, 200, TRAINING, TrimmedVocabulary(12, 17, 0.75), feature_blocks=((0, 1),)),
    "evaluate": EvaluateSummary(50, 200, items=6, seeds=1, tokens_per_second=40.0, undecided_samples=0, items_beyond_positions=2),
    "gate": GateSummary(
        promote=True,
        headline="Promoted: its one rule holds.",
        reasons=(RuleResult("floor", True, "0.5"),),
        student=StudentReference("train", "1" * 32, "2" * 32, seed=0),
        champion=LedgerReference(3, "3" * 32),
    ),
    "report": ReportSummary(promote=True, headline="Promoted: its one rule holds."),
    "publish": PublishSummary("sqlite:///mlflow.db", "run", None, "model", 1, None, promoted=False, ledger=None),
}
