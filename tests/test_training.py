"""What a run can be trusted with: its LoRA, its checkpoints, its folder, and the signals that stop it."""

import itertools
import json
import multiprocessing
import os
import signal
from functools import partial

import pytest
import soak
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.other import load as accelerate_load
from conftest import assert_same, build_pipeline, logged, lora

import train_inversion_dpo
import training_utils
from inversion_utils import backward_in_chunks, preference_loss
from training_utils import (
    LORA_FILE,
    METRICS_FILE,
    STATE_FILE,
    StopSignal,
    add_lora,
    add_metrics,
    check_output_dir,
    checksum,
    cut_metrics,
    encode_images,
    find_checkpoint,
    lora_weights,
    read_metrics,
    reference_policy,
    write_lora,
)

QUICK = {"objective": "inpo", "inversion_steps": 1, "learning_rate": 1e-3}
LATEST = {"resume_from_checkpoint": "latest"}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunks_give_the_gradient_of_one_pass(loss_type, inside, size):
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x, reference = torch.randn(7, 4, 6, dtype=torch.float64), torch.rand(7, 4, dtype=torch.float64)

    def errors(rows):
        return (x[rows] @ weight).square()

    def loss_of(policy_error):
        pair = (policy_error.mean(0), reference.mean(0)) if inside else (policy_error, reference)
        return preference_loss(*pair, 2.0, loss_type)[0].mean()

    loss_of(errors(slice(None))).backward()
    expected, weight.grad = weight.grad, None
    chunks = [lambda i=i: errors(slice(i, i + size)) for i in range(0, 7, size)]
    backward_in_chunks(chunks, loss_of, lambda loss: loss.backward())
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().max() > 1e-3


# The LoRA


def test_a_saved_lora_is_the_policy_when_a_pipeline_loads_it(tmp_path):
    unet, pipe = build_pipeline().unet, build_pipeline()
    for parameter in add_lora(unet, rank=4):
        torch.nn.init.normal_(parameter)
    write_lora(tmp_path / LORA_FILE, lora_weights(unet), "unet")
    pipe.load_lora_weights(tmp_path)
    x, t, text = torch.randn(1, 4, 4, 4), torch.tensor([10]), torch.randn(1, 16, 16)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t, text).sample, unet(x, t, text).sample)
    half = build_pipeline().unet.to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in add_lora(half, 4))


def test_the_reference_is_the_base_even_after_an_error():
    unet = build_pipeline().unet
    x, t, text = torch.randn(1, 4, 4, 4), torch.tensor([10]), torch.randn(1, 16, 16)
    with torch.no_grad():
        base = unet(x, t, text).sample
        for parameter in add_lora(unet, 4):
            torch.nn.init.normal_(parameter)
        policy = unet(x, t, text).sample
        with pytest.raises(KeyError), reference_policy(unet):
            assert torch.equal(unet(x, t, text).sample, base)
            raise KeyError
        assert torch.equal(unet(x, t, text).sample, policy) and not torch.allclose(policy, base)
    assert all(p.requires_grad for name, p in unet.named_parameters() if "lora_" in name)


def test_latents_are_the_scaled_mode_in_float32():
    vae = build_pipeline().vae.to(torch.bfloat16)
    vae.register_to_config(scaling_factor=0.5)
    pixels = torch.rand(5, 3, 32, 32) * 2 - 1
    latents = encode_images(vae, pixels, batch_size=2)
    mode = vae.encode(pixels.bfloat16()).latent_dist.mode().float()
    assert latents.dtype == torch.float32 and latents.shape == (5, 4, 4, 4)
    torch.testing.assert_close(latents, mode * 0.5, rtol=0.05, atol=0.01)


# Checkpoints


