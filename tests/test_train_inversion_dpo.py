"""The SD script end to end: from pairs on disk to a LoRA, on a random pipeline of a few kilobytes."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import pair_rows, write_parquet
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import train_inversion_dpo
from inversion_utils import LORA_FILE, VisitBatches

ROOT = Path(train_inversion_dpo.__file__).parent


def lora(output_dir):
    return load_file(output_dir / LORA_FILE)


def assert_same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol)


def draw_picture(pipe, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a red circle", height=32, width=32, num_inference_steps=3, generator=generator, output_type="pt"
    ).images


def logged(output_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs" / "inversion-dpo")).Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo", "diffusion_dpo"])
def test_lora_loads_into_the_pipeline_and_changes_the_picture(train, tiny_model, objective):
    output_dir = train(objective=objective, learning_rate=1e-2)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    before = draw_picture(pipe)
    pipe.load_lora_weights(output_dir)
    after = draw_picture(pipe)
    pipe.unload_lora_weights()
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(draw_picture(pipe), before)


def test_base_weights_stay_bit_identical(train, tiny_model, monkeypatch):
    loaded = []

    def load_models(*args):
        tokenizers, text_encoders, vae, unet = original(*args)
        loaded.extend([*text_encoders, vae, unet])
        return tokenizers, text_encoders, vae, unet

    original = train_inversion_dpo.load_models
    monkeypatch.setattr(train_inversion_dpo, "load_models", load_models)
    train(learning_rate=1e-2)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    for trained, untouched in zip(loaded, (pipe.text_encoder, pipe.vae, pipe.unet), strict=True):
        weights = {key.replace(".base_layer", ""): value for key, value in trained.state_dict().items()}
        for key, value in untouched.state_dict().items():
            assert torch.equal(weights[key], value), key
    assert any("lora_B" in key and value.any() for key, value in loaded[2].state_dict().items())


@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo"])
@pytest.mark.parametrize("model", ["tiny_model", "tiny_v_model"])
def test_the_first_update_tells_winner_from_loser(train, tmp_path, request, objective, model):
    output_dir = train(
        pretrained_model_name_or_path=request.getfixturevalue(model),
        train_data_dir=write_parquet(pair_rows(1), tmp_path / "pair"),  # each visit has its own timesteps
        objective=objective, train_batch_size=16, learning_rate=3e-3, report_to="tensorboard",
    )  # fmt: skip
    before, after = logged(output_dir, "rewards/margins")
    assert abs(before) < 1e-3 and after > 0.01
    assert logged(output_dir, "rewards/accuracies")[1] > 0.9
    assert logged(output_dir, "loss")[1] < logged(output_dir, "loss")[0]


def count_calls(monkeypatch):
    """Returns a list to which every U-Net call appends (number of latents, whether it has a gradient)."""
    calls = []
    original = train_inversion_dpo.predict_noise

    def predict_noise(unet, x_t, *args):
        noise = original(unet, x_t, *args)
        calls.append((len(x_t), noise.requires_grad))
        return noise

    monkeypatch.setattr(train_inversion_dpo, "predict_noise", predict_noise)
    return calls


def test_inversion_dpo_and_inpo_differ_in_where_the_mean_stands(train):
    """At one timestep a pair they are the same; at more, inversion_dpo's mean stands inside the log-sigmoid."""
    options = {"max_train_steps": 3, "learning_rate": 1e-3}
    for num_targets in (1, 3):
        weights = [
            lora(train(f"{objective}_{num_targets}", objective=objective, timesteps_per_pair=num_targets, **options))
            for objective in ("inversion_dpo", "inpo")
        ]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]) == (num_targets == 1)


def test_unet_calls_of_an_update(train, monkeypatch):
    """n + 1 reference calls on 2B latents and one policy call on M 2B; the policy's alone has a gradient."""
    calls = count_calls(monkeypatch)
    train("a", max_train_steps=1)
    assert calls == [(4, False)] * 9 + [(16, True)]
    calls.clear()
    train("b", max_train_steps=1, objective="inpo", inversion_steps=3)
    assert calls == [(4, False)] * 4 + [(4, True)]
    calls.clear()
    train("c", max_train_steps=1, objective="inpo", inversion_steps=3, inversion_model="policy")
    assert calls == [(4, False)] * 4 + [(4, True)]  # 3 by the policy, 1 by the reference
    calls.clear()
    train("d", max_train_steps=1, objective="inpo", inversion_steps=3, inversion_guidance_scale=2.0)
    assert calls == [(8, False)] * 3 + [(4, False), (4, True)]
    calls.clear()
    train("e", max_train_steps=1, objective="diffusion_dpo", timesteps_per_pair=2)
    assert calls == [(8, False), (8, True)]


