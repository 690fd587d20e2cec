"""From an artifact to a submission folder: bytes counted, refused where over, and scored from the folder alone."""

import ast
import io
import json
import subprocess
import sys
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import SETTINGS, random_params, with_quantize, write_data

from pgolf_jax.errors import UserError
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.quantize.artifact import load, read, writer
from pgolf_jax.quantize.fit import scaled
from pgolf_jax.quantize.make import make
from pgolf_jax.settings.config import QuantizeConfig
from pgolf_jax.submission import accounting, bundle, package
from pgolf_jax.submission.evaluate import score


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_data(folder)
  return folder


@pytest.fixture(scope="module")
def artifact(data, tmp_path_factory):
  """The file of a quantised model."""
  path = tmp_path_factory.mktemp("artifact") / "artifact.pgolf"
  path.write_bytes(make(SETTINGS, random_params(), data).data)
  return path


def code_of(size: int) -> bundle.Code:
  return bundle.Code(starter=b"", archive=bytes(size), files=3, requirements=[])
