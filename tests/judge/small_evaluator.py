"""An evaluator of a few lines that keeps the rules: counts of tokens, those of a document after it is scored.

It stands in for the real one in the tests of the judge, because it starts in a fraction of a second. A cheat puts lines
in place of the comments that are named after letters.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser()
for name in ("data", "scores", "sample"):
  parser.add_argument(f"--{name}", type=Path)
parser.add_argument("--ttt", action="store_true")
options = parser.parse_args()
folder = Path(__file__).resolve().parent
# A: at the start


def stream(split):
  return np.fromfile(options.data / f"fineweb_{split}_000000.bin", "<u2")[512:].astype(np.int64)


tokens, sizes = stream("val"), stream("val_bytes")
starts = np.flatnonzero(tokens == 1)
ends = np.append(starts[1:] + 1, len(tokens))
wanted = set(np.load(options.sample).tolist()) if options.sample else set()
counts, nll, logp, lines, trace = np.ones(48), np.zeros(len(tokens) - 1, np.float32), {}, [], []
for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
  for t in range(start, end - 1):
    p = counts / counts.sum()
    # B: before a target is scored
    nll[t] = -math.log(p[tokens[t + 1]])
    if t in wanted:
      logp[t] = np.log(p)
    counts[tokens[t + 1]] += 1
# C: after the scores
for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
  nats, size = float(nll[start : end - 1].sum(dtype=np.float64)), int(sizes[start + 1 : end].sum())
  lines.append({"document": index, "targets": end - 1 - start, "bytes": size, "nats": nats, "nats_untilted": nats})
  trace.append(
    {"event": "score", "batch": index, "documents": [index], "weights": 0, "adapters": "a", "carried": index}
  )
total, size = float(nll.sum(dtype=np.float64)), sum(line["bytes"] for line in lines)
bpb = total / math.log(2) / size
figures = {"loss": total / len(nll), "bpb": bpb, "bpb_without_hints": bpb, "targets": len(nll), "bytes": size}
figures |= {"gated": 0, "order": "strict", "method": "exact"}
# D: before the results
times = np.ones(len(nll), np.uint8)
for name, array in (("nll", nll), ("model_nll", nll), ("hint_nll", np.zeros_like(nll)), ("times", times)):
  np.save(options.scores / f"{name}.npy", array)
for name, values in (("documents", lines), ("trace", trace)):
  (options.scores / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
if wanted:
  np.savez(options.scores / "distributions.npz", targets=sorted(logp), logp=[logp[t] for t in sorted(logp)])
print(json.dumps(figures))
