"""Scores: each benchmark's own scorer, run on solutions and read back to records."""
