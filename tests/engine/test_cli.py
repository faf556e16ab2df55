"""What a user types and reads: help, flags, mistakes, exits. Verbs that compute run on tiny models."""

import dataclasses
import gc
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import typing

import pytest

from tritium.engine import cli, presets
from tritium.engine.config import Config, ConfigError
from tritium.kernels import ops

ROOT = pathlib.Path(__file__).parents[2]
TRITIUM = [sys.executable, "-m", "tritium.engine.cli"]


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_and_mistakes_load_no_torch():
    code = (
        "import sys; from tritium.engine import cli\n"
        "for argv in (['--help'], ['train', 'tiny', '--help'], ['sample', '--help'], ['train', 'tinny'], ['no']):\n"
        "    cli.main(argv)\n"
        "print('HEAVY', {'torch', 'triton', 'matplotlib', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.rstrip().endswith("HEAVY set()")


def test_a_start_of_training_is_not_held_up_by_collections(tritium, monkeypatch):
    """torch and its compiler make a million objects that stay; and afterwards it is as it was, whatever happened."""
    from tritium.engine import train

    def main(config, reporter):
        during.append(gc.get_threshold())
        raise ConfigError("enough")

    during, before = [], gc.get_threshold()
    monkeypatch.setattr(train, "main", main)
    assert tritium("train", "tiny", "--run.out", "x")[0] == 1
    assert during[0][0] >= 100_000 and gc.get_threshold() == before


def test_without_tyro_flags_cannot_be_read_and_it_says_what_to_do():
    """A bare Python that has torch alone; what needs no flags works."""
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "from tritium.engine import cli\n"
        "print(cli.main(['--help']), cli.main(['bench', 'report', '--help']), cli.main(['kernels']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 0 1"
    assert f"tritium kernels: flags are read by the package tyro, which {sys.executable} does not have" in done.stderr
    assert "-m pip install tyro" in done.stderr
    assert "Traceback" not in done.stderr


def test_overview_names_every_verb(tritium):
    status, out, _ = tritium("--help")
    assert status == 0
    for verb in ("train", "replay", "prepare", "sample", "evaluate", "kernels", "bench", "ablate", "export"):
        assert re.search(rf"^  {verb} +\w", out, re.M), verb
    assert tritium()[0] == 2
    assert tritium("--version")[1].startswith("tritium ")


def test_train_help_shows_field_type_default_and_meaning(tritium, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = tritium("train", "tiny", "--help")
    assert status == 0
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    steps = presets.load("tiny").train.steps
    assert f"--train.steps INT Optimizer steps in the whole run. (default: {steps})" in words
    assert "--train.precision {auto,fp32,bf16,fp8}" in words
    assert "Rows (sequences of block_size tokens) per optimizer step" in words  # the unit
    assert [n for n in cli.flags_of(Config) if f"--{n} " not in words and f"--{n}," not in words] == []


BENCHMARKS = [f"bench {name}" for name in cli.BENCHMARKS]


VERBS = ["replay", "prepare", "sample", "evaluate", "export", "kernels", "bench", "ablate", *BENCHMARKS]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tritium, verb):
    status, out, _ = tritium(*verb.split(), "--help")
    assert status == 0
    assert "usage:" in out


def test_bench_without_a_word_lists_the_benchmarks(tritium):
    status, _, err = tritium("bench")
    assert status == 2
    for name, (about, _) in cli.BENCHMARKS.items():
        assert re.search(rf"^  {name} +{about}$", err, re.M)


def test_train_without_preset_lists_them(tritium):
    status, _, err = tritium("train")
    assert status == 2
    for name in presets.names():
        assert re.search(rf"^  {name} +\w", err, re.M)


def test_every_command_of_the_readme_is_understood():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^tritium [^\n#]+|`(?:tritium [^`]+)`", readme, re.M)
    options = {"prepare": cli.PrepareOptions, "sample": cli.SampleOptions, "evaluate": cli.EvaluateOptions}
    options |= {"kernels": cli.KernelsOptions, "export": cli.ExportOptions, "plan": cli.PlanOptions}
    positional = {"prepare": ["sources"], "sample": ["run"], "evaluate": ["run"], "export": ["run", "folder"]}
    positional["plan"] = ["preset"]
    seen = set()
    for text in commands:
        _, verb, *rest = shlex.split(text.strip("`"))
        seen.add(verb)
        if verb == "train":
            assert rest[0] in (*presets.names(), "PRESET", "runs/tiny"), text
            cli.normalise(rest[1:], Config)
        elif verb == "replay":
            assert rest[0].startswith("runs/tiny/bad_steps/step_"), text
            cli.normalise(rest[1:], Config)
        elif verb == "bench":
            assert rest[:1] == ["WHAT"] or rest[0] in cli.BENCHMARKS, text
        elif rest[:1] == ["check"]:
            cli.normalise(rest[1:], cli.CheckOptions, ["backend"])
        elif verb in options:
            cli.normalise(
                rest[1:] if verb == "kernels" and rest[:1] == ["tiny"] else rest,
                options[verb],
                positional.get(verb, []),
            )
    assert seen == set(cli.VERBS)
    for path in re.findall(r"`((?:engine|kernels|tests|benchmarks|docs)/[\w/.]+)`", readme):
        assert (ROOT / path).exists() or path == "kernels/OP/impl_NAME.py", path
    for name in presets.names():
        assert f"`{name}`" in readme


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["tran"], ["train", "plan", "All:"]),
        (["train", "gpt2_125m"], ["gpt2_124m", "gpt2_1558m", "gpt2_350m"]),
        (["train", "tiny", "--train.stps", "4"], ["--train.steps", "All:"]),
        (["train", "tiny", "--batch-rows", "4"], ["--train.batch_rows", "--train.micro_rows"]),
        (["train", "tiny", "--n_head", "4"], ["--model.n_head", "--model.n_kv_head"]),
        (["prepare", "x.txt", "--tokeniser", "bytes"], ["--tokenizer"]),
        (["kernels", "tinny"], ["tiny"]),
        (["bench", "kernel"], ["kernels", "All:"]),
        (["bench", "tiny"], ["bench train tiny", "peers"]),
        (["kernels", "check", "native", "--op", "layernorm"], ["layer_norm", "add_layer_norm", "rms_norm"]),
    ],
)
def test_unknown_names_get_the_nearest(tritium, argv, named):
    status, out, err = tritium(*argv)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    for name in named:
        assert name in err