def test_a_checkpoint_is_there_whole_or_not_at_all_and_a_resumed_run_is_the_same(train, tmp_path, monkeypatch):
    """To the bit, with a schedule and data workers; the metrics are one line a step, as of a run without a break."""
    options = {**QUICK, "max_train_steps": 5, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "random_flip": True}
    options |= {"checkpointing_steps": 1, "dataloader_num_workers": 1}
    whole = train("whole", **options)
    save_state, folder = Accelerator.save_state, tmp_path / "broken"

    def save(self, output_dir, *args):
        save_state(self, output_dir, *args)
        if output_dir.name.endswith("-4"):
            raise OSError("killed here")

    monkeypatch.setattr(Accelerator, "save_state", save)
    with pytest.raises(RuntimeError, match="killed here"):
        train("broken", **options)
    monkeypatch.setattr(Accelerator, "save_state", save_state)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    assert len((folder / METRICS_FILE).read_text().splitlines()) == 4
    with (folder / METRICS_FILE).open("a") as stream:
        stream.write('{"step": 5, "lo')  # as if killed while writing
    train("broken", **{**options, **LATEST, "checkpointing_steps": 5})
    assert_same(lora(folder), lora(whole))
    assert (folder / METRICS_FILE).read_text() == (whole / METRICS_FILE).read_text()
    names = {path.name for path in folder.iterdir() if "checkpoint" in path.name}
    assert names == {f"checkpoint-{i}" for i in (1, 2, 3, 5)}


def test_a_checkpoint_holds_no_code_and_the_oldest_go(train):
    """What accelerate reads of it, it reads without running what a pickle says."""
    output_dir = train(**QUICK, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=2, **LATEST)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    names = {path.name for path in (output_dir / "checkpoint-3").iterdir()}
    assert names == {LORA_FILE, STATE_FILE, "optimizer.bin", "random_states_0.pkl"}
    for name in ("optimizer.bin", "random_states_0.pkl"):
        assert accelerate_load(output_dir / "checkpoint-3" / name, weights_only=True)


def test_other_options_of_a_resumed_run_are_named_and_count(train, caplog):
    train(**QUICK, max_train_steps=2, checkpointing_steps=2)
    caplog.clear()
    changes = {"learning_rate": 5e-4, "beta_dpo": 500.0, "adam_weight_decay": 0.5, "train_batch_size": 4}
    output_dir = train(**{**QUICK, **changes}, max_train_steps=3, **LATEST)
    (line,) = [record.getMessage() for record in caplog.records if "--learning_rate" in record.getMessage()]
    assert all(f"--{name}" in line for name in changes) and "--rank" not in line and "--resume" not in line
    assert logged(output_dir, "lr") == [1e-3, 1e-3, 5e-4] and logged(output_dir, "step") == [1, 2, 3]
    state = json.loads((output_dir / "checkpoint-3" / STATE_FILE).read_text())
    assert state["progress"]["visit"] == 2 * 2 + 4  # no pair is skipped or seen twice
    optimizer = torch.load(output_dir / "checkpoint-3" / "optimizer.bin", weights_only=True)
    assert optimizer["param_groups"][0]["weight_decay"] == 0.5


