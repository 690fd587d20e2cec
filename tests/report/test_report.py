"""A report shows a run's own figures, leaves out what is missing with the reason, and needs nothing but itself."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report_case

pytest.importorskip("matplotlib", reason="reports need matplotlib (pip install 'pgolf_jax[report]')")
pytest.importorskip("jinja2", reason="reports need Jinja2 (pip install 'pgolf_jax[report]')")

from pgolf_jax import report
from pgolf_jax.audit.verdict import rules
from pgolf_jax.cli import main
from pgolf_jax.errors import UserError
from pgolf_jax.report import compare, documents, figures, page
from pgolf_jax.report.gather import Absent, gather, step_flops
from pgolf_jax.run_folder import RunFolder

HOSTILE = "run <img src=x onerror=alert(1)> $x^2$ & “q”"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Data, three audited seeds of one config, three of another, and one run that is still in training."""
  root = tmp_path_factory.mktemp("runs")
  tokens = report_case.write_data(root / "data")
  assert len(tokens) > 1000
  for number, seed in enumerate((42, 0, 314)):
    settings = report_case.settings_of(root / "data", seed)
    report_case.write_run(root / f"seed{seed}", settings, seed=number)
    other = dataclasses.replace(settings, ttt=dataclasses.replace(settings.ttt, chunk_size=32))
    report_case.write_run(root / f"other{seed}", other, seed=10 + number)
  report_case.write_run(root / HOSTILE, report_case.settings_of(root / "data"), until="none")
  return root


@pytest.fixture(scope="module")
def data(folder):
  """data(names…) → what these runs hold."""
  return lambda *names: [gather(RunFolder(folder / name)) for name in names]


@pytest.fixture(scope="module")
def whole(folder):
  """The page of the two sets of three seeds."""
  names = ("seed42", "seed0", "seed314", "other42", "other0", "other314")
  written = report.write([folder / name for name in names], folder / "set", png=False)
  return written[0].read_text(encoding="utf-8")