def test_three_nearest_flags_are_named(tritium):
    err = tritium("train", "tiny", "--train.stps", "4")[2]
    assert len(re.findall(r"--[a-z]+\.[a-z_]+", err.split("nearest are")[1])) == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "tiny", "--train.steps", "abc"], "--train.steps wants a whole number, not 'abc'"),
        (["train", "tiny", "--train.steps=1.5"], "--train.steps wants a whole number, not '1.5'"),
        (["train", "tiny", "--optim.lr", "fast"], "--optim.lr wants a number, not 'fast'"),
        (["train", "tiny", "--optim.lr", "nan"], "--optim.lr wants a number, not 'nan'"),
        (["train", "tiny", "--model.norm", "batch"], "--model.norm wants one of layer_norm, rms_norm, not 'batch'"),
        (["train", "tiny", "--model.bias=maybe"], "--model.bias wants true or false, not 'maybe'"),
        (["train", "tiny", "--train.steps"], "--train.steps wants a whole number and got none"),
        (["train", "tiny", "--train.steps", "--model.bias"], "--train.steps wants a whole number and got none"),
        (["train", "tiny", "5"], "'5' is one argument too many"),
        (["train", "--train.steps", "5"], "a preset comes first"),
        (["prepare"], "SOURCES is missing"),
        (["sample"], "RUN is missing"),
        (["export", "runs/x"], "FOLDER is missing"),
    ],
)
def test_bad_values_name_rule_and_value(tritium, argv, said):
    status, out, err = tritium(*argv)
    assert (status, out) == (2, "")
    assert said in err


def test_all_problems_of_a_configuration_at_once(tritium, trained):
    status, _, err = tritium("train", "tiny", "--model.n_head", "5", "--train.batch_rows=17", "--optim.beta1", "2")
    assert status == 1
    assert len(re.findall("^  - ", err, re.M)) == 3
    assert trained == []


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "argv",
    [
        ["--train.steps", "7"], ["--train.steps=7"], ["--train.steps", "5", "--train.steps", "7"],
    ],
)  # fmt: skip
def test_flag_forms(tritium, trained, argv):
    assert tritium("train", "tiny", *argv)[0] == 0
    tiny = presets.load("tiny")
    assert trained == [dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=7))]


