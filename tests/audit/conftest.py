"""Audits in tests draw the same cuts each time, so that a test that passes once passes again."""

import importlib

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def same_chance(monkeypatch):
  monkeypatch.setattr(importlib.import_module("pgolf_jax.audit.replay"), "chance", lambda: np.random.default_rng(0))
