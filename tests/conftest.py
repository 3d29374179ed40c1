"""Fixtures of all tests in this folder."""

from tests.small import hidden_gpu, model, unloaded_rewards, work  # noqa: F401
