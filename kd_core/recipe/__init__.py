"""The typed recipe: what is distilled (identity) and where it runs (``run``).

One frozen model. Every field but ``description`` and ``run`` is identity: it decides *what* is computed and enters the
fingerprints. ``run`` decides where and how fast, and never does. Absent is None; there are no sentinels and no hidden
defaults that matter. Importable without torch. Loading from YAML and error lines live in ``recipe_io``.

One module a part; ``recipe`` is the whole.
"""

from kd_core.recipe.evaluation import (
    BetterThan,
    Ceiling,
    Evaluation,
    Floor,
    Gate,
    HeldOutSuite,
    NotWorseThanChampion,
    Rule,
    SourceSuite,
    Suite,
)
from kd_core.recipe.models import (
    Adapter,
    Architecture,
    CharacterTokenizer,
    ModelRef,
    Narrower,
    PretrainedStudent,
    PretrainedTeacher,
    ServerTeacher,
    Student,
    StudentFromConfig,
    StudentFromTeacher,
    Teacher,
    TrainedTeacher,
)
from kd_core.recipe.objective import (
    Constant,
    Divergence,
    ForwardKL,
    JensenShannon,
    Objective,
    Piecewise,
    Ramp,
    ReverseKL,
    Schedule,
    SkewKL,
    TotalVariation,
    schedule_values,
)
from kd_core.recipe.prompts import DatasetSource, FileSource, Prompts, ReasoningGymSource, Source, Split, Task
from kd_core.recipe.recipe import ARMS, Arm, Recipe
from kd_core.recipe.run import Run, S3Options
from kd_core.recipe.teaching import Answers, Curate, Dense, HiddenStates, Sampled, SoftLabels, TopK
from kd_core.recipe.training import Decay, LearningRateSchedule, ReduceOnPlateau, Training, WarmupStableDecay

__all__ = [
    "ARMS",
    "Adapter",
    "Answers",
    "Architecture",
    "Arm",
    "BetterThan",
    "Ceiling",
    "CharacterTokenizer",
    "Constant",
    "Curate",
    "DatasetSource",
    "Decay",
    "Dense",
    "Divergence",
    "Evaluation",
    "FileSource",
    "Floor",
    "ForwardKL",
    "Gate",
    "HeldOutSuite",
    "HiddenStates",
    "JensenShannon",
    "LearningRateSchedule",
    "ModelRef",
    "Narrower",
    "NotWorseThanChampion",
    "Objective",
    "Piecewise",
    "PretrainedStudent",
    "PretrainedTeacher",
    "Prompts",
    "Ramp",
    "ReasoningGymSource",
    "Recipe",
    "ReduceOnPlateau",
    "ReverseKL",
    "Rule",
    "Run",
    "S3Options",
    "Sampled",
    "Schedule",
    "ServerTeacher",
    "SkewKL",
    "SoftLabels",
    "Source",
    "SourceSuite",
    "Split",
    "Student",
    "StudentFromConfig",
    "StudentFromTeacher",
    "Suite",
    "Task",
    "Teacher",
    "TopK",
    "TotalVariation",
    "TrainedTeacher",
    "Training",
    "WarmupStableDecay",
    "schedule_values",
]
