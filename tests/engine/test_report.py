"""What a run says: the line of a step, the closing report, loss.png, and that a reader who leaves ends no run."""

import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tritium.engine import plots, report
from tritium.engine.report import Progress, Reporter, closing_report, duration, progress_line


def test_progress_line_shows_what_is_known():
    assert progress_line(Progress(3, 400, 4.56789)) == "step 3/400 | loss 4.568"
    full = Progress(3, 400, 4.5, val_loss=4.25, tokens_per_s=12345.6, matmul_fraction=0.714, eta_s=65)
    assert progress_line(full) == "step 3/400 | loss 4.500 | val 4.250 | 12,346 tok/s | 71% of matmul rate | ETA 1:05"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (36061, "10:01:01")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_reporter_prints_lines_unless_quiet(capsys):
    for quiet in (False, True):
        reporter = Reporter(quiet)
        reporter.note("a note")
        reporter.warn("careful")
        reporter.progress(Progress(1, 2, 3.0))
        reporter.sample(1, "Once upon")
        reporter.close()
    out = capsys.readouterr().out
    assert out == "a note\nwarning: careful\nstep 1/2 | loss 3.000\n--- sample at step 1 ---\nOnce upon\n---\n"


def test_a_reader_that_leaves_does_not_end_the_run():
    code = (
        "from tritium.engine.report import Reporter; import sys, time; r = Reporter()\n"
        "for i in range(2000): r.note('line %d' % i)\n"
        "print('still here', file=sys.stderr)"
    )
    done = subprocess.run(
        f'"{sys.executable}" -c "$CODE" | head -1', shell=True, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "CODE": code},
    )  # fmt: skip
    assert done.stdout == "line 0\n"
    assert done.stderr == "still here\n"


BITS = {"model": 1.5, "unigram": 3.0, "bigram": 2.0}


def run(tmp_path, *files):
    out = tmp_path / "runs" / "r"
    out.mkdir(parents=True)
    for name in files:
        (out / name).touch()
    return out


def test_closing_report_of_a_good_run(tmp_path):
    out = run(tmp_path, "sample.txt", "loss.png", "metrics.jsonl", "step_9")
    text = closing_report("done", out, out / "step_9", 10, BITS)
    assert re.search(
        r"unigram +3\.0000\n +bigram +2\.0000\n +model +1\.5000\n +the model beats the bigram model by 25\.0%", text
    )
    for what, name in (
        ("sample", "sample.txt"),
        ("loss curve", "loss.png"),
        ("metrics", "metrics.jsonl"),
        ("checkpoint", "step_9"),
    ):
        assert re.search(rf"^{what} +{out / name}$", text, re.M)
    assert f"tritium train {out} --train.steps 20" in text
    assert f'tritium sample {out} --prompt "The"' in text
    assert "\nscale up      torchrun --nproc-per-node=8 -m tritium.engine.cli train gpt2_124m" in text


def test_closing_report_names_no_file_that_is_not_there(tmp_path):
    out = run(tmp_path, "metrics.jsonl")
    text = closing_report("done", out, None, 10, {})
    assert "loss.png" not in text
    assert "checkpoint" not in text
    assert "bits per byte" not in text
    assert str(out / "metrics.jsonl") in text


def test_closing_report_of_a_run_that_fell_behind(tmp_path):
    text = closing_report("behind", run(tmp_path), None, 10, {**BITS, "model": 2.2})
    assert "does NOT beat the bigram model (10.0% behind)" in text
    assert "run.require_bigram" in text
    assert "beats the bigram model by" not in text


def test_closing_report_of_an_interrupted_run_says_how_to_go_on(tmp_path):
    out = run(tmp_path)
    text = closing_report("interrupted", out, None, 10, {}, command=".venv/bin/tritium")
    assert text == f"continue      .venv/bin/tritium train {out}"
    assert report.launcher(".venv/bin/tritium", 4).startswith(".venv/bin/torchrun --nproc-per-node=4 ")


# --------------------------------------------------------------------------------------------------------- live display


def test_live_reporter_updates_in_place_and_leaves_the_last_line(monkeypatch):
    from rich.console import Console

    from tritium.engine.cli import LiveReporter

    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **o: Console(file=screen, force_terminal=True, width=120, **o))
    reporter = LiveReporter()
    try:
        reporter.note("a [bold]note[/bold]")
        reporter.status("compiling")
        reporter._live.refresh()
        reporter.progress(Progress(30, 400, 3.25, val_loss=3.5, tokens_per_s=1000, matmul_fraction=0.5, eta_s=100))
        reporter._since -= 40  # as if 40 s had gone by
        reporter._live.refresh()
        reporter.sample(30, "Once upon")
    finally:
        reporter.close()
    reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "a [bold]note[/bold]" in text  # nobody's text is markup
    assert "compiling \u00b7 0:00" in text
    line = r"step 30/400 \| loss 3\.250 \| val 3\.500 \| 1,000 tok/s \| 50% of matmul rate \| ETA "
    assert re.search(line + "(1:00|0:5[0-9])", text)  # counts down between two logged steps
    assert "Once upon" in text
    assert max(map(len, re.findall("[━╸╺]+", text))) == 120  # the bar, over the whole width
    assert text.rstrip().endswith("ETA 1:40")
    assert "\x1b[2K" in screen.getvalue()  # lines were erased: in place


def test_live_reporter_only_on_a_terminal(monkeypatch):
    from tritium.engine import cli

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("CI", "true")
    assert type(cli._reporter()) is Reporter
    monkeypatch.delenv("CI")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert type(cli._reporter()) is Reporter


# ------------------------------------------------------------------------------------------------------------- loss.png


def metrics(folder, end=True):
    lines = [{"kind": "step", "step": s, "tokens": 100 * s, "loss": 6.0 - 0.2 * s} for s in range(1, 11)]
    lines += [
        {
            "kind": "eval",
            "step": s,
            "tokens": 100 * s,
            "val_loss": 5.0 - 0.2 * s,
            "bits_per_byte": 0.5 * (5.0 - 0.2 * s),
        }
        for s in (5, 10)
    ]
    if end:
        lines.append(
            {
                "kind": "end",
                "step": 10,
                "model_bits_per_byte": 1.5,
                "unigram_bits_per_byte": 2.5,
                "bigram_bits_per_byte": 2.0,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    return lines


def test_baselines_are_drawn_in_the_units_of_the_loss(tmp_path):
    levels = plots.baseline_levels(metrics(tmp_path))
    assert levels == {"unigram": pytest.approx(5.0), "bigram": pytest.approx(4.0)}  # 2 nats per bit of a byte
    assert plots.baseline_levels(metrics(tmp_path, end=False)) == {}
    assert plots.baseline_levels([{"kind": "end", "bigram_bits_per_byte": math.nan}]) == {}


def test_loss_png_shows_both_curves(tmp_path):
    from matplotlib.image import imread

    metrics(tmp_path)
    path = plots.plot_losses(tmp_path)
    assert path == tmp_path / "loss.png"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".png"] == ["loss.png"]
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    for colour in (plots._TRAIN, plots._VAL, plots._LINE):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) <= 2).sum() > 100, colour


def test_nothing_logged_gives_no_picture(tmp_path):
    assert plots.plot_losses(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    assert plots.plot_losses(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()
