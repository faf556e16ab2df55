"""The ladder of sizes: equal losses, cells that cannot be had, figures and tables."""

import dataclasses
import types

import pytest

from tritium.benchmarks import compare, ladder, record
from tritium.benchmarks.arm import ArmError
from tritium.engine import config as configs
from tritium.engine import presets

pytestmark = pytest.mark.timeout(240)


class FakeArm:
    """An arm whose steps take ``ms``; what is planted happens instead of the request of that name."""

    def __init__(self, ms, losses, planted=None, peak=1 << 20):
        self.name, self.spawned, self.ms, self.losses_, self.planted, self.peak = (
            "tritium",
            0.0,
            ms,
            losses,
            planted,
            peak,
        )
        self.process = types.SimpleNamespace(kill=lambda: None)
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def _maybe(self, what):
        if self.planted and self.planted[0] == what:
            raise ArmError(self.planted[1])

    def ask(self, what, **arguments):
        self._maybe("start")
        self.config = configs.Config.from_json(arguments["config"])
        row = {"site": "s", "op": "gelu", "phase": "train", "backend": "reference", "why": "chosen"}
        return {"variant": "fp32, eager", "startup_s": 1.5, "peak_bytes": self.peak, "kernels": [row], "threads": 1}

    def losses(self, steps):
        self._maybe("losses")
        return self.losses_[:steps]

    def step_ms(self):
        self._maybe("step")
        return self.ms


@pytest.fixture
def climb(monkeypatch, tmp_path):
    def run(*arms, columns=("eager", "compile", "kernels"), free=1 << 40):
        waiting = iter(arms)
        monkeypatch.setattr(ladder, "ArmProcess", lambda *a: next(waiting))
        monkeypatch.setattr(ladder, "free_bytes", lambda device: free)
        monkeypatch.setattr(ladder, "peak_of", lambda machine, precision: (1e12, "planted"))
        return ladder.climb({"gpt2_124m": (64, 2)}, [ladder.COLUMNS[c] for c in columns], rounds=4, command="c")

    return run


SAME = [10.0, 9.5, 9.0]


def cells_of(result):
    assert not record.problems(result, {**record.COMMON, **ladder.SCHEMA})
    return {cell["column"]: cell for cell in result["cells"]}


def test_cells_are_timed_together_and_held_to_the_first(climb):
    arms = FakeArm(4.0, SAME), FakeArm(2.0, SAME), FakeArm(1.0, [10.0 + 1e-4, 9.5, 9.0])
    result = climb(*arms)
    cells = cells_of(result)
    assert [cell["status"] for cell in cells.values()] == ["ok"] * 3
    assert cells["eager"]["tokens_per_s"]["median"] == pytest.approx(2 * 64 / 4e-3)
    assert cells["+ fused kernels"]["over_first"]["median"] == pytest.approx(4.0)
    per_token = {
        c: configs and ladder.flops_per_token(presets.load("gpt2_124m").model, 64, c) for c in ("full", "causal")
    }
    for convention, flops in per_token.items():
        assert cells["compile"][f"mfu_{convention}"] == pytest.approx(64e3 * flops / 1e12)
    assert [f["name"] for f in result["figures"]] == [
        "gpt2_124m eager tokens/s", "gpt2_124m compile tokens/s", "gpt2_124m + fused kernels tokens/s",
    ]  # fmt: skip
    assert {len(f["samples"]) for f in result["figures"]} == {8}
    assert all(check["ok"] for check in result["checks"])
    assert [(a.config.kernels.default, a.config.train.compile) for a in arms] == [
        ("reference", "false"), ("reference", "true"), ("auto", "true"),
    ]  # fmt: skip