def test_who_inverts(train, monkeypatch):
    """The reference inverts with the LoRA off, the policy with it on."""
    enabled = []
    original = train_inversion_dpo.invert

    def invert(predict, *args, **options):
        layer = next(m for m in unets[-1].modules() if hasattr(m, "disable_adapters") and hasattr(m, "lora_A"))
        enabled.append(not layer.disable_adapters)
        return original(predict, *args, **options)

    unets = []
    add_lora = train_inversion_dpo.add_lora
    monkeypatch.setattr(
        train_inversion_dpo, "add_lora", lambda unet, *args: unets.append(unet) or add_lora(unet, *args)
    )
    monkeypatch.setattr(train_inversion_dpo, "invert", invert)
    train("a", max_train_steps=1)
    train("b", max_train_steps=1, inversion_model="policy")
    assert enabled == [False, True]


def test_the_gradient_at_the_start_is_not_zero(train):
    """Comparing policy and reference with each other, as Inversion-DPO's released code does, has no gradient here."""
    moved = lora(train(max_train_steps=1, learning_rate=1e-3))
    assert all(value.abs().max() > 1e-4 for key, value in moved.items() if "lora_B" in key or "lora.up" in key)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"use_8bit_adam": True},
        {"loss_type": "hinge"},
        {"loss_type": "ipo"},
        {"label_smoothing": 0.1},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"inversion_order": 1, "inversion_spacing": "uniform"},
        {"proportion_empty_prompts": 0.5, "random_crop": True, "random_flip": True, "dataloader_num_workers": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train(train, options):
    weights = lora(train(max_train_steps=2, **options))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert sum(value.abs().sum() for key, value in weights.items() if "lora_B" in key or "lora.up" in key) > 0


@pytest.mark.parametrize("option", ["gradient_checkpointing", "half_the_batch_twice"])
def test_same_weights_another_way(train, option):
    """Checkpointing and accumulation are ways to save memory, not another run."""
    plain = lora(train("plain", train_batch_size=4, max_train_steps=3))
    other = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    options = other if option == "half_the_batch_twice" else {"train_batch_size": 4, option: True}
    assert_same(lora(train("other", max_train_steps=3, **options)), plain, atol=2e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo"])
def test_chunks_of_the_trajectory_give_the_same_weights(train, objective, loss_type):
    options = {"objective": objective, "loss_type": loss_type, "timesteps_per_pair": 5, "max_train_steps": 3}
    whole = lora(train("whole", trajectory_chunk=5, **options))
    assert_same(lora(train("chunks", trajectory_chunk=2, **options)), whole, atol=2e-6)


def test_chunks_cost_one_more_forward_and_keep_one_graph(train, monkeypatch):
    calls = count_calls(monkeypatch)
    train(max_train_steps=1, timesteps_per_pair=5, trajectory_chunk=2)
    assert calls == [(4, False)] * 10 + [(8, False), (8, False), (4, False), (8, True), (8, True), (4, True)]


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 1, "gradient_accumulation_steps": 3}], ids=str)
def test_resuming_equals_never_stopping(train, options):
    options = {"random_flip": True, "objective": "inpo", "lr_scheduler": "linear", **options}
    whole = train("whole", max_train_steps=6, checkpointing_steps=3, **options)
    stopped = whole.with_name("stopped")
    stopped.mkdir()
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    resumed = train("stopped", max_train_steps=6, resume_from_checkpoint="latest", **options)
    assert_same(lora(resumed), lora(whole))
    assert not any(torch.equal(value, lora(whole / "checkpoint-3")[key]) for key, value in lora(whole).items())