@pytest.mark.parametrize(
    ("argv", "section", "field", "value"),
    [
        (["--train.batch-rows", "32"], "train", "batch_rows", 32),
        (["--train.batch_rows=32"], "train", "batch_rows", 32),
        (["--optim.lr", "1e-4"], "optim", "lr", 1e-4),
        (["--kernels", "triton"], "kernels", "default", "triton"),
        (["--kernels=triton"], "kernels", "default", "triton"),
        (["--kernels.attention=my_pkg.my_module"], "kernels", "attention", "my_pkg.my_module"),
        (["--kernels.override", "a=b", "c=d"], "kernels", "override", ("a=b", "c=d")),
        (["--kernels.override", "a=b", "--kernels.override=c=d"], "kernels", "override", ("a=b", "c=d")),
        (["--data.sources", "a.txt", "b c.txt"], "data", "sources", ("a.txt", "b c.txt")),
        (["--model.no-bias"], "model", "bias", False),
        (["--model.no_bias"], "model", "bias", False),
        (["--model.bias=false"], "model", "bias", False),
        (["--model.bias", "False"], "model", "bias", False),
        (["--model.no-bias", "--model.bias"], "model", "bias", True),
        (["--model.qk_norm"], "model", "qk_norm", True),
        (["--model.qk_norm", "True"], "model", "qk_norm", True),
        (["--train.compile", "false"], "train", "compile", "false"),
        (["--train.seed", "-3"], "train", "seed", -3),
        (["--data.field="], "data", "field", ""),
    ],
)
def test_flags_reach_the_configuration(tritium, trained, argv, section, field, value):
    status, _, err = tritium("train", "tiny", *argv)
    assert (status, err) == (0, "")
    assert getattr(getattr(trained[-1], section), field) == value
    tiny = presets.load("tiny")
    others = dataclasses.replace(trained[-1], **{section: getattr(tiny, section)})
    assert others == tiny


def test_every_field_of_the_configuration_can_be_set():
    """A field whose type the command line did not understand would be found out only by the user who needs it."""
    words = {int: "3", float: "0.5", bool: "true", str: "word"}
    values = {}
    for name, hint in cli.flags_of(Config).items():
        first = typing.get_args(hint)[0] if typing.get_args(hint) else hint  # of a Literal: its first word
        values[name] = words.get(first, first)
    argv = [word for name, value in values.items() for word in (f"--{name}", value)]
    config = dataclasses.asdict(cli.parse(Config, argv, "train tiny", "", default=Config()))
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        found = config[section][field] if section else config[field]
        assert str(found[0] if isinstance(found, tuple) else found).lower() == value, name


def test_a_run_folder_continues_with_its_stored_configuration(tritium, trained, tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    tiny = presets.load("tiny")
    stored = dataclasses.replace(
        tiny, name="mine", train=dataclasses.replace(tiny.train, steps=9),
        run=dataclasses.replace(tiny.run, out="", resume="never"),
    )  # fmt: skip
    (folder / "config.json").write_text(stored.to_json())
    assert tritium("train", "runs/mine", "--optim.lr", "0.5")[0] == 0
    config = trained[-1]
    assert (config.train.steps, config.optim.lr, config.run.out, config.run.resume) == (9, 0.5, "runs/mine", "auto")
    (folder / "config.json").unlink()
    status, _, err = tritium("train", "runs/mine")
    assert status == 1
    assert "holds no config.json" in err


def test_closing_report_says_how_to_go_on(tritium, trained):
    status, out, _ = tritium("train", "tiny")
    assert status == 0
    assert "said" in out
    assert "the model beats the bigram model by 25.0%" in out
    for needed in (
        "train runs/tiny --train.steps 1000",
        'sample runs/tiny --prompt "The"',
        "torchrun --nproc-per-node=8 -m tritium.engine.cli train gpt2_124m",
    ):
        assert needed in out


# -------------------------------------------------------------------------------------------------------------- errors


def known_errors():
    from tritium.engine.checkpoint import CheckpointError
    from tritium.engine.data.errors import DataError
    from tritium.kernels.op import KernelError

    yield ConfigError("the rule"), "the rule"
    yield KernelError("no backend"), "no backend"
    yield DataError("bad shard"), "bad shard"
    yield CheckpointError("damaged"), "damaged"
    yield OSError(28, "No space left on device", "runs/x"), "No space left on device (runs/x); free space"
    yield PermissionError(13, "Permission denied", "runs/x"), "Permission denied (runs/x); choose a folder"


def test_known_errors_are_a_message_and_no_traceback(tritium, trained, monkeypatch):
    for error, said in known_errors():
        trained.error = error
        status, _, err = tritium("train", "tiny")
        assert status == 1
        assert err.startswith("tritium train: ")
        assert said in err
        assert "Traceback" not in err
    monkeypatch.setenv("TRITIUM_DEBUG", "1")
    with pytest.raises(PermissionError):
        cli.main(["train", "tiny"])


def test_an_unexpected_error_is_not_hidden(tritium, trained):
    trained.error = ZeroDivisionError("a fault of ours")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "tiny"])