def test_a_cell_that_did_not_settle_says_so(climb):
    arms = FakeArm(4.0, SAME), FakeArm(2.0, SAME)
    doubling = iter(2.0**i for i in range(100))
    arms[1].step_ms = lambda: next(doubling)
    result = climb(*arms, columns=("eager", "compile"))
    assert [cell["stable"] for cell in cells_of(result).values()] == [True, False]
    assert compare.unsettled(result) == ["gpt2_124m compile"]


def test_unequal_losses_get_no_figure_and_fail(climb):
    result = climb(FakeArm(4.0, SAME), FakeArm(2.0, [10.0, 9.5, 9.01]), FakeArm(1.0, SAME))
    cells = cells_of(result)
    assert [cell["status"] for cell in cells.values()] == ["ok", "unequal losses", "ok"]
    assert "step 3" in cells["compile"]["reason"]
    assert cells["compile"]["tokens_per_s"] is None
    assert len(result["figures"]) == 2
    assert [c["name"] for c in result["checks"] if not c["ok"]] == ["gpt2_124m: equal losses"]


def test_what_does_not_fit_or_breaks_is_a_cell(climb):
    """The first that runs is then what the others are held to; a cell that breaks while it is timed leaves them be."""
    memory = ("start", "tritium failed during 'start': OutOfMemoryError: CUDA out of memory. Tried to allocate")
    result = climb(FakeArm(4.0, SAME, memory), FakeArm(2.0, SAME), FakeArm(1.0, SAME, ("step", "ended with status -6")))
    cells = cells_of(result)
    assert [cell["status"] for cell in cells.values()] == ["out of memory", "ok", "failed"]
    assert cells["compile"]["over_first"] is None
    assert [c["name"] for c in result["checks"] if not c["ok"]] == ["gpt2_124m + fused kernels"]
    none = climb(
        *(FakeArm(1.0, SAME, ("start", "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate")),) * 3
    )
    assert {cell["status"] for cell in cells_of(none).values()} == {"out of memory"}
    assert [c["name"] for c in none["checks"] if not c["ok"]] == ["gpt2_124m: a cell was measured"]


def test_cells_that_do_not_fit_beside_others_are_timed_after_them(climb):
    arms = [FakeArm(4.0, SAME, peak=900), FakeArm(2.0, SAME, peak=900), FakeArm(1.0, SAME, peak=900)]
    cells = cells_of(climb(*arms, free=1000))
    assert [cell["status"] for cell in cells.values()] == ["ok"] * 3
    assert [cell["over_first"] for cell in cells.values()] == [None] * 3  # not in the same rounds: not paired
    assert all(arm.closed for arm in arms)


def test_what_the_engine_lacks_is_not_built_yet_until_it_has_it(climb, monkeypatch):
    arms = [FakeArm(4.0, SAME)]
    cells = cells_of(climb(*arms, columns=("eager", "graphs", "fp8")))
    assert [cell["status"] for cell in cells.values()] == ["ok", "needs a GPU", "needs a GPU"]
    assert cells["+ CUDA graphs"]["reason"] == "a CPU has no CUDA graphs"
    assert cells["+ fp8"]["reason"].startswith("a CPU has no products of fp8 matrices: it emulates them")
    assert cells["+ fp8"]["tokens_per_s"] is None
    assert ladder.GRAPHS.why_not() is None
    assert ladder.EAGER.why_not() is None

    @dataclasses.dataclass(frozen=True)
    class Earlier:
        compile: str = "auto"

    monkeypatch.setattr(ladder, "TrainConfig", Earlier)
    assert ladder.GRAPHS.why_not() == "the engine has no train.cuda_graphs yet"
    assert ladder.FP8.why_not() == "the engine has no train.precision yet"


