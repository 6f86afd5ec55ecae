"""Nothing is lost, nothing is run, nothing goes wrong silently: two runs at once, damaged files, broken models."""

import contextlib
import errno
import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import assert_same, lora, pair_rows, write_json, write_parquet
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import training_utils
from training_options import one_line
from training_utils import (
    LOCK_FILE,
    LORA_FILE,
    METRICS_FILE,
    STATE_FILE,
    add_metrics,
    checksum,
    lock_output_dir,
    read_checkpoint,
    read_metrics,
)

QUICK = {"objective": "inpo", "inversion_steps": 1, "learning_rate": 1e-3, "checkpointing_steps": 1}
LATEST = {"resume_from_checkpoint": "latest"}


# Two runs at once


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from training_utils import lock_output_dir
lock = lock_output_dir(sys.argv[2])
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_one_has_died(refused, no_models, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, Path(__file__).parents[1], folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        for options in ({}, LATEST):
            message = refused(**options)
            assert "--output_dir" in message and "in use" in message
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        assert lock_output_dir(folder, is_main_process=False) is None  # the main process of a run locks for all
        monkeypatch.setenv("RANK", "1")  # which alone says nothing
        assert "in use" in refused()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    monkeypatch.delenv("RANK")
    lock = lock_output_dir(folder)
    assert lock.is_locked
    lock.release(force=True)


def test_a_run_that_ended_while_another_one_started_is_not_overwritten(refused, no_models, tmp_path, monkeypatch):
    """The second one found an empty folder, and took the lock when the first one had let go of it."""
    load_pairs = training_utils.load_pairs

    def load_late(args):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LORA_FILE).write_bytes(b"precious")
        return load_pairs(args)

    monkeypatch.setattr(training_utils, "load_pairs", load_late)
    assert LORA_FILE in refused() and (tmp_path / "run" / LORA_FILE).read_bytes() == b"precious"


# Checkpoints


def damage(kind, file):
    if kind == "absent":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:  # one bit
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the first test leaves a run of three steps, with a checkpoint each, and its last LoRA."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def three_steps(train, kept, tmp_path):
    """A run of three steps as if it had been killed after the third checkpoint; returns its folder, and its LoRA."""
    if not kept.exists():
        shutil.copytree(train("whole", max_train_steps=3, **QUICK), kept)
    folder = shutil.copytree(kept, tmp_path / "run")
    for name in (LORA_FILE, "README.md", "training_config.json"):
        (folder / name).unlink()
    return folder, lora(kept)


@pytest.mark.parametrize("kind", ["absent", "empty", "cut", "one bit"])
@pytest.mark.parametrize("name", [LORA_FILE, "optimizer.bin", "random_states_0.pkl", STATE_FILE])
def test_latest_takes_the_newest_sound_checkpoint(train, three_steps, caplog, name, kind):
    folder, expected = three_steps
    damage(kind, folder / "checkpoint-3" / name)
    train(max_train_steps=3, **QUICK, **LATEST)
    assert_same(lora(folder), expected)
    assert not any("step 0" in record.getMessage() for record in caplog.records)
    (line,) = [record.getMessage() for record in caplog.records if "checkpoint-3" in record.getMessage()]
    assert name in line
    names = {path.name for path in folder.iterdir() if path.name.startswith("checkpoint")}
    assert names == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    (damaged,) = folder.glob("damaged-checkpoint-3*")  # kept when its step was written again
    assert kind == "absent" or (damaged / name).exists()
    assert [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()] == [1, 2, 3]


def test_a_damaged_checkpoint_that_is_named_is_refused(refused, no_models, three_steps):
    folder, _ = three_steps
    damage("one bit", folder / "checkpoint-3" / "optimizer.bin")
    message = refused(max_train_steps=4, **QUICK, resume_from_checkpoint="checkpoint-3")
    assert message.startswith("--resume_from_checkpoint checkpoint-3: ") and "latest" in message
    assert "optimizer.bin is damaged" in message


