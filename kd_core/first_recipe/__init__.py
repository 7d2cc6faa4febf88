"""A first recipe from somebody's data: what its columns are, who teaches and who learns, and a short text that says so."""

from kd_core.first_recipe.data import Sample, look_at
from kd_core.first_recipe.models import class_student_of, class_teacher_of, student_of, teacher_of
from kd_core.first_recipe.recognise import Recognised, recognise
from kd_core.first_recipe.writing import SCHEMA_FILE, write_recipe

__all__ = [
    "SCHEMA_FILE",
    "Recognised",
    "Sample",
    "class_student_of",
    "class_teacher_of",
    "look_at",
    "recognise",
    "student_of",
    "teacher_of",
    "write_recipe",
]