@pytest.mark.parametrize(("capability", "lacks"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((10, 0), False)])
def test_on_a_gpu_fp8_needs_one_that_multiplies_it(climb, monkeypatch, capability, lacks):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert ladder.GRAPHS.why_not_on("cuda") is None
    assert ladder.EAGER.why_not_on("cuda") is None
    said = f"this GPU's compute capability is {capability[0]}.{capability[1]}, and 8.9 is needed"
    assert ladder.FP8.why_not_on("cuda") == (said if lacks else None)
    size = ladder.Size(
        presets.load("gpt2_124m"), 64, 2, "cuda", 4, 0, "auto", "bf16", 1e12,
        {ladder.FP8.name: ladder.empty_cell("gpt2_124m", ladder.FP8)},
    )  # fmt: skip
    arm = FakeArm(1.0, SAME, ("start", "it was begun"))
    monkeypatch.setattr(ladder, "ArmProcess", lambda *a: arm)
    size.fill([ladder.FP8])
    cell = size.cells[ladder.FP8.name]
    assert (cell["status"], cell["reason"]) == (("needs another GPU", said) if lacks else ("failed", "it was begun"))


def test_rungs_below_cuda_graphs_have_none_whatever_auto_means():
    base = presets.load("gpt2_124m")
    found = [ladder.cell_config(base, column, "auto", "bf16").train.cuda_graphs for column in ladder.COLUMNS.values()]
    assert found == ["false", "false", "false", "true", "true"]


def test_fp8_has_a_configuration():
    base = presets.load("gpt2_124m")
    config = ladder.cell_config(base, ladder.FP8, "triton", "bf16")
    assert (config.train.precision, config.train.cuda_graphs, config.kernels.default) == ("fp8", "true", "triton")
    assert "fp8_rowwise" in config.kernel_choices().values()
    assert ladder.cell_config(base, ladder.KERNELS, "triton", "bf16").train.precision == "bf16"


def test_the_table_shows_speeds_and_why_there_is_none(climb):
    memory = ("start", "OutOfMemoryError: CUDA out of memory")
    shown = ladder.table(
        climb(FakeArm(4.0, SAME), FakeArm(2.0, SAME), FakeArm(1.0, SAME, memory), columns=tuple(ladder.COLUMNS)[:4])
    )
    row = shown.splitlines()[-1]
    assert row.startswith("| gpt2_124m, T=64, B=2 | 32,000 [32,000, 32,000]<br>")
    assert row.count("*out of memory*") == row.count("*needs a GPU*") == 1
    assert "2.00 × [2.00, 2.00]" in row
    assert "+ CUDA graphs" in shown.splitlines()[2]