class _Tags(html.parser.HTMLParser):
  """Every tag of a page with its attributes; a tag that is closed out of order is an error."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self._open: list[str] = []
    self.feed(text)
    assert self._open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in ("meta", "link", "br", "img"):
      self._open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag


def test_the_page_needs_nothing_else_and_is_small(whole):
  assert len(whole.encode()) < page.MOST_BYTES / 2
  tags = _Tags(whole).tags
  loading = [(tag, name, value) for tag, attributes in tags for name, value in attributes.items()
             if name in ("src", "href", "srcset", "action", "data", "poster")]  # fmt: skip
  assert loading and all(value.startswith(("#", "data:")) for *_, value in loading)
  assert re.findall(r"@import|url\((?!#)", whole) == [] and "<script src" not in whole
  policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
  assert policy.startswith("default-src 'none'")
  names = [attributes["id"] for _, attributes in tags if "id" in attributes]
  assert len(names) == len(set(names))
  used = {value[1:] for _, _, value in loading if value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", whole))
  assert used <= set(names)


def test_figures_have_a_label_and_follow_the_page_from_light_to_dark(whole):
  drawn = [attributes for tag, attributes in _Tags(whole).tags if attributes.get("role") == "img" and tag == "svg"]
  assert len(drawn) >= 12 and all(attributes["aria-label"] for attributes in drawn)
  svgs = re.findall(r"<svg class=\"plot.*?</svg>", whole, re.DOTALL)
  assert len(svgs) == len(drawn)
  colors = {color for svg in svgs for color in re.findall(r"#[0-9a-f]{6}\b", svg)}
  assert colors <= {"#000000"}  # all others are variables of the page
  assert all("DejaVu" not in svg for svg in svgs)


def test_what_a_run_says_is_text(folder, whole):
  assert "<b>all</b>" not in whole and "&lt;b&gt;all&lt;/b&gt; of them" in whole
  text = report.write([folder / HOSTILE], folder / "hostile", png=False)[0].read_text(encoding="utf-8")
  assert "<img" not in text and "run &lt;img src=x onerror=alert(1)&gt; $x^2$ &amp; “q”" in text


def test_a_run_in_training_shows_what_it_has(folder, data):
  run = data(HOSTILE)[0]
  sections, left_out = page.plots([run])
  assert [plot.name for _, members in sections for plot in members] == ["loss", "schedule", "throughput"]
  reasons = dict(left_out)
  assert reasons["Bytes by tensor"] == "there is no artifact yet; the stage after training makes it."
  assert any("test-time training has not finished yet" in reason for reason in reasons.values())
  assert page.headline([run], None).unit == "nats per token"
  assert page.verdict_of([run]).state == "none"


def test_the_loss_of_a_short_run_is_that_of_its_log(data):
  run = data(HOSTILE)[0]
  short = dataclasses.replace(run, curves=type(run.curves)(*(column[:3] for column in run.curves)))
  plot = figures.loss([short])
  assert [row[2] for row in plot.table.rows] == [float(loss) for loss in short.curves.loss]
  first, _, last = short.curves.loss
  assert f"falls from {first:.2f} to {last:.2f} nats" in plot.caption


@pytest.mark.parametrize(
  "until, missing", [("train", "stages"), ("plain", "bytes"), ("artifact", "gain"), ("ttt", None)]
)
def test_each_stage_adds_its_figures(folder, data, tmp_path, until, missing):
  report_case.write_run(tmp_path / "run", report_case.settings_of(folder / "data"), until=until)
  names = [plot.name for _, members in page.plots([gather(RunFolder(tmp_path / "run"))])[0] for plot in members]
  assert "times" in names and (missing is None or missing not in names)
  assert missing or names == [
    "stages",
    "bytes",
    "loss",
    "schedule",
    "throughput",
    "gain",
    "length",
    "position",
    "hints",
    "times",
  ]


def test_the_verdict_is_that_of_the_rules_whatever_the_results_say(data):
  run = data("seed42")[0]
  assert page.verdict_of([run]).state == "unproved"  # most checks were not made

  def audited(*checks):
    made = [{"name": name, "passed": passed, "finding": "as found"} for name, passed in checks]
    return dataclasses.replace(run, results={**run.results, "audit": {"checks": made, "is_legal": True}})

  required = [(name, True) for name in rules().required]
  assert page.verdict_of([audited(*required)]).state == "legal"
  extra = page.verdict_of([audited(*required, ("the printed table", None))])
  assert extra.state == "legal" and f"{len(required)} of {len(required) + 1} checks hold; 1 not proved" in extra.text
  broken = audited(*required[1:], (required[0][0], False))
  found = page.verdict_of([audited(*required), broken])
  assert found.state == "broken" and required[0][0] in found.text


def test_numbers_of_training(data):
  run = data("seed42")[0]
  rows = figures.throughput([run]).table.rows
  assert [row[2] for row in rows] == pytest.approx([2048.0] * len(rows))  # 1024 tokens in half a second
  assert "of the 989 TFLOP/s that NVIDIA H100 80GB HBM3’s data sheet gives" in figures.throughput([run]).caption
  model = run.settings.model
  one_token = 2 * (
    model.num_layers
    * (2 * model.model_dim**2 + 2 * model.model_dim * model.kv_dim + 2 * model.model_dim * model.mlp_dim)
  )
  attention = 4 * model.num_layers * model.model_dim * (32 + 1) / 2
  head = 2 * model.vocab_size * model.model_dim
  assert step_flops(run)[0] == pytest.approx(
    3 * 512 * (one_token + attention + head)
  )  # 512 tokens on each of 2 devices
  assert figures.schedule([run]).caption.startswith(
    "Segments grow from 32 to 64 tokens; layers loop from step 21. At factor 1:"
  )
  assert [row[2] for row in figures.schedule([run]).table.rows] == [32] * 20 + [64] * 20
  unknown = dataclasses.replace(run, device="cpu")
  assert "the peak rate of cpu is not known" in figures.throughput([unknown]).caption


def test_rates_are_work_over_time(data):
  """Every other step takes nine times as long, as on a machine that others use, and the clock stood still once."""
  run = data("seed42")[0]
  run = dataclasses.replace(run, curves=run.curves._replace(seconds=np.cumsum(np.arange(40) % 2 * 0.8 + 0.1)))
  run.curves.seconds[20] = run.curves.seconds[19]
  seconds = np.where(np.arange(40) == 20, np.nan, np.diff(run.curves.seconds, prepend=0.0))
  rows = figures.throughput([run]).table.rows
  work = step_flops(run)
  for row, piece in zip(rows, np.array_split(np.arange(40), len(rows)), strict=True):
    known = piece[piece != 20]
    assert row[2] == pytest.approx(1024 * len(known) / seconds[known].sum())
    assert row[3] == pytest.approx(work[known].sum() / seconds[known].sum())


def test_a_run_in_training_shares_its_work_among_the_devices_that_its_log_names(folder, data, tmp_path):
  done = data("seed42")[0]
  for count, devices in ((2, "NVIDIA H100 80GB HBM3"), (4, "TPU v5e of 8, as many as share train.micro_batches=4")):
    run = report_case.write_run(tmp_path / str(count), done.settings, until="none")
    run.log.write_text(f"2026-01-01T00:00:00Z run folder runs/a, {count} × {devices}\n")
    found = gather(run)
    assert found.devices == count
    assert step_flops(found) * count == pytest.approx(step_flops(done) * 2)
  assert dict(page._origin([found]))["devices"] == ["4 × TPU v5e"]


def test_numbers_of_time_and_bytes(data):
  run = data("seed42")[0]
  clocks = {name: (seconds, clock) for name, seconds, clock in figures.periods(run)}
  assert clocks["train"] == (20.0, figures.TRAINING) and clocks["calibrate"] == (1.0, figures.OTHER)
  assert clocks["score and learn"] == (2.5 - 0.25 - 0.5, figures.EVALUATION)
  rows = {name: (size, values) for name, size, values in figures.sizes([run]).table.rows}
  assert sum(size for size, _ in rows.values()) == run.results["artifact"]["artifact_bytes"] + 777
  assert rows["grid/mlp.fc.weight"][1] == 2 * 64 * 32 and rows["code"] == (777, 0)


def test_what_a_stage_brings_is_a_difference_within_runs(data):
  """A run that has only its artifact moves no difference to a later stage."""
  run = data("seed42")[0]
  worse = {stage: run.results[stage] | {"bpb": run.results[stage]["bpb"] + 0.3} for stage in ("plain", "artifact")}
  early = dataclasses.replace(run, name="early", results=worse)
  assert figures.stages([run, early]).caption == figures.stages([run]).caption

  def said(*runs):
    return next(fact.value for fact in page.facts(runs) if fact.label == "test-time training")

  assert said(run, early) == said(run)
  assert not any(fact.label == "test-time training" for fact in page.facts([early]))
  assert figures.gap([early], "artifact", "ttt") is None


def test_numbers_by_document(data):
  run = data("seed42")[0]
  held = run.documents
  assert held.nats.sum() == pytest.approx(run.results["ttt"]["loss"] * run.results["ttt"]["targets"])
  assert held.nats_plain - held.nats_untilted == pytest.approx(0.2 * held.targets, rel=1e-4)
  assert held.hints.sum() == run.results["ttt"]["gated"] and held.hits.sum() / held.hints.sum() == pytest.approx(
    0.75, abs=0.01
  )
  gains = {name: (learning, hints) for name, learning, hints in documents.gain([run]).table.rows}
  for k, name in enumerate(held.index):
    bits = np.log(2) * held.text_bytes[k]
    assert gains[name][0] == pytest.approx(0.2 * held.targets[k] / bits, rel=1e-4)
    assert gains[name][1] == pytest.approx((held.nats_untilted[k] - held.nats[k]) / bits, rel=1e-4)
  counted = {row[0]: row[1:] for row in documents.hints([run]).table.rows}
  assert counted == {k: (t, n, h) for k, t, n, h in zip(held.index, held.targets, held.hints, held.hits, strict=True)}
  score = {row[0]: row[2] for row in documents.length([run]).table.rows}
  assert score[3] == pytest.approx((held.nats / held.text_bytes / np.log(2))[held.index == 3][0])


def test_numbers_by_position(folder, data):
  run = data("seed42")[0]
  position = run.position
  nll = np.load(run.path / "scores" / "nll.npy")
  first = sum(float(nll[start : start + 16].sum(dtype=np.float64)) for start in run.documents.start)
  assert position.nats[0] == pytest.approx(first) and (position.first[0], position.end[0]) == (0, 16)
  assert position.nats.sum() == pytest.approx(nll.sum(dtype=np.float64))
  assert position.text_bytes.sum() == run.results["ttt"]["bytes"]
  assert position.end[-1] == run.documents.targets.max()


def test_scores_that_belong_to_other_files_are_said_to(folder, tmp_path):
  shutil.copytree(folder / "seed42", tmp_path / "run")
  run = RunFolder(tmp_path / "run")
  report_case.save(run.artifact_nll, np.load(run.artifact_nll) + np.float32(0.1))
  run.artifact.write_bytes((folder / "seed42" / "artifact.pgolf").read_bytes() + b"!")
  found = gather(run)
  assert [sentence.split(" changed")[0] for sentence in found.stale] == ["artifact.pgolf"] * 2
  assert page.verdict_of([found]).state == "stale"
  with pytest.raises(Absent, match="not kept by target"):
    documents.gain([found])
  assert dict(page.plots([found])[1])["Bytes by tensor"].startswith("The artifact's checksum does not match")


def test_scores_of_an_artifact_that_was_made_anew_are_left_out(folder, tmp_path):
  shutil.copytree(folder / "seed42", tmp_path / "run")
  run = RunFolder(tmp_path / "run")
  made = run.results()["artifact"]
  run.artifact.write_bytes(run.artifact.read_bytes() + b"!")
  run.finish("artifact", {name: made[name] for name in made if name != "made"}, made["made_from"])
  found = gather(run)
  text = page.render([found], *page.plots([found]))
  assert found.final_stage == "artifact" and found.documents is None and found.stale == []
  assert f"{found.name}, ttt" in text and "what it read has been made anew since" in text


def test_results_of_another_version_are_left_out(folder, tmp_path):
  run = report_case.write_run(tmp_path / "run", report_case.settings_of(folder / "data"), until="plain")
  run.finish("artifact", {"bpb": 1.5, "loss": 2.0}, {})
  found = gather(run)
  text = page.render([found], *page.plots([found]))
  assert "its results lack bytes, seconds, targets" in text and found.final_stage == "plain"


def test_damage_is_one_sentence(folder, tmp_path, capsys):
  shutil.copytree(folder / "seed42", tmp_path / "run")
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
  (tmp_path / "run" / "scores" / "documents.jsonl").write_text("[]\n")
  reasons = dict(page.plots([gather(RunFolder(tmp_path / "run"))])[1])
  assert all("Traceback" not in reason and "\n" not in reason for reason in reasons.values())
  assert "metrics.jsonl" in next(reason for titles, reason in reasons.items() if "Loss" in titles)
  (tmp_path / "run" / "config.toml").write_text("seed = ")
  assert main(["report", str(tmp_path / "run")]) == 1
  error = capsys.readouterr().err
  assert error.startswith("pgolf: ") and "config.toml is damaged" in error and error.count("\n") == 1


@pytest.mark.parametrize("names, said", [
  (["absent"], "absent is not a run folder"), (["seed42", "../runs/seed42"], "is named twice"),
])  # fmt: skip
def test_wrong_folders_are_refused(folder, capsys, names, said):
  names = [name.replace("../runs", f"../{folder.name}") for name in names]
  assert main(["report", *(str(folder / name) for name in names)]) == 1
  assert said in capsys.readouterr().err


def test_a_set_stands_for_its_runs_and_names_tell_runs_apart(folder, tmp_path):
  for place in ("a", "b"):
    for seed in (42, 0):
      report_case.write_run(
        tmp_path / place / f"seed={seed}", report_case.settings_of(folder / "data", seed), until="plain"
      )
  (tmp_path / "a" / "set.json").write_text("{}")
  assert report.write([tmp_path / "a"], html=False, png=False) == []
  report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out", png=False)
  numbers = json.loads((tmp_path / "out" / "report.json").read_text())
  assert [run["run"] for run in numbers["runs"]] == ["a/seed=0", "a/seed=42", "b/seed=0", "b/seed=42"]


def test_pngs_and_numbers_beside_the_page(folder, tmp_path, capsys):
  from PIL import Image

  assert main(["report", str(folder / "seed42"), "--format", "png", "--out", str(tmp_path / "out")]) == 0
  written = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert written == sorted(Path(line).name for line in capsys.readouterr().out.splitlines())
  assert len(written) == 10 and all(name.endswith(".png") for name in written)
  for name in written:
    with Image.open(tmp_path / "out" / name) as image:
      assert image.width >= 900 and image.convert("L").getextrema()[0] < 100
  assert (tmp_path / "out" / "loss.png").stat().st_size < 80_000


def test_the_last_step_of_a_run_writes_its_report_and_never_fails(folder, tmp_path, monkeypatch, caplog):
  shutil.copytree(folder / "seed42", tmp_path / "run")
  run = RunFolder(tmp_path / "run")
  before = run.results()
  page_path = report.after_run(run)
  assert page_path == tmp_path / "run" / "report" / "index.html" and page_path.is_file()
  numbers = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
  assert numbers["runs"][0]["results"]["ttt"]["bpb"] == before["ttt"]["bpb"] and "loss" in numbers["figures"]
  assert run.results() == before and all(run.changes(stage, before[stage]["made_from"]) == [] for stage in before)
  written = page_path.stat().st_mtime_ns
  assert report.after_run(run) == page_path and page_path.stat().st_mtime_ns == written  # nothing is new
  page_path.unlink()
  monkeypatch.setattr(page, "write", lambda *args, **options: 1 / 0)
  assert report.after_run(run) is None and "the report could not be written" in caplog.text
  monkeypatch.setattr(report, "_PACKAGES", ("no_such_package",))
  assert report.after_run(run) is None
  with pytest.raises(UserError, match=r"pgolf_jax\[report\]"):
    report.write([run.path])


def test_sets_are_compared(data):
  runs = data("seed42", "seed0", "seed314", "other42", "other0", "other314")
  found = compare.compare(runs)
  assert [group.label for group in found.groups] == ["ttt.chunk_size=64", "ttt.chunk_size=32"]
  assert found.stage == "ttt" and found.published is None and "published figures are not drawn" in found.notes[0]
  assert found.summaries[0].mean == pytest.approx(np.mean([run.results["ttt"]["bpb"] for run in runs[:3]]))
  (pair,) = found.pairs
  first, second = ([run.results["ttt"]["bpb"] for run in part] for part in (runs[:3], runs[3:]))
  assert (
    pair.bpb == pytest.approx(np.mean(second) - np.mean(first)) and pair.documents.count == 12 and pair.seeds.count == 3
  )
  alone = compare.compare(runs[:3])
  assert [(pair.baseline, pair.challenger) for pair in alone.pairs] == [("seed42", "seed0"), ("seed42", "seed314")]
  assert all(pair.rules is None and pair.documents.p is not None for pair in alone.pairs)


def test_documents_are_paired_at_the_stage_that_is_compared(data):
  """One run has no test-time training, so that artifacts are compared, by document where that is known."""
  first, second = data("seed42", "seed0")
  shifted = first.documents._replace(nats_plain=first.documents.nats_plain + 1.0)
  second = dataclasses.replace(second, documents=shifted)
  last = {stage: first.results[stage] for stage in ("train", "plain", "artifact")}
  third = dataclasses.replace(first, name="third", results=last, documents=None, absent={"documents": "no ttt"})
  found = compare.compare([first, second, third])
  assert found.stage == "artifact"
  expected = np.mean(1 / np.log(2) / first.documents.text_bytes)
  assert found.pairs[0].documents.mean == pytest.approx(expected) and found.pairs[1].documents is None
  unkept = dataclasses.replace(second, documents=shifted._replace(nats_plain=None))
  assert compare.compare([first, unkept, third]).pairs[0].documents is None
  averaged = [dataclasses.replace(run, results={"plain": run.results["plain"]}) for run in (first, second)]
  assert compare.compare(averaged).pairs[0].documents is None


def test_documents_are_paired_by_their_index(data, folder, tmp_path):
  shutil.copytree(folder / "seed0", tmp_path / "shuffled")
  path = tmp_path / "shuffled" / "scores" / "documents.jsonl"
  path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
  plain, shuffled = data("seed42", "seed0"), [*data("seed42"), gather(RunFolder(tmp_path / "shuffled"))]
  assert compare.paired(plain).table.rows == compare.paired(shuffled).table.rows
  np.testing.assert_allclose(documents.mean_documents(plain).nats, documents.mean_documents(shuffled).nats)


def test_different_texts_are_not_compared(data, tmp_path):
  report_case.write_data(tmp_path / "data", seed=5)
  report_case.write_run(tmp_path / "run", report_case.settings_of(tmp_path / "data"))
  runs = [*data("seed42"), gather(RunFolder(tmp_path / "run"))]
  with pytest.raises(Absent, match="different validation texts"):
    compare.compare(runs)
  text = page.render(runs, *page.plots(runs))
  assert "scored different validation texts" in text and "nothing to compare yet" in text


def test_published_figures_are_there_where_the_official_set_is_scored(data):
  runs = data("seed42", "seed0", "seed314")
  official = {"targets": compare.REFERENCE.targets, "bytes": compare.REFERENCE.text_bytes}
  losses = dict(zip((42, 0, 314), (2.3000, 2.3050, 2.3020), strict=True))
  for run in runs:
    loss = losses[run.settings.seed]
    bpb = loss / np.log(2) * official["targets"] / official["bytes"]
    run.results["ttt"] = {**run.results["ttt"], **official, "loss": loss, "bpb": bpb}
  found = compare.compare(runs)
  assert found.published.bpb == pytest.approx(found.summaries[0].mean - 1.0570, abs=5e-5) and found.notes == []
  assert found.published.rules.gain == pytest.approx(2.31315552 - np.mean(list(losses.values())), abs=1e-6)
  assert found.published.rules.holds_later and found.published.seeds.count == 3
  drawn = compare.seeds(runs).draw(9.6)
  assert drawn.axes[0].get_legend().get_texts()[0].get_text() == "published reference, mean"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """
