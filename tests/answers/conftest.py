"""Fixtures of the tests of ram/answers."""

from sample_stage import decoding_calls, folders, resolve  # noqa: F401