def test_a_second_ctrl_c_ends_training_at_once(tritium, trained):
    trained.error = KeyboardInterrupt()
    status, _, err = tritium("train", "tiny")
    assert status == 130
    assert "stopped at once, without saving" in err
    assert "train runs/tiny goes on from its last checkpoint" in err


def test_ctrl_c_in_a_verb_is_a_line_and_130(tmp_path):
    big = tmp_path / "big.txt"
    big.write_text("the cat sat on the mat and looked at the dog. " * 600_000)
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*TRITIUM, "prepare", str(big), "--tokenizer", "bpe:512", "--out", "data", "--workers", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = 200
    while not (tmp_path / "data" / ".partial").exists() and deadline:
        deadline -= 1
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{' '.join(TRITIUM)} train --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------- prepare


def test_prepare_says_what_it_made_and_where(tritium, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n{"text": "seven"}\n')
    status, out, err = tritium("prepare", "a.jsonl", "--tokenizer", "bytes", "--out", "d", "--val-fraction", "0.5")
    assert (status, err) == (0, "")
    assert "bytes, 257 ids" in out
    assert "train PRESET --data.folder d" in out
    counts = {k: int(v.replace(",", "")) for k, v in re.findall(r"(\w+) +([\d,]+) tokens, \d+ documents", out)}
    assert sum(counts.values()) == len("one two three" + "four five six" + "seven") + 3
    status, out, err = tritium("prepare", "a.jsonl", "--tokenizer", "gpt2:no", "--out", "e")
    assert status == 1
    assert "gpt2:no" in err


def test_prepare_without_out_uses_the_folder_train_looks_into(tritium, tmp_path):
    from tritium.engine.config import data_folder
    from tritium.engine.data.prepare import is_prepared

    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n{"text": "four five six"}\n')
    assert tritium("prepare", "a.jsonl", "--tokenizer", "bytes")[0] == 0
    config = dataclasses.replace(
        Config(), data=dataclasses.replace(Config().data, sources=("a.jsonl",), tokenizer="bytes")
    )
    assert is_prepared(data_folder(config))


# ----------------------------------------------------------------------------------------- train, sample, evaluate


def test_a_run_from_text_to_text(tritium, tmp_path):
    """The whole path a user takes, on real functions: train, continue, sample, evaluate."""
    lines = (
        f"the {a} {b} the {c}" for a in ("cat", "dog") for b in ("sees", "likes", "hears") for c in ("bird", "cow") * 9
    )
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{line} {i}"}}\n' for i, line in enumerate(lines)))
    flags = (
        "--data.sources text.jsonl --data.tokenizer bytes --data.val_fraction 0.1 --model.n-layer 1 --model.n-embd 16"
    )
    flags += " --model.n-head 2 --model.block_size 16 --train.batch-rows 4 --train.micro-rows 2 --train.compile=false"
    flags += " --train.steps 6 --train.device cpu --train.eval-every 3 --train.log-every 2"
    flags += " --run.no-tensorboard --run.save-every 2"
    status, out, err = tritium("train", "tiny", *flags.split())
    assert status == 1, err  # six steps do not beat the bigram model, which tiny requires
    assert "does NOT beat the bigram model" in out
    assert re.search(r"^step 6/6 \| loss \d\.\d+", out, re.M)
    for name in ("sample.txt", "loss.png", "metrics.jsonl", "checkpoints/step_00000006"):
        assert (tmp_path / "runs/tiny" / name).exists()
        assert f"runs/tiny/{name}" in out
    status, out, err = tritium("train", "runs/tiny", "--train.steps", 8, "--run.no-require-bigram")
    assert status == 0, err
    assert "resumed from runs/tiny/checkpoints/step_00000006 at step 6" in out
    assert re.search(r"^step 8/8 ", out, re.M)
    status, _, err = tritium("train", "runs/tiny", "--model.n_layer", 2)
    assert status == 1
    assert "model.n_layer: 1 → 2" in err
    assert tritium("sample", "runs/tiny", "--prompt", "the", "--tokens", 5)[1].startswith("the")
    status, out, err = tritium("evaluate", "runs/tiny")
    assert status == 0, err
    assert "nats per token" in out


def test_sample_repeats_with_its_seed_and_goes_on_from_the_prompt(tritium, run_folder):
    ask = ("sample", run_folder, "--prompt", "documént ", "--tokens", 12, "--device", "cpu")
    status, first, err = tritium(*ask, "--seed", 3)
    assert status == 0
    assert first.startswith("documént ")
    assert "small, step 7" in err
    assert "12 tokens" in err
    assert tritium(*ask, "--seed", 3)[1] == first
    second = tritium(*ask, "--seed", 4)[1]
    assert second != first
    both = tritium(*ask, "--seed", 3, "--num", 2)[1]
    assert both == f"--- sample 1 of 2, seed 3 ---\n{first}--- sample 2 of 2, seed 4 ---\n{second}"


def test_sample_is_what_generate_says(tritium, run_folder):
    from tritium.engine.checkpoint import load_run
    from tritium.engine.generate import generate

    restored = load_run(run_folder)
    ids = [restored.tokenizer.eot, *restored.tokenizer.encode("ab")]
    expected = generate(restored.model, [ids], 9, temperature=0.7, top_k=9, top_p=0.9, seed=5)[0]
    _, out, _ = tritium(
        "sample",
        run_folder,
        "--prompt",
        "ab",
        "--tokens",
        9,
        "--temperature",
        0.7,
        "--top_k",
        9,
        "--top-p",
        0.9,
        "--seed=5",
    )
    cut = expected.index(restored.tokenizer.eot) if restored.tokenizer.eot in expected else len(expected)
    assert out == "ab" + restored.tokenizer.decode(expected[:cut]) + "\n"


def test_sample_reads_the_prompt_from_standard_input(tritium, run_folder, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("from there"))
    path = next((run_folder / "checkpoints").iterdir())
    status, out, _ = tritium("sample", path, "--prompt", "-", "--tokens", 3)
    assert status == 0
    assert out.startswith("from there")
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 20))
    assert "the model sees the last 16" in tritium("sample", run_folder, "--prompt", "-", "--tokens", 1)[2]


