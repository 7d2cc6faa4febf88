"""Curation: verify the teacher's answers, reject with a reason, and choose the rows the student learns from."""

from kd_core.curate.answers import Curated, Reason, curate_answers, gold_rows
from kd_core.curate.verifier import final_answer, verify

__all__ = ["Curated", "Reason", "curate_answers", "final_answer", "gold_rows", "verify"]