def test_checkpoints_are_limited(train):
    output_dir = train(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(train, monkeypatch, number):
    """Stopped in the middle of the third update's first batch, and resumed, the run ends where it would have."""
    options = {"gradient_accumulation_steps": 2, "random_flip": True, "max_train_steps": 4, "objective": "inpo"}
    whole = lora(train("whole", **options))
    calls = []
    original = train_inversion_dpo.encode_images

    def encode_images(*args):
        calls.append(number)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(train_inversion_dpo, "encode_images", encode_images)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        train("stopped", **options)
    assert stop.value.code == 128 + number
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    resumed = train("stopped", resume_from_checkpoint="latest", **options)
    assert sorted(path.name for path in resumed.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert_same(lora(resumed), whole)


def spoil_losses(monkeypatch, at_steps):
    """Makes the loss NaN at these updates, counted from 0."""
    seen = itertools.count()
    original = train_inversion_dpo.preference_loss

    def preference_loss(policy_error, *args):
        loss, metrics = original(policy_error, *args)
        return (loss * float("nan") if next(seen) in at_steps else loss), metrics

    monkeypatch.setattr(train_inversion_dpo, "preference_loss", preference_loss)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(train, monkeypatch, request, precision):
    scalers = request.getfixturevalue("loss_scaling") if precision == "fp16" else []
    spoil_losses(monkeypatch, at_steps={0, 2})
    options = {"mixed_precision": precision, "checkpointing_steps": 1, "report_to": "tensorboard"}
    output_dir = train(max_train_steps=4, max_bad_steps=2, trajectory_chunk=3, **options)
    steps = {i: lora(output_dir / f"checkpoint-{i}") for i in range(1, 5)}
    assert not any(value.any() for key, value in steps[1].items() if "lora_B" in key)
    assert_same(steps[2], steps[3])
    for earlier, later in ((1, 2), (3, 4)):
        assert not any(
            torch.equal(steps[earlier][key], value) for key, value in steps[later].items() if "lora_B" in key
        )
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in steps[4].values())
    assert logged(output_dir, "bad_steps") == [1, 1, 2, 2]
    assert [scaler.get_scale() for scaler in scalers] == ([2.0**14] if precision == "fp16" else [])


def test_fp16_learns_what_fp32_learns(train, loss_scaling):
    """One update's margins, in half precision with loss scaling, are those of float32 within a tenth."""
    options = {"max_train_steps": 4, "train_batch_size": 8, "learning_rate": 1e-3, "report_to": "tensorboard"}
    half = logged(train("fp16", mixed_precision="fp16", **options), "rewards/margins")
    assert loss_scaling
    full = logged(train("fp32", mixed_precision="no", **options), "rewards/margins")
    assert full[-1] > 0.1
    assert half[-1] == pytest.approx(full[-1], rel=0.1)


def test_too_many_bad_updates_in_a_row_end_the_run_and_keep_the_checkpoint(train, monkeypatch, tmp_path):
    spoil_losses(monkeypatch, at_steps={2, 3, 4})
    with pytest.raises(RuntimeError, match="not finite for 3 updates in a row"):
        train(max_train_steps=9, max_bad_steps=3, checkpointing_steps=2)
    assert all(value.isfinite().all() for value in lora(tmp_path / "run" / "checkpoint-2").values())


def test_a_policy_that_does_not_move_is_an_error(train, monkeypatch, tmp_path):
    """Comparing policy and reference with each other, as Inversion-DPO's released code does, never starts to learn."""

    def released_loss(policy_error, reference_error, *args):
        return original(policy_error * 0 + reference_error, reference_error, *args)

    original = train_inversion_dpo.preference_loss
    monkeypatch.setattr(train_inversion_dpo, "preference_loss", released_loss)
    with pytest.raises(RuntimeError, match="after 10 updates the LoRA is still zero"):
        train(max_train_steps=12, objective="inpo", inversion_steps=1)


def test_seeds_differ_and_repeat(train):
    first, again, other = (lora(train(str(i), seed=seed, max_train_steps=1)) for i, seed in enumerate((0, 0, 1)))
    assert_same(first, again)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_max_grad_norm_bites(train):
    """With an epsilon far above the gradient Adam's step is proportional to it, so clipping shortens the step."""
    options = {"max_train_steps": 1, "adam_epsilon": 1e4, "learning_rate": 1e4, "report_to": "tensorboard"}
    free_dir = train("free", max_grad_norm=1e9, adam_weight_decay=0, **options)
    norm = logged(free_dir, "grad_norm")[0]
    clipped = lora(train("clipped", max_grad_norm=norm / 10, adam_weight_decay=0, **options))
    free = lora(free_dir)
    up = [key for key in free if "lora_B" in key or "lora.up" in key]
    for key in up:
        torch.testing.assert_close(clipped[key], free[key] / 10, rtol=1e-2, atol=1e-7)


def test_logged_metrics(train):
    output_dir = train(max_train_steps=3, report_to="tensorboard", lr_scheduler="linear", learning_rate=3e-4)
    for tag in ("loss", "rewards/chosen", "rewards/rejected", "policy_error", "reference_error", "grad_norm"):
        values = logged(output_dir, tag)
        assert len(values) == 3 and all(abs(value) < 1e3 for value in values), tag
    assert logged(output_dir, "lr") == pytest.approx([3e-4, 2e-4, 1e-4])
    assert logged(output_dir, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    chosen, rejected = logged(output_dir, "rewards/chosen"), logged(output_dir, "rewards/rejected")
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert logged(output_dir, "rewards/margins") == pytest.approx(margins, abs=1e-5)


@pytest.fixture
def timesteps_seen(monkeypatch):
    """The timesteps (M, 2B) of every batch that is inverted."""
    seen = []
    original = train_inversion_dpo.invert

    def invert(predict, latents, timesteps, *args, **options):
        seen.append(timesteps)
        return original(predict, latents, timesteps, *args, **options)

    monkeypatch.setattr(train_inversion_dpo, "invert", invert)
    return seen


def test_zero_terminal_snr_is_never_trained_at_its_last_timestep(train, tiny_v_model, timesteps_seen):
    model = {"pretrained_model_name_or_path": tiny_v_model}
    train("band", min_timestep=998, train_batch_size=8, objective="inpo", max_train_steps=1, **model)
    assert set(torch.cat(timesteps_seen).flatten().tolist()) == {998}


def test_winner_and_loser_share_timesteps_and_pairs_do_not(train, timesteps_seen):
    train(max_train_steps=1, train_batch_size=4, min_timestep=200, max_timestep=599)
    winners, losers = timesteps_seen[0].chunk(2, dim=1)
    assert winners.shape == (4, 4) and torch.equal(winners, losers)
    assert len(set(winners[0].tolist())) > 1
    for m in range(4):  # one in each quarter of the band
        assert ((200 + 100 * m <= winners[m]) & (winners[m] < 300 + 100 * m)).all()


def test_broken_rows_are_replaced_counted_and_named(train, tmp_path, caplog):
    rows = pair_rows(6)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:50]
    rows[4]["caption"] = None
    rows[5]["label_0"] = 0.5
    data = write_parquet(rows, tmp_path / "broken")
    output_dir = train(train_data_dir=data, train_batch_size=4, max_train_steps=2, max_bad_fraction=0.3)
    assert (output_dir / LORA_FILE).exists()
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("row 2 is skipped" in line and "unreadable image" in line for line in warnings) == 1
    assert any("4 pairs, 1 ties left out, 1 rows skipped for no caption" in line for line in warnings)
    assert any("1 rows were skipped for unreadable image" in line for line in warnings)


def test_an_output_dir_in_use_is_refused_and_kept(train, refused, no_models, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LORA_FILE).write_bytes(b"precious")
    assert "--output_dir" in refused() and (folder / LORA_FILE).read_bytes() == b"precious"


def test_a_resumed_run_must_be_the_same_run(train, refused, monkeypatch):
    train(max_train_steps=1, checkpointing_steps=1)
    message = refused(max_train_steps=2, rank=8, resume_from_checkpoint="latest")
    assert "--rank is 8" in message and "was made with 4" in message
    assert "--seed is 1" in refused(max_train_steps=2, seed=1, resume_from_checkpoint="latest")


def test_a_finished_lora_without_a_checkpoint_is_kept(train, refused):
    output_dir = train(max_train_steps=1)
    before = lora(output_dir)
    shutil.rmtree(output_dir / "checkpoint-1")
    assert "--output_dir" in refused(resume_from_checkpoint="latest", max_train_steps=2)
    assert_same(before, lora(output_dir))


def test_epochs_are_counted_in_visits_also_after_the_batch_changed(train):
    train(num_train_epochs=2, max_train_steps=None, train_batch_size=2, checkpointing_steps=8)  # 16 visits
    options = {"max_train_steps": None, "resume_from_checkpoint": "latest", "train_batch_size": 4}
    output_dir = train(num_train_epochs=3, **options)
    assert (output_dir / "checkpoint-10").exists()  # 8 updates of 2 pairs, 2 of 4


def test_resuming_with_another_batch_goes_on_at_the_next_visit(train, monkeypatch):
    """The visit is in the checkpoint, so another geometry neither skips nor repeats a pair."""
    visits = []
    original = train_inversion_dpo.collate

    def collate(examples, *args, **options):
        visits.append([example["visit"] for example in examples])
        return original(examples, *args, **options)

    monkeypatch.setattr(train_inversion_dpo, "collate", collate)
    train(max_train_steps=3, checkpointing_steps=3, train_batch_size=2)
    geometry = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(max_train_steps=5, checkpointing_steps=5, resume_from_checkpoint="latest", **geometry)
    assert sum(visits, []) == list(range(6 + 2 * 8))


def test_args_are_not_changed(train, monkeypatch):
    seen = []
    original = train_inversion_dpo.parse_args

    def parse_args(argv):
        args, error = original(argv)
        seen.extend([args, dict(vars(args))])
        return args, error

    monkeypatch.setattr(train_inversion_dpo, "parse_args", parse_args)
    train(max_train_steps=1)
    assert vars(seen[0]) == seen[1]


def test_copied_alone_into_an_empty_folder_it_trains(tiny_model, pairs_dir, tmp_path):
    """Two files are enough, and what is left behind is what DESIGN promises."""
    for name in ("train_inversion_dpo.py", "inversion_utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    digest = {path: hashlib.sha256(path.read_bytes()).digest() for path in tiny_model.rglob("*") if path.is_file()}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train_inversion_dpo.py",
        "--pretrained_model_name_or_path", tiny_model, "--train_data_dir", pairs_dir, "--output_dir", "out",
        "--resolution", "32", "--max_train_steps", "2", "--rank", "4",
    ]  # fmt: skip
    environment = {key: value for key, value in ONE_THREAD.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "acc=" in done.stderr and "margin=" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["README.md", "checkpoint-2", "logs", LORA_FILE, "report.png", "training_config.json"]
    )
    assert all(hashlib.sha256(path.read_bytes()).digest() == value for path, value in digest.items())


def launch(output_dir, tiny_model, pairs_dir, *options, processes=1):
    """The command line that runs the script in a group of processes."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return [
        sys.executable, *launcher, ROOT / "train_inversion_dpo.py", "--pretrained_model_name_or_path", tiny_model,
        "--train_data_dir", pairs_dir, "--output_dir", output_dir, "--resolution", "32", "--rank", "4",
        "--train_batch_size", "2", *options,
    ]  # fmt: skip


ONE_THREAD = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def test_two_processes_equal_one_and_resume_exactly(train, tiny_model, pairs_dir, tmp_path):
    """Two CPU processes (gloo) with chunks and accumulation: the steps of one process, the same bits after a stop."""
    method = {"trajectory_chunk": 3, "gradient_accumulation_steps": 2, "max_train_steps": 4, "max_train_samples": 7}
    method["report_to"] = "tensorboard"
    one = train("one", train_batch_size=4, **method)
    options = [word for name, value in method.items() for word in (f"--{name}", str(value))]
    command = launch(tmp_path / "two", tiny_model, pairs_dir, *options, "--checkpointing_steps", "2", processes=2)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "updates of 8 pairs" in done.stderr
    assert_same(lora(tmp_path / "two"), lora(one), atol=2e-6)
    for tag in ("loss", "rewards/margins", "policy_error", "grad_norm"):  # means over the processes
        assert logged(tmp_path / "two", tag) == pytest.approx(logged(one, tag), rel=1e-4, abs=1e-4), tag

    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resume = launch(
        tmp_path / "stopped", tiny_model, pairs_dir, *options, "--resume_from_checkpoint", "latest", processes=2
    )
    done = subprocess.run(resume, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(lora(tmp_path / "stopped"), lora(tmp_path / "two"))


def test_a_signal_to_the_whole_group_spares_the_workers(tiny_model, pairs_dir, tmp_path):
    """As schedulers and launchers send it: data workers get it too, and must not die before the update is done."""
    options = [
        "--report_to",
        "none",
        "--max_train_steps",
        "1000",
        "--dataloader_num_workers",
        "2",
        "--gradient_accumulation_steps",
        "4",
    ]
    command = launch(tmp_path / "run", tiny_model, pairs_dir, *options)
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)
    seen = ""
    while "acc=" not in seen:
        assert (character := process.stderr.read(1)), seen
        seen += character
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, rest[-3000:]
    assert "SIGTERM: stopping after this update" in rest and "--resume_from_checkpoint latest" in rest
    assert len(list((tmp_path / "run").glob("checkpoint-*/training_state.json"))) == 1
    assert not (tmp_path / "run" / LORA_FILE).exists()


def test_training_at_a_subset_of_timesteps(train, timesteps_seen, monkeypatch):
    """As a distilled model is sampled: no other timestep is a target."""
    subset = [999, 249, 749, 499]
    train("one", timesteps_subset=subset, objective="inpo", train_batch_size=8, max_train_steps=2)
    assert set(torch.cat(timesteps_seen).flatten().tolist()) == set(subset)
    timesteps_seen.clear()
    calls = count_calls(monkeypatch)
    train("all", timesteps_subset=subset, max_train_steps=1)
    assert all(column.tolist() == sorted(subset) for column in timesteps_seen[0].T)
    assert calls == [(4, False)] * 5 + [(16, True)]  # at t = 0 and the four of the subset, then the policy's


@pytest.mark.parametrize(
    ("targets", "count"), [(["to_q", "to_v"], 2), ([r".*up_blocks.*\.(to_q|to_k|conv1)"], 3), (["ff.net.2"], 1)]
)
def test_lora_target_modules_by_name_and_by_pattern(train, targets, count):
    weights = lora(train(lora_target_modules=targets, max_train_steps=1))
    kinds = {re.search(r"(to_\w|conv1|ff\.net\.2)\.lora", key)[1] for key in weights}
    assert len(kinds) == count
    if "up_blocks" in targets[0]:
        assert all("up_blocks" in key for key in weights)


@pytest.fixture
def spoilt_latents(script, monkeypatch):
    """Makes latents infinite: a dict of batch number, from 0, to the samples to spoil."""
    spoil, original, calls = {}, script.encode_images, itertools.count()

    def encode_images(*args):
        latents = original(*args)
        latents[spoil.get(next(calls), [])] = float("inf")
        return latents

    monkeypatch.setattr(script, "encode_images", encode_images)
    return spoil


def test_a_latent_that_is_not_finite_is_named_and_not_trained_on(train, spoilt_latents, tmp_path, caplog):
    """Whatever else the pair says: with another caption the weights are the same."""
    batches = itertools.islice(VisitBatches(8, 2, 0), 2)
    row = list(batches)[1][1][1]  # of the second pair of the second batch
    rows, weights = pair_rows(8), {}
    for name in ("as it was", "another caption"):
        rows[row]["caption"] = "a heart" if name == "another caption" else rows[row]["caption"]
        spoilt_latents.update({1: [1], 4: [1]})  # its winner, in either run
        data = write_parquet(rows, tmp_path / f"{name} data")
        output_dir = train(name, train_data_dir=data, max_train_steps=3, train_batch_size=2, checkpointing_steps=1)
        weights[name] = [lora(output_dir / f"checkpoint-{step}") for step in (1, 2, 3)]
        record = json.loads((output_dir / "training_config.json").read_text())
        assert (
            record["data"]["rows skipped while training for latents not finite"] == 1
            and record["metrics"]["bad_steps"] == 0
        )
    names = [record.getMessage() for record in caplog.records if "latents not finite:" in record.getMessage()]
    assert names == [f"[RANK 0] row {row} is skipped: latents not finite: the VAE overflows"] * 2
    first, second, third = weights["as it was"]
    for step in range(3):
        assert_same(weights["as it was"][step], weights["another caption"][step])
    assert not any(torch.equal(first[key], second[key]) or torch.equal(second[key], third[key]) for key in first)


def test_a_vae_that_always_overflows_ends_the_run(train, spoilt_latents, tmp_path):
    spoilt_latents.update({batch: [0, 1] for batch in range(2, 9)})
    with pytest.raises(RuntimeError, match="no latents were finite for 3 updates in a row.*pretrained_vae"):
        train(max_train_steps=9, max_bad_steps=3, checkpointing_steps=1)
    saved = [lora(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 3, 4)]
    assert_same(saved[0], saved[1])
    assert_same(saved[0], saved[2])


def test_long_captions_are_cut_counted_and_named(train, tmp_path, caplog):
    rows = pair_rows(4)
    rows[1]["caption"] = "a heart " * 9
    train(train_data_dir=write_parquet(rows, tmp_path / "long"), max_train_steps=4)
    output_dir = tmp_path / "run"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "[RANK 0] row 1 has its caption cut: 56 tokens, of which 16 are read",
        "[RANK 0] 1 captions were longer than what is read",
    ]
    assert json.loads((output_dir / "training_config.json").read_text())["data"]["captions cut"] == 1
    assert "captions cut 1" in (output_dir / "README.md").read_text()