def test_without_a_sound_checkpoint_the_run_is_refused_and_names_why(refused, no_models, three_steps):
    folder, _ = three_steps
    for i in (1, 2, 3):
        damage("empty", folder / f"checkpoint-{i}" / STATE_FILE)
    message = refused(max_train_steps=3, **QUICK, **LATEST)
    assert message.startswith("--resume_from_checkpoint latest: ") and message.count(STATE_FILE) == 3
    assert {path.name for path in folder.glob("*checkpoint*")} == {f"checkpoint-{i}" for i in (1, 2, 3)}


def test_the_limit_of_checkpoints_never_costs_a_sound_one(train, three_steps):
    """Damaged ones beyond the step that is written are not counted."""
    folder, expected = three_steps
    for i in (2, 3):
        damage("one bit", folder / f"checkpoint-{i}" / "optimizer.bin")
    train(max_train_steps=2, checkpoints_total_limit=1, **QUICK, **LATEST)
    train(max_train_steps=3, checkpoints_total_limit=1, **QUICK, **LATEST)
    assert_same(lora(folder), expected)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin"])
def test_nothing_in_a_checkpoint_is_run(train, refused, three_steps, tmp_path, name):
    """Even where the checksums agree: it is refused or left alone."""
    folder, _ = three_steps
    file = folder / "checkpoint-3" / name
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    pickle.loads(file.read_bytes())
    (tmp_path / "ran").unlink()  # so it would run
    state = json.loads((folder / "checkpoint-3" / STATE_FILE).read_text())
    write_json(folder / "checkpoint-3" / STATE_FILE, checksums={**state["checksums"], name: checksum(file)})
    if name == "optimizer.bin":
        message = refused(max_train_steps=4, **QUICK, **LATEST)
        assert "checkpoint-3" in message and "weights_only" not in message
    else:
        with contextlib.suppress(Exception, SystemExit):
            train(max_train_steps=4, **QUICK, **LATEST)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [None, STATE_FILE, LORA_FILE, "optimizer.bin"])
def test_a_list_of_checksums_that_lacks_files_is_damaged(three_steps, name):
    file = three_steps[0] / "checkpoint-3" / STATE_FILE
    checksums = json.loads(file.read_text())["checksums"]
    write_json(file, checksums={k: v for k, v in checksums.items() if name and k != name})
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(file.parent)


@pytest.mark.parametrize("damage", [b"\xff{", b"", b"[1]", b'{"step": "2"}', b'{"step": 2, "lost": 0.5}'])
def test_a_damaged_line_of_metrics_is_left_out(train, three_steps, caplog, damage):
    """In the last, a letter of a name is another one, which is noticed by nobody and stops nothing."""
    file = three_steps[0] / METRICS_FILE
    first, _, third, _ = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([first, damage, third, b""]))
    train(max_train_steps=4, **QUICK, **LATEST)
    assert [row["step"] for row in read_metrics(file)] == ([1, 2, 3, 4] if b"lost" in damage else [1, 3, 4])
    assert any("damaged lines left out: 1" in record.getMessage() for record in caplog.records) == (
        b"lost" not in damage
    )


def test_a_full_disk_is_named_with_the_way_to_go_on(train, tmp_path, monkeypatch):
    save_state = Accelerator.save_state

    def save(self, output_dir, *args):
        save_state(self, output_dir, *args)
        if output_dir.name.endswith("-2"):
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(Accelerator, "save_state", save)
    with pytest.raises(
        RuntimeError, match="checkpoint-2 cannot be written, .* MiB are free: .*--resume_from_checkpoint"
    ):
        train(max_train_steps=3, **QUICK)
    monkeypatch.setattr(Accelerator, "save_state", save_state)
    whole = train("whole", max_train_steps=3, **QUICK)
    assert_same(lora(train(max_train_steps=3, **QUICK, **LATEST)), lora(whole))


@pytest.mark.parametrize("place", ["run", "README.md"])
def test_a_full_disk_is_named_for_results(train, tmp_path, monkeypatch, place):
    def full(write):
        def call(self, *args, **options):
            if (self.parent.name == place and self.name.startswith(LORA_FILE)) or self.name == place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, *args, **options)

        return call

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, full(getattr(Path, name)))
    options = {"max_train_steps": 1}
    with pytest.raises(RuntimeError, match="run.* cannot be written, .*No space.*--resume_from_checkpoint"):
        train(**QUICK, **options)
    if place == "run":
        monkeypatch.undo()
        train(**QUICK, **options, **LATEST)