@pytest.mark.parametrize(
    ("flags", "said", "status"),
    [
        (["--temperature", -1], "temperature must be at least 0", 1),
        (["--top-p", 0], "top_p must be in (0, 1], not 0.0", 1),
        (["--num", 0], "--num must be at least 1, not 0", 2),
        (["--kernels", "nonsense.module"], "nonsense.module", 1),
    ],
)
def test_sample_refuses_what_makes_no_sense(tritium, run_folder, flags, said, status):
    got, _, err = tritium("sample", run_folder, *flags)
    assert got == status
    assert said in err


def test_a_damaged_checkpoint_is_a_clear_error(tritium, run_folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    victim = next((broken / "checkpoints").glob("*/*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    for verb in ("sample", "evaluate"):
        status, _, err = tritium(verb, broken)
        assert status == 1
        assert "is damaged: SHA-256" in err
    status, _, err = tritium("sample", tmp_path / "nowhere")
    assert status == 1
    assert "does not exist" in err


def test_evaluate_shows_the_figures_of_the_function(tritium, run_folder):
    import torch

    from tritium.engine.checkpoint import load_run
    from tritium.engine.evaluate import evaluate

    restored = load_run(run_folder)
    data = restored.config.data.folder
    expected = evaluate(restored.model, data, torch.device("cpu"), tokenizer=restored.tokenizer.identity, T=16)
    status, out, err = tritium("evaluate", run_folder)
    assert (status, err) == (0, "")
    assert f"loss        {expected.loss:.4f} nats per token, over {expected.tokens:,} tokens" in out
    assert f"model     {expected.bits_per_byte:.4f}" in out
    assert f"bigram    {expected.baselines['bigram']:.4f}" in out
    assert "does NOT beat the bigram model" in out


def test_exported_weights_sample_the_same_and_load_in_transformers(tritium, run_folder, tmp_path):
    import torch
    import transformers

    status, out, _ = tritium("export", run_folder, "gpt2")
    assert status == 0
    assert "exported small, step 7" in out
    ask = ("--prompt", "abc", "--tokens", 8)
    assert tritium("sample", "gpt2", *ask)[1] == tritium("sample", run_folder, *ask)[1]
    data = run_folder.parents[1] / "data"
    ours = tritium("evaluate", run_folder)[1].splitlines()[1:]
    assert tritium("evaluate", "gpt2", "--data", data)[1].splitlines()[1:] == ours
    status, _, err = tritium("evaluate", "gpt2")
    assert status == 1
    assert "--data" in err
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    from tritium.engine.checkpoint import load_run

    ids = torch.arange(16)[None]
    assert torch.allclose(theirs(ids).logits, load_run(run_folder).model(ids), atol=1e-4)
    status, _, err = tritium("export", run_folder, "gpt2")
    assert status == 1
    assert "not empty" in err


def test_evaluate_refuses_shards_of_another_tokenizer(tritium, run_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "some text {i}"}}\n' for i in range(20)))
    assert tritium("prepare", "t.jsonl", "--tokenizer", "bpe:260", "--out", "other", "--val-fraction", "0.3")[0] == 0
    status, _, err = tritium("evaluate", run_folder, "--data", "other")
    assert status == 1
    assert "tokenized with bpe" in err
    assert "bytes" in err
    status, _, err = tritium("evaluate", run_folder, "--data", "missing")
    assert status == 1
    assert "missing" in err


@pytest.mark.parametrize("text", ["abc", "é漢😀z", "漢"])
def test_pieces_are_whole_characters(text):
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    ids = list(text.encode())
    seen: list[int] = []
    assert list(filter(None, cli._pieces(decode, iter(ids), 256, seen))) == list(text)
    assert seen == ids
    cut = "".join(cli._pieces(decode, iter([*text.encode(), 0xE6, 256, 65]), 256, []))  # ends inside a character
    assert cut == text + "\ufffd"


def test_pieces_of_a_tokenizer_that_decodes_beginnings_differently():
    def decode(ids):
        return " ".join(f"w{i}" for i in ids)  # as WordPiece: a space before every word but the first

    assert "".join(cli._pieces(decode, iter([1, 2, 3]), 99, [])) == "w1 w2 w3"


# ------------------------------------------------------------------------------------------------------------- kernels


def test_kernels_of_an_h100_on_any_machine(tritium):
    status, out, _ = tritium("kernels", "--device", "cuda", "--arch", "sm_90")
    assert status == 0
    assert "cuda sm_90; not this machine" in out
    assert "bfloat16, train, compiled" in out
    table = out.split("\n\n")[1]
    assert [line.split()[0] for line in table.splitlines() if not line.startswith(" ")] == list(cli_ops())
    native = next(line for line in table.splitlines() if line.split()[0] == "native" or " native " in line)
    assert "no: the native kernels run on the CPU and this site is on cuda" in native
    assert table.count("<- auto") == len(cli_ops())


def cli_ops():
    from tritium.kernels.ops import OPS

    return OPS


def test_kernels_of_a_preset_shows_what_would_be_bound(tritium):
    status, out, _ = tritium("kernels", "tiny", "--device", "cpu", "--compile", "false", "--precision", "fp32")
    assert status == 0
    assert "cpu " in out
    assert "float32, train, eager, tiny" in out
    assert "train tiny would bind:" in out
    assert re.search(r"blocks\.\*\.attention +attention +", out)
    assert re.search(r"optimizer +adamw +", out)


def test_kernels_refuse_what_cannot_be_met(tritium, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, _, err = tritium("kernels", "tiny", "--device", "cpu", "--kernels", "triton")
    assert status == 1
    for op in (ops.attention, ops.linear_cross_entropy):  # every backend of the op, and what it says
        assert f"{op.name}=triton was chosen and cannot serve" in err
        own = err.partition(f"{op.name}=triton was chosen")[2].partition(" was chosen")[0]
        for name in op.backends():
            assert re.search(rf"^    {name} +\S", own, re.M), (op, name)
        assert re.search(
            r"^    triton +Triton compiles for GPUs and this site is on cpu; .*TRITON_INTERPRET=1", own, re.M
        )
    status, _, err = tritium("kernels", "--device", "cuda", "--arch", "hopper")
    assert status == 2
    assert "not 'hopper'" in err


# calls what takes no tensors without memory, inside an op
NATIVE = """
import torch, torch.nn.functional as F
from torch import Tensor
from tritium.kernels.autograd import differentiable
def forward(x: Tensor, approximate: str) -> tuple[Tensor]:
    assert x.numel() == 0 or x.data_ptr()
    return (F.gelu(x, approximate=approximate),)
def backward(dy: Tensor, x: Tensor, approximate: str) -> tuple[Tensor]:
    return (torch.ops.aten.gelu_backward(dy, x, approximate=approximate),)
_gelu = differentiable(__name__.replace(".", "_"), forward=forward, backward=backward,
    fake_forward=lambda x, a: (torch.empty_like(x),), fake_backward=lambda dy, x, a: (torch.empty_like(x),),
    save=lambda args, results: args, gradients=(0,))
def gelu(x, approximate='tanh'): return _gelu(x, approximate)
"""
RETURN = "    return (F.gelu("
# backends whose numbers are right and whose host would wait for a GPU: plainly, inside an op, in backward, or in an op
# of torch's library; and one that is for CPUs alone and says so: its host reads what is its own
WAITS = {
    "item": "import torch.nn.functional as F\ndef gelu(x, approximate='tanh'):\n"
            "    return F.gelu(x, approximate=approximate) + 0 * x.detach().isnan().sum().item()",
    "forward_waits": NATIVE.replace(RETURN, "    float(x.sum())\n" + RETURN),
    "backward_waits": NATIVE.replace("    return (torch.ops", "    bool(dy.isnan().any())\n    return (torch.ops"),
    "library_waits": """
import torch, torch.nn.functional as F
from torch import Tensor
@torch.library.custom_op("my_kernels::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.sum().item() == 12345.0 else torch.zeros_like(x)
waits.register_fake(lambda x: torch.empty_like(x))
def gelu(x, approximate='tanh'): return F.gelu(x, approximate=approximate) + waits(x.detach())
""",
    "cpu_alone": "import torch.nn.functional as F\ndef gelu(x, approximate='tanh'):\n"
                 "    return F.gelu(x, approximate=approximate) + 0 * x.detach().isnan().sum().item()\n"
                 "def unsupported(site): return None if site.device == 'cpu' else 'is for CPUs'",
}  # fmt: skip


@pytest.fixture
def my_kernels(tmp_path, monkeypatch):
    """A user's backends of gelu: one right, one 2 % off, one that calls what takes no tensors without memory, one that
    is for another machine."""
    package = tmp_path / "my_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    good = "import torch.nn.functional as F\ndef gelu(x, approximate='tanh'): return F.gelu(x, approximate=approximate)"
    (package / "good.py").write_text(good)
    (package / "bad.py").write_text(good.replace("=approximate)", "=approximate) * 1.02"))
    (package / "native.py").write_text(NATIVE)
    for name, text in WAITS.items():
        (package / f"{name}.py").write_text(text)
    (package / "elsewhere.py").write_text(good + "\ndef unsupported(site): return 'is for another machine'")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield package
    for op in ops.OPS.values():
        op._loaded.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_kernels"]:
        del sys.modules[name]


CHECK = ("--op", "gelu", "--device", "cpu", "--dtypes", "fp32", "--cases", "odd")


def test_kernels_check_gives_a_verdict_and_a_status(tritium, my_kernels):
    status, out, err = tritium("kernels", "check", "my_kernels.good", *CHECK, "--arch", "sm_90")
    assert (status, err) == (0, "")
    sections = re.split(r"^== (\w+) of gelu\.my_kernels\.good$", out, flags=re.M)
    assert sections[1::2] == ["contract", "resources", "benchmark"]
    assert "gelu.my_kernels.good on cpu holds the contract (2 passed, 0 failed, 0 refused)" in sections[2]
    assert "no Triton kernels: resources not applicable" in sections[4]
    rows = re.findall(r"^gelu\.my_kernels\.good +odd +fp32 +(forward\S*) .* × reference \[", sections[6], re.M)
    assert rows == ["forward", "forward+backward"]
    assert out.splitlines()[-1] == "verdict: right"


def test_kernels_check_shows_no_speed_of_what_is_wrong(tritium, my_kernels):
    status, out, _ = tritium("kernels", "check", "my_kernels.bad", *CHECK, "--no-resources")
    assert status == 1
    assert "BREAKS the contract" in out
    assert " ms [" not in out and "no speed is shown of a backend that is wrong" in out
    assert out.splitlines()[-1] == "verdict: wrong: breaks the contract (1 of 1 cases)"


def test_kernels_check_of_what_cannot_run_is_refused(tritium, my_kernels):
    status, out, _ = tritium("kernels", "check", "my_kernels.elsewhere", *CHECK, "--arch", "sm_90")
    assert status == 1
    assert "== resources of gelu.my_kernels.elsewhere\nrefused: is for another machine\n" in out
    assert " ms [" not in out
    assert out.splitlines()[-1] == "verdict: refused: no case could be run on cpu: is for another machine"
    status, _, err = tritium("kernels", "check", "my_kernels.none", "--op", "gelu", "--device", "cpu")
    assert status == 1
    assert "my_kernels.none" in err


def test_kernels_check_looks_at_the_resources_of_what_cannot_be_called_without_memory(tritium, my_kernels):
    status, out, _ = tritium("kernels", "check", "my_kernels.native", *CHECK, "--arch", "sm_90", "--no-bench")
    assert (status, out.splitlines()[-1]) == (0, "verdict: right")
    assert "no Triton kernels: resources not applicable\n(called on tensors without memory: gelu odd sm_90: " in out


@pytest.mark.parametrize("name", [name for name in WAITS if name != "cpu_alone"])
def test_kernels_check_of_a_host_that_waits_is_wrong(tritium, my_kernels, name):
    status, out, _ = tritium("kernels", "check", f"my_kernels.{name}", *CHECK, "--no-resources", "--no-bench")
    assert status == 1, out
    assert re.search(rf"^failed .* eager: raised HostSync: aten\.\S+ at \S+{name}\.py:\d+ \(", out, re.M), out
    assert out.splitlines()[-1].startswith("verdict: wrong: breaks the contract (")


def test_kernels_check_lets_what_is_for_cpus_alone_read(tritium, my_kernels):
    flags = ("--no-resources", "--no-bench")
    status, out, _ = tritium("kernels", "check", "my_kernels.cpu_alone", *CHECK, *flags)
    assert (status, out.splitlines()[-1]) == (0, "verdict: right"), out
    assert "holds the contract (2 passed, 0 failed, 0 refused)" in out, "eagerly and in a graph"


def test_kernels_check_says_right_only_of_what_was_measured(tritium, my_kernels, monkeypatch):
    from tritium.benchmarks import kernels

    monkeypatch.setattr(kernels, "bench_ops", lambda request, gate, clock, refused: iter(()))
    status, out, _ = tritium("kernels", "check", "my_kernels.good", *CHECK, "--no-resources")
    assert status == 1
    assert out.splitlines()[-1].startswith("verdict: not measured: right as far as the contract shows")


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--cases", "od"), "odd"), (("--arch", "hopper"), "sm_90"), (("--dtypes", "fp64"), "fp32")],
)
def test_kernels_check_refuses_flags_it_does_not_understand(tritium, flags, named):
    status, _, err = tritium("kernels", "check", "reference", "--op", "gelu", *flags)
    assert status == 2
    assert named in err


def test_kernels_check_without_a_backend_tries_all_of_them(tritium):
    status, out, err = tritium("kernels", "check", "--op", "rms_norm", "gelu", "--dtypes", "fp32", "--device", "cpu")
    verdicts = re.findall(r"^(\w+)\.(\w+) on cpu (holds|refuses|BREAKS)", out, re.M)
    from tritium.kernels.ops import OPS

    expected = {(op, b) for op in ("rms_norm", "gelu") for b in OPS[op].backends() if b != "reference"}
    assert {(op, b) for op, b, _ in verdicts} == expected, err
    tried = any(word == "holds" for _, _, word in verdicts) and not any(word == "BREAKS" for _, _, word in verdicts)
    assert (status == 0) == tried
    assert out.splitlines()[-1].startswith("verdict: right (" if tried else "verdict: ")
    assert "== " not in out, "the contract alone"
    status, out, _ = tritium("kernels", "check", "apex", "--op", "rms_norm", "--dtypes", "fp32", "--device", "cpu",
                             "--no-resources")  # fmt: skip
    assert status == 1  # asked for by name, and could not be tried
    assert "refuses every case" in out