<!doctype html><meta charset="utf-8"><body><pre id="result"></pre><script>
const page = PAGE;
const measure = (width, theme) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const doc = frame.contentDocument, view = frame.contentWindow, errors = [];
    view.addEventListener("error", (e) => errors.push(e.message));
    const before = view.getComputedStyle(doc.body).backgroundColor;
    doc.getElementById("theme").click();
    const after = view.getComputedStyle(doc.body).backgroundColor;
    const box = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
    const figures = [...doc.querySelectorAll("figure")].map((f) => [f.id,
      [...f.querySelectorAll("svg.plot")].map(box).filter(([w]) => w > 0),
      [...f.querySelectorAll("svg.plot path, svg.plot use")].map(box).filter(([w, h]) => w + h > 0).length]);
    done({width, errors, figures, changes: before !== after, scroll: doc.documentElement.scrollWidth,
      requests: view.performance.getEntriesByType("resource").map((r) => r.name)});
  };
  document.body.append(frame);
});
Promise.all([measure(390), measure(1280)]).then((all) => {
  document.getElementById("result").textContent = JSON.stringify(all);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, which would open the page")
def test_a_browser_draws_every_figure_and_a_phone_does_not_scroll_sideways(whole, tmp_path):
  harness = tmp_path / "harness.html"
  quoted = json.dumps(whole).replace("</", "<\\/")
  harness.write_text(MEASURE.replace("PAGE", quoted, 1), encoding="utf-8")
  ran = subprocess.run(
    [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
     "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
     "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", harness.as_uri()],
    capture_output=True, text=True, timeout=300, check=True,
  )  # fmt: skip
  assert "CONSOLE" not in ran.stderr
  measured = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)[1]))
  assert [one["width"] for one in measured] == [390, 1280]
  for one in measured:
    assert one["errors"] == [] and one["requests"] == [] and one["changes"]
    assert one["scroll"] <= one["width"]
    assert len(one["figures"]) == 12
    for name, boxes, marks in one["figures"]:
      assert len(boxes) == 1, f"{name}: one drawing of the two widths is shown"
      assert boxes[0][0] > 250 and boxes[0][1] > 100 and marks > 5, f"{name} is not drawn at {one['width']}"