def test_a_full_disk_is_not_the_models_fault(refused, tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert refused(inversion_cache_dir=tmp_path / "cache").startswith("--inversion_cache_dir ")


def test_metrics_that_cannot_be_written_say_so():
    with pytest.raises(RuntimeError, match="cannot be written, .*space.*--resume_from_checkpoint"):
        add_metrics(Path("/dev/full"), {"step": 1, "loss": 0.5})


def test_latest_with_nothing_to_do_says_so(train, three_steps, caplog):
    folder, _ = three_steps
    train(max_train_steps=2, **QUICK, **LATEST)
    assert any("Nothing to train: 3 steps are done" in record.getMessage() for record in caplog.records)
    assert json.loads((folder / "training_config.json").read_text())["steps"] == 3


# Models that are subtly broken


def break_model(kind, folder):
    if kind == "no vocabulary":
        for file in (folder / "tokenizer").iterdir():
            if file.name != "tokenizer_config.json":
                file.unlink()
    elif kind == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif kind in ("fp16 only", "fp16 only, bin"):
        suffix = "bin" if "bin" in kind else "safetensors"
        for file in folder.glob("**/*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.fp16.{suffix}"))
    elif kind == "sampler's package":
        write_json(folder / "scheduler" / "scheduler_config.json", _class_name="DPMSolverSDEScheduler")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("no vocabulary", "tokenizer"), ("no tokenizer", "tokenizer"), ("fp16 only", "--variant fp16"),
        ("fp16 only, bin", "--variant fp16"),
        ("sampler's package", "torchsde"),
    ],
)  # fmt: skip
def test_a_broken_model_is_refused_before_weights_load(refused, no_models, tiny_model, tmp_path, kind, named):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    break_model(kind, folder)
    message = refused(pretrained_model_name_or_path=folder, validation_prompts=["a"])
    assert message.startswith(f"--pretrained_model_name_or_path {folder}") and named in message


def test_a_model_of_one_variant_in_the_cache_of_downloads_is_named(refused, tiny_model, tmp_path):
    folder = tmp_path / "models--me--model"
    snapshot = shutil.copytree(tiny_model, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    break_model("fp16 only", snapshot)
    assert "--variant fp16" in refused(pretrained_model_name_or_path="me/model", cache_dir=tmp_path)


def test_a_single_file_is_refused_with_the_way_to_convert_it(refused, no_models, tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    message = refused(pretrained_model_name_or_path=tmp_path / "model.safetensors")
    assert "StableDiffusionPipeline.from_single_file" in message


def test_the_variant_that_is_there_is_trained(train, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    break_model("fp16 only", folder)
    expected = train("plain", max_train_steps=1, **QUICK)
    assert_same(
        lora(train(pretrained_model_name_or_path=folder, variant="fp16", max_train_steps=1, **QUICK)), lora(expected)
    )
    vae = shutil.copytree(folder / "vae", tmp_path / "vae")  # of another model
    output_dir = train("vae", pretrained_vae_model_name_or_path=vae, max_train_steps=1, **QUICK)
    assert_same(lora(output_dir), lora(expected))


def test_a_caption_of_megabytes_is_cut_before_it_is_tokenized(train, tmp_path):
    rows = [{**row, "caption": "word " * 400} for row in pair_rows(4)]
    short = train("short", train_data_dir=write_parquet(rows, tmp_path / "short data"), **QUICK)
    rows = [{**row, "caption": "word " * 2_000_000} for row in rows]
    tokenized = []
    original = CLIPTokenizer.__call__

    def tokenize(tokenizer, texts, **options):
        tokenized.extend(map(len, texts))
        return original(tokenizer, texts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTokenizer, "__call__", tokenize)
        long = train("long", train_data_dir=write_parquet(rows, tmp_path / "long data"), **QUICK)
    assert_same(lora(long), lora(short))
    assert 77 < max(tokenized) < 10_000


def test_escape_sequences_do_not_reach_the_terminal():
    assert one_line(ValueError("\x1b[31mred\x1b]0;title\x07\n\u202eoff\u200b end")) == "[31mred ]0;title off end"
