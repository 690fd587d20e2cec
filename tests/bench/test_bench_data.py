"""The benchmark of preparing text runs on systems that do not say which cores a process may use."""

import os
from types import SimpleNamespace

from pgolf_jax.bench import data


def test_there_is_a_worker_for_each_core_whatever_the_system_says(monkeypatch, tmp_path):
  processes = []
  monkeypatch.delattr(os, "sched_getaffinity", raising=False)
  monkeypatch.setattr(os, "cpu_count", lambda: 3)
  monkeypatch.setattr(data.Tokenizer, "load", lambda _: SimpleNamespace(has_caseops=False, vocab_size=0))
  monkeypatch.setattr(data, "_whole", lambda preparation, folder, count: processes.append(count))
  monkeypatch.setattr(data, "_parts", lambda *_: [])
  monkeypatch.setattr(data.harness, "measure", lambda *_, **options: ([], []))
  monkeypatch.setattr(data.harness, "show", lambda *_: None)
  data.data(tokenizer=tmp_path / "any")
  assert processes == [3, 1]