def test_wrong_words_end_with_the_nearest(capsys):
    for words, said in (
        (["--presets", "gpt2_124"], "there is no preset 'gpt2_124'; the nearest are gpt2_124m"),
        (["--columns", "egaer"], "there is no column 'egaer'; the nearest are eager"),
        (["--rounds", "1"], "--rounds must be at least 2"), (["--B", "0"], "--B must be at least 1"),
        (["--colums", "eager"], "there is no flag '--colums'; the nearest are --columns"),
        (["--kernels", "tritn"], "there is no backend 'tritn'; the nearest are triton"),
        (["--columns", ","], "--columns names no column"), (["--seed", "-1"], "--seed must be from 0"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as raised:
            ladder.main(words)
        assert raised.value.code == 2
        assert said in capsys.readouterr().err


def test_a_part_of_the_ladder_does_not_replace_the_whole():
    made, defaults = ladder.parser(), ladder.DEFAULT["cpu"]

    def name(*words, names=defaults):
        return ladder.stem(made.parse_args(words), list(names), list(defaults))

    assert name() == name("--rounds", "3") == name("--columns", ",".join(ladder.COLUMNS)) == "ladder"
    assert name("--columns", "eager") == "ladder_eager"
    assert name("--T", "16", "--precision", "bf16", "--kernels", "native") == "ladder_T16_bf16_native"
    assert name(names=["tiny"]) == "ladder_tiny"


def test_an_out_that_cannot_be_written_is_said_before_anything_is_built(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ladder, "climb", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(SystemExit) as raised:
        ladder.main(["--presets", "tiny", "--device", "cpu", "--out", str(tmp_path / "file")])
    assert raised.value.code == 2
    assert "cannot hold a record" in capsys.readouterr().err


def test_two_rungs_of_tiny_are_climbed(tmp_path, monkeypatch, capsys):
    """For real, in processes, compiled by nobody: two ways to choose the same kernels."""
    monkeypatch.setattr(ladder, "peak_of", lambda machine, precision: (1e12, "planted"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        "--presets",
        "tiny",
        "--T",
        "16",
        "--B",
        "1",
        "--rounds",
        "2",
        "--columns",
        "eager,kernels",
        "--device",
        "cpu",
    ]
    assert ladder.main([*words, "--out", str(tmp_path)]) == 0
    result = record.read(tmp_path / "ladder_tiny_eager+kernels_T16_B1.json")
    cells = cells_of(result)
    assert [cell["status"] for cell in cells.values()] == ["ok", "ok"]
    assert all(cell["tokens_per_s"]["low"] > 0 and len(cell["losses"]) == 3 for cell in cells.values())
    assert cells["+ fused kernels"]["over_first"] is not None
    assert result["kernels"] and result["sources"]
    assert (tmp_path / "ladder_tiny_eager+kernels_T16_B1.md").read_text().strip() in capsys.readouterr().out


class Interrupted(FakeArm):
    """Ctrl-C comes while it is asked for this."""

    def _maybe(self, what):
        if what == self.planted:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["start", "step"])
def test_ctrl_c_leaves_the_sizes_that_were_done(tmp_path, monkeypatch, capsys, at):
    """Of a ladder, which may climb for an hour: in a record beside the whole one, with a red check."""
    arms = iter([FakeArm(4.0, SAME), FakeArm(2.0, SAME), FakeArm(8.0, SAME), Interrupted(1.0, SAME, at)])
    monkeypatch.setattr(ladder, "ArmProcess", lambda *a: next(arms))
    monkeypatch.setattr(ladder, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(ladder, "peak_of", lambda machine, precision: (1e12, "planted"))
    monkeypatch.setattr(ladder.timing, "warm_up", lambda arm, **more: arm() and types.SimpleNamespace(stable=True))
    words = ["--presets", "tiny,gpt2_124m,gpt2_350m", "--columns", "eager,compile", "--T", "16", "--out", str(tmp_path)]
    assert ladder.main([*words, "--device", "cpu"]) == 130
    (path,) = tmp_path.glob("*_stopped.json")
    assert list(tmp_path.glob("*.json")) == [path]
    result = record.read(path)
    assert not record.problems(result, {**record.COMMON, **ladder.SCHEMA})
    cells = {(cell["preset"], cell["column"]): cell for cell in result["cells"]}
    assert [cell["status"] for cell in cells.values()] == ["ok", "ok", *["not run"] * 4]
    assert cells["gpt2_350m", "eager"]["reason"] == "stopped by Ctrl-C"
    assert [f["name"] for f in result["figures"]] == ["tiny eager tokens/s", "tiny compile tokens/s"]
    (red,) = [check for check in result["checks"] if not check["ok"]]
    assert (red["name"], red["detail"]) == ("ran to its end", "stopped by Ctrl-C")
    assert "*not run*" in capsys.readouterr().out
    arms = iter([Interrupted(1.0, SAME, at), FakeArm(1.0, SAME)])
    with pytest.raises(KeyboardInterrupt):  # nothing is there to be written
        ladder.main([*words, "--device", "cpu"])


def test_losses_in_fp8_have_a_bound_of_their_own():
    def equal(loss, variant):
        return ladder.throughput.equal_losses({"a": ([10.0], "bf16, compiled"), "b": ([loss], variant)})["ok"]

    assert equal(10.15, "fp8, compiled") and not equal(10.25, "fp8, compiled")
    assert equal(10.015, "bf16, compiled") and not equal(10.15, "bf16, compiled")
