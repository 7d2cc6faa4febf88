"""Thin tasks around kd_core: one stage each, plus what MLflow is told."""