@pytest.fixture
def run_dir(tmp_path):
    """Folder of a run with checkpoints 9 and 10, an unfinished one, and one that is none."""
    for name in ("checkpoint-9", "checkpoint-10", "partial-checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
        progress = {
            "options": {"rank": 4},
            "num_pairs": 8,
            "lora_init": None,
            "step": 10,
            "visit": 40,
            "good_steps": 9,
        }
        for empty in (LORA_FILE, "optimizer.bin"):
            (tmp_path / name / empty).touch()
        checksums = {file.name: checksum(file) for file in (tmp_path / name).iterdir()}
        checksums[STATE_FILE] = checksum(json.dumps(progress).encode())
        (tmp_path / name / STATE_FILE).write_text(json.dumps({"progress": progress, "checksums": checksums}))
    return tmp_path


def test_checkpoints_are_found_by_step_not_by_name(run_dir, monkeypatch):
    find, notes = partial(find_checkpoint, note=pytest.fail), []
    newest = folder, progress = find(run_dir, "latest")
    assert folder == run_dir / "checkpoint-10" and (progress.visit, progress.options) == (40, {"rank": 4})
    assert find(run_dir, "checkpoint-10") == newest
    assert find("elsewhere", str(run_dir / "checkpoint-10")) == newest
    assert find("elsewhere", str(run_dir / "checkpoint-9"))[0] == run_dir / "checkpoint-9"
    assert find(run_dir, None) == find_checkpoint(run_dir / "empty", "latest", notes.append) == (None, None)
    assert "step 0" in notes[0]  # a mistyped --output_dir would otherwise start a run again silently
    (run_dir / "other" / "checkpoint-10").mkdir(parents=True)
    (run_dir / "other" / "checkpoint-10" / STATE_FILE).write_text("{}")
    monkeypatch.chdir(run_dir / "other")
    assert find(run_dir, "checkpoint-10") == newest  # the name is looked up in the output_dir first
    (run_dir / "checkpoint-7").mkdir()  # without checksums
    (run_dir / "checkpoint-7" / STATE_FILE).write_text("{}")
    for name in ("checkpoint-11", str(run_dir), "checkpoint-9", "checkpoint-7"):  # 10 is newer than 9
        with pytest.raises(ValueError, match="--resume_from_checkpoint"):
            find_checkpoint(run_dir, name, notes.append)


def test_metrics_survive_what_is_not_finite_and_a_line_cut_short(tmp_path):
    file = tmp_path / METRICS_FILE
    assert read_metrics(file) == []
    for step, value in ((1, 0.5), (2, float("nan")), (3, float("inf"))):
        add_metrics(file, {"step": step, "loss": value})
    assert all(json.loads(line) for line in file.read_text().splitlines()) and "NaN" not in file.read_text()
    with file.open("a") as stream:
        stream.write('{"step": 4')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]
    cut_metrics(file, 2, pytest.fail)
    rows = read_metrics(file)
    assert rows[0] == {"step": 1, "loss": 0.5} and rows[1]["step"] == 2 and rows[1]["loss"] != rows[1]["loss"]
    assert len(rows) == 2


# Folders


def test_a_folder_that_holds_only_pictures_of_another_run_is_refused_and_kept(refused, no_models, tmp_path):
    (tmp_path / "run" / "validation").mkdir(parents=True)
    assert "--output_dir" in refused()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"validation"}


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_latest(train, refused, monkeypatch):
    """Such as a job that a scheduler repeats."""

    def kill(*_):
        raise OSError("killed")

    monkeypatch.setattr(training_utils, "save_checkpoint", kill)
    with pytest.raises(OSError, match="killed"):
        train()
    monkeypatch.undo()
    message = refused()
    assert "--output_dir" in message and "metrics.jsonl" in message
    output_dir = train(**LATEST)
    assert [row["step"] for row in read_metrics(output_dir / "metrics.jsonl")] == [1, 2]


def test_a_folder_with_checkpoints_is_kept_for_the_run_that_continues_it(run_dir):
    checkpoint, _ = find_checkpoint(run_dir, "latest", pytest.fail)
    check_output_dir(run_dir, checkpoint, "latest")
    check_output_dir(run_dir / "new" / "deep", None, None)
    assert not (run_dir / "new").exists()
    with pytest.raises(ValueError, match="--output_dir .*--resume_from_checkpoint latest"):
        check_output_dir(run_dir, None, None)
    (run_dir / "new").mkdir()
    (run_dir / "new" / LORA_FILE).touch()
    (run_dir / "file").touch()
    for other in ("new", "file"):
        with pytest.raises(ValueError, match="--output_dir"):
            check_output_dir(run_dir / other, checkpoint, None)


def test_the_soak_knows_in_which_phase_it_kills(tmp_path):
    log = "INFO Pairs: 8"
    (tmp_path / METRICS_FILE).write_text('{"step": 20}\n')
    assert soak.phase_of(log, tmp_path, 0) == "training"
    (tmp_path / "checkpoint-20").mkdir()
    assert soak.phase_of(log, tmp_path, 0) == "sampling"
    assert soak.phase_of(f"Resuming from checkpoint-20\n{log}", tmp_path, 0) == "training"
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step-000020-prompt-0.png").touch()
    assert soak.phase_of(log, tmp_path, 0) == "training"
    (tmp_path / "partial-checkpoint-22").mkdir()
    assert soak.phase_of(log, tmp_path, 0) == "saving"
    os.utime(tmp_path / "partial-checkpoint-22", (1, 1))  # of an earlier kill
    assert soak.phase_of(log, tmp_path, 2) == "training"


