"""Curation: verify the teacher's answers, reject with a reason, and choose the rows the student learns from."""

from kd_core.curate.answers import Curated, Reason, curate_answers, gold_rows
from kd_core.curate.thoughts import final_answer
from kd_core.curate.verifier import Verdict, judge, verify

__all__ = ["Curated", "Reason", "Verdict", "curate_answers", "final_answer", "gold_rows", "judge", "verify"]
