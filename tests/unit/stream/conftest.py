"""Hypothesis draws the same examples every time; the fuzzer looks for new ones.

A busy machine must not fail a test, hence no deadline.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("stream", deadline=None, derandomize=True)
settings.load_profile("stream")
