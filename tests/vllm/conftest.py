"""Fixtures of a small sample stage."""

from sample_stage import folders, resolve  # noqa: F401