# Signals


@pytest.mark.parametrize("number", StopSignal.NUMBERS, ids=lambda number: number.name)
def test_the_first_signal_is_remembered_and_the_second_one_acts_as_before(number):
    lines, ends = [], []
    previous = signal.signal(number, lambda *args: ends.append(args))
    try:
        stop = StopSignal(lines.append)
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number and number.name in lines[0] and not ends
        os.kill(os.getpid(), number)
        assert len(ends) == 1 and len(lines) == 1
    finally:
        signal.signal(number, previous)


def test_under_nohup_a_closed_terminal_ends_nothing():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(pytest.fail)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == 0
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


# Errors in the loop


def failing(call, at):
    """Returns a call that fails the `at`-th time, before it does anything."""
    count = itertools.count(1)

    def fails(*args, **options):
        if next(count) == at:
            raise RuntimeError("out of memory, say")
        return call(*args, **options)

    return fails


@pytest.mark.parametrize("where", ["backward", "log"])
def test_an_error_between_steps_costs_no_step(train, tmp_path, monkeypatch, caplog, where):
    """What was trained is saved, the log says so, and the run that goes on from there is the whole one."""
    options = {**QUICK, "max_train_steps": 4, "random_flip": True, "lr_scheduler": "linear"}
    options["dataloader_num_workers"] = 1
    whole = lora(train("whole", **options))
    monkeypatch.setattr(Accelerator, where, failing(getattr(Accelerator, where), 3))
    with pytest.raises(RuntimeError, match="out of memory"):
        train("broken", **options)
    monkeypatch.undo()
    step = {"backward": 2, "log": 3}[where]
    assert [folder.name for folder in (tmp_path / "broken").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert any(f"go on from checkpoint-{step}" in record.getMessage() for record in caplog.records)
    assert_same(lora(train("broken", **options, **LATEST)), whole)


def test_an_error_within_a_step_names_the_last_checkpoint(train, tmp_path, monkeypatch, caplog):
    """Half a step may be in the weights then, and they are not saved."""
    monkeypatch.setattr(AcceleratedOptimizer, "step", failing(AcceleratedOptimizer.step, 4))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(**QUICK, max_train_steps=5, checkpointing_steps=2)
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert any("go on from checkpoint-2" in record.getMessage() for record in caplog.records)


def test_a_killed_worker_costs_no_step(train, tmp_path, monkeypatch, caplog):
    options = {**QUICK, "max_train_steps": 4, "dataloader_num_workers": 1}
    whole = lora(train("whole", **options))
    add_metrics = training_utils.add_metrics

    def kill(file, *rows, **rest):
        add_metrics(file, *rows, **rest)
        if [row.get("step") for row in rows] == [2]:
            for process in multiprocessing.active_children():
                process.kill()

    monkeypatch.setattr(training_utils, "add_metrics", kill)
    with pytest.raises((RuntimeError, ConnectionError)):
        train("broken", **options)
    monkeypatch.undo()
    assert any("go on from checkpoint-" in record.getMessage() for record in caplog.records)
    assert_same(lora(train("broken", **options, **LATEST)), whole)


def test_a_run_without_one_good_step_fails(train, tmp_path, monkeypatch):
    preference_loss = train_inversion_dpo.preference_loss

    def spoilt(*args):
        loss, metrics = preference_loss(*args)
        return loss * float("nan"), metrics

    monkeypatch.setattr(train_inversion_dpo, "preference_loss", spoilt)
    with pytest.raises(RuntimeError, match="2 bad steps in a row"):
        train(**QUICK, max_train_steps=2)
    assert not (tmp_path / "run" / LORA_FILE).exists() and not list((tmp_path / "run").glob("checkpoint-*"))
