"""Measuring models: suites, generation, scores, intervals and the report."""
