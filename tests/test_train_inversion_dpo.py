"""The SD script end to end: from pairs on disk to a LoRA, on a random pipeline of a few kilobytes."""

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT, assert_same, command_line, logged, lora, pair_rows, write_parquet
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image

import training_utils
from training_utils import LORA_FILE

QUICK = {"objective": "inpo", "inversion_steps": 1, "train_batch_size": 1}
# Adam's step is then the gradient, so that a gradient twice as large shows, and rounding is not blown up.
LINEAR = {"adam_epsilon": 0.1, "learning_rate": 1e-2, "max_grad_norm": 1e9}


def sample(pipe, prompt="a red circle"):
    """Pixels (3, 32, 32) of a sample."""
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0]


def lora_b(weights):
    """The half of a LoRA's weights that is zero until the first step."""
    return {key: value for key, value in weights.items() if "lora_B" in key or "lora.up" in key}


def record_unet_calls(monkeypatch):
    """Returns a list to which each call of a U-Net appends a dict."""
    calls, forward = [], UNet2DConditionModel.forward

    def recorded(unet, x_t, timesteps, encoder_hidden_states, **options):
        layer = next(module for module in unet.modules() if hasattr(module, "lora_A"))
        state = {"lora": not layer.disable_adapters, "checkpointing": unet.is_gradient_checkpointing}
        seen = {"timesteps": timesteps, "text": encoder_hidden_states, **options.get("added_cond_kwargs", {})}
        calls.append({"size": len(x_t), "gradient": torch.is_grad_enabled(), **state, **seen})
        return forward(unet, x_t, timesteps, encoder_hidden_states, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", recorded)
    return calls


@pytest.fixture
def unet_calls(monkeypatch):
    return record_unet_calls(monkeypatch)


def trained_at(calls):
    """The timesteps of each call of the policy with a gradient."""
    return [call["timesteps"] for call in calls if call["gradient"]]


@pytest.mark.parametrize("model", ["tiny_model", "tiny_v_model"])
@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo", "diffusion_dpo"])
def test_the_lora_loads_in_the_pipeline_and_changes_the_picture(train, request, objective, model):
    model = request.getfixturevalue(model)
    output_dir = train(pretrained_model_name_or_path=model, objective=objective, learning_rate=1e-2)
    pipe = DiffusionPipeline.from_pretrained(model)
    before = sample(pipe)
    pipe.load_lora_weights(output_dir)
    assert (sample(pipe) - before).abs().max() > 1e-3
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), before, rtol=0, atol=1e-5)


def preference(model, output_dir, row):
    """How much more a LoRA lowers the error of random noise on a row's winner than on its loser, by diffusers."""
    pipe = DiffusionPipeline.from_pretrained(model)
    images = [Image.open(io.BytesIO(row[name])) for name in ("jpg_0", "jpg_1")]
    images = images if row["label_0"] == 1 else images[::-1]
    pixels = torch.cat([pipe.image_processor.preprocess(image.resize((32, 32))) for image in images])
    t, generator = torch.arange(25, 1000, 50).repeat(2), torch.Generator().manual_seed(1)
    noise = torch.randn(20, 4, 4, 4, generator=generator).repeat(2, 1, 1, 1)
    ids = pipe.tokenizer(row["caption"], padding="max_length", return_tensors="pt").input_ids
    errors = []
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode().repeat_interleave(20, 0)
        x_t, text = pipe.scheduler.add_noise(latents, noise, t), pipe.text_encoder(ids)[0].expand(40, -1, -1)
        is_v = pipe.scheduler.config.prediction_type == "v_prediction"
        target = pipe.scheduler.get_velocity(latents, noise, t) if is_v else noise
        for _ in ("base", "with LoRA"):
            errors.append((pipe.unet(x_t, t, text).sample - target).square().mean((1, 2, 3)).view(2, 20).mean(1))
            pipe.load_lora_weights(output_dir)
    winner, loser = errors[0] - errors[1]
    return (winner - loser).item()


@pytest.mark.parametrize("objective", ["inversion_dpo", "inpo", "diffusion_dpo"])
@pytest.mark.parametrize("model", ["tiny_model", "tiny_v_model"])
def test_the_first_step_tells_winner_from_loser(train, tmp_path, request, objective, model):
    rows, model = pair_rows(1), request.getfixturevalue(model)
    output_dir = train(
        pretrained_model_name_or_path=model, objective=objective, train_batch_size=16, learning_rate=3e-3,
        train_data_dir=write_parquet(rows, tmp_path / "pair"), max_train_steps=1,
    )  # fmt: skip
    assert logged(output_dir, "rewards/margins") == pytest.approx([0], abs=1e-3)
    assert preference(model, output_dir, rows[0]) > 2e-5


def test_base_weights_stay_bit_identical(train, script, tiny_model, monkeypatch):
    loaded = []
    for name in ("load_encoders", "load_denoiser"):
        load = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args, load=load: loaded.append(load(*args)) or loaded[-1])
    weights = lora(train(learning_rate=1e-2))
    (text_encoders, vae), unet = loaded
    pipe = DiffusionPipeline.from_pretrained(tiny_model)
    for trained, untouched in ((text_encoders[0], pipe.text_encoder), (vae, pipe.vae), (unet, pipe.unet)):
        state_dict = {key.replace(".base_layer", ""): value for key, value in trained.state_dict().items()}
        for key, value in untouched.state_dict().items():
            assert torch.equal(state_dict[key], value), key
    assert all(value.any() for value in lora_b(weights).values())


def test_unet_calls_of_a_step(train, unet_calls):
    """By default n + 1 calls of the reference on 2B latents, and one of the policy on M 2B, the only one in reverse.

    So many calls are what a run costs.
    """

    def calls(name, **options):
        unet_calls.clear()
        train(name, max_train_steps=1, **options)
        return [(call["size"], call["lora"], call["gradient"]) for call in unet_calls]

    assert calls("default") == [(4, False, False)] * 9 + [(16, True, True)]
    inpo = {"objective": "inpo", "inversion_steps": 3}
    assert calls("inpo", **inpo, gradient_checkpointing=True) == [(4, False, False)] * 4 + [(4, True, True)]
    assert all(call["checkpointing"] for call in unet_calls)
    by_policy = [(4, True, False)] * 3 + [(4, False, False), (4, True, True)]
    assert calls("policy", inversion_model="policy", **inpo) == by_policy
    baseline = {"objective": "diffusion_dpo", "timesteps_per_pair": 2}
    assert calls("baseline", **baseline) == [(8, False, False), (8, True, True)]
    in_chunks = [(n, True, gradient) for gradient in (False, True) for n in (8, 8, 4)]
    assert calls("chunks", timesteps_per_pair=5, trajectory_chunk=2) == [(4, False, False)] * 10 + in_chunks


def test_inversion_dpo_and_inpo_differ_in_where_the_mean_stands(train):
    """At one timestep a pair they are the same; at more, inversion_dpo's mean stands inside the log-sigmoid."""
    for count in (1, 3):
        options = {"timesteps_per_pair": count, "inversion_steps": 3, "learning_rate": 1e-3}
        runs = [lora(train(f"{name}-{count}", objective=name, **options)) for name in ("inversion_dpo", "inpo")]
        assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0]) == (count == 1)


def test_ways_to_save_memory_are_the_same_run(train):
    """Accumulation, chunks of the trajectory, checkpointing: the learning rate's schedule does not see them either."""
    whole = {"train_batch_size": 4}
    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "trajectory_chunk": 3}
    options = {"max_train_steps": 3, "lr_scheduler": "linear", "max_train_samples": 7, "inversion_steps": 4, **LINEAR}
    plain = train("plain", **whole, **options)
    assert max(map(abs, logged(plain, "rewards/margins"))) > 0.1
    assert_same(lora(train("parts", **parts, **options)), lora(plain), atol=2e-6)
    saving = {"gradient_checkpointing": True, "vae_encode_batch_size": 1, "offload": True}
    assert_same(lora(train("saving", **saving, **whole, **options)), lora(plain), atol=2e-6)
    options |= {"objective": "inpo", "timesteps_per_pair": 4}
    assert_same(lora(train("inpo in parts", **parts, **options)), lora(train("inpo", **whole, **options)), atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "trajectory_chunk": 1, "label_smoothing": 0.1},
        {"use_8bit_adam": True, "loss_type": "hinge", "lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"random_crop": True, "random_flip": True, "proportion_empty_prompts": 0.5, "dataloader_num_workers": 1},
        {"loss_type": "ipo", "timesteps_per_pair": 1, "adam_weight_decay": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_go_together_train_a_lora_in_float32(train, options):
    weights = lora(train(**options))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    assert all(value.any() for value in lora_b(weights).values())


def test_another_seed_is_another_run(train):
    first, other = train("0", max_train_steps=1), train("1", max_train_steps=1, seed=1)
    assert not any(torch.equal(value, lora(other)[key]) for key, value in lora(first).items())


def test_max_grad_norm_bites(train):
    """With an epsilon far above the gradient Adam's step is proportional to it, so clipping shortens the step."""
    options = {"max_train_steps": 1, "adam_epsilon": 1e4, "learning_rate": 1e4, "adam_weight_decay": 0}
    free = train("free", max_grad_norm=1e9, **options)
    clipped = lora(train("clipped", max_grad_norm=logged(free, "grad_norm")[0] / 10, **options))
    for key, value in lora_b(lora(free)).items():
        torch.testing.assert_close(clipped[key], value / 10, rtol=1e-2, atol=1e-7)


def test_winner_and_loser_share_timesteps_and_each_visit_draws_its_own(train, unet_calls):
    """By the seed, even if it is the same pair each time."""
    options = {"max_train_steps": 1, "train_batch_size": 4, "min_timestep": 200, "max_timestep": 599}
    for seed in (0, 1):
        train(str(seed), seed=seed, max_train_samples=1, inversion_steps=4, **options)
    drawn = [timesteps.view(4, 8) for timesteps in trained_at(unet_calls)]
    winners, losers = drawn[0].chunk(2, dim=1)
    assert torch.equal(winners, losers) and not torch.equal(*drawn)
    assert len(set(winners[0].tolist())) > 1
    for m in range(4):  # one in each quarter of the band
        assert ((200 + 100 * m <= winners[m]) & (winners[m] < 300 + 100 * m)).all()


def test_zero_terminal_snr_is_never_trained_at_its_last_timestep(train, tiny_v_model, unet_calls):
    options = {"pretrained_model_name_or_path": tiny_v_model, "objective": "inpo", "max_train_steps": 1}
    train(min_timestep=998, train_batch_size=8, inversion_steps=1, **options)
    assert set(trained_at(unet_calls)[0].tolist()) == {998}


def test_training_at_a_subset_of_timesteps(train, unet_calls):
    """As a distilled model is sampled: no other timestep is a target, and the inversion calls it at no other."""
    subset = [999, 249, 749, 499]
    train("one", timesteps_subset=subset, objective="inpo", train_batch_size=8)
    assert set(torch.cat(trained_at(unet_calls)).tolist()) == set(subset)
    unet_calls.clear()
    train("all", timesteps_subset=subset, max_train_steps=1)
    assert set(torch.cat([call["timesteps"] for call in unet_calls]).tolist()) == {0, *subset}
    assert trained_at(unet_calls)[0].view(4, 4).T.tolist() == [sorted(subset)] * 4


@pytest.mark.parametrize(
    ("targets", "modules"),
    [(["to_q", "to_v"], {"to_q", "to_v"}), ([r".*up_blocks.*\.(to_q|conv1)"], {"to_q", "conv1"})],
)
def test_lora_target_modules_by_name_and_by_pattern(train, targets, modules):
    weights = lora(train(lora_target_modules=targets, max_train_steps=1))
    assert {re.search(r"(\w+)\.lora", key)[1] for key in weights} == modules
    assert all("up_blocks" in key for key in weights) == ("up_blocks" in targets[0])


# Going on


def resume(train, whole, checkpoint, name, **options):
    """Continues a run from one of its checkpoints in a folder of its own."""
    shutil.copytree(whole / checkpoint, whole.with_name(name) / checkpoint)
    return lora(train(name, resume_from_checkpoint="latest", **options))


def test_a_resumed_run_is_the_run_that_was_never_stopped(train):
    """From the middle of an epoch, to the bit, with workers too; also if the batch is divided in another way."""
    options = {"random_flip": True, "random_crop": True, "proportion_empty_prompts": 0.3, "lr_scheduler": "linear"}
    options |= {"max_train_steps": 4, "objective": "inpo", "inversion_steps": 2, **LINEAR}
    whole = train("whole", train_batch_size=3, checkpointing_steps=2, **options)
    assert not any(torch.equal(value, lora(whole / "checkpoint-2")[key]) for key, value in lora(whole).items())
    again = resume(train, whole, "checkpoint-2", "again", train_batch_size=3, dataloader_num_workers=1, **options)
    assert_same(again, lora(whole))
    divided = {"train_batch_size": 1, "gradient_accumulation_steps": 3}
    assert_same(resume(train, whole, "checkpoint-2", "divided", **divided, **options), lora(whole), atol=2e-6)


def test_epochs_are_counted_in_pairs_also_after_the_batch_changed(train):
    """And only as many checkpoints are kept as asked for."""
    train(num_train_epochs=2, max_train_steps=None, checkpointing_steps=4, objective="diffusion_dpo")
    options = {"objective": "diffusion_dpo", "resume_from_checkpoint": "latest", "checkpoints_total_limit": 2}
    output_dir = train(num_train_epochs=3, max_train_steps=None, train_batch_size=4, **options)
    assert len(logged(output_dir, "loss")) == 10  # 8 steps of 2 pairs, 2 of 4
    assert {folder.name for folder in output_dir.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-10"}


def test_a_signal_to_all_processes_saves_and_stops_after_the_step(train, script, monkeypatch):
    """As launchers send it: the workers get it too, and must live until the step is done. The run goes on from there.

    It comes with the first of the second step's batches.
    """
    options = {"gradient_accumulation_steps": 4, "max_train_steps": 3, "random_flip": True, **QUICK}
    options["dataloader_num_workers"] = 1
    whole = lora(train("whole", **options))
    calls, encode_images = [], training_utils.encode_images

    def interrupted(*args):
        calls.append(multiprocessing.active_children())
        if len(calls) == 5:
            for process in (*calls[-1], multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)
        return encode_images(*args)

    monkeypatch.setattr(training_utils, "encode_images", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        train("stopped", **options)
    assert stop.value.code == 128 + signal.SIGTERM and len(calls) == 8 and len(calls[4]) == 1
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    resumed = train("stopped", resume_from_checkpoint="latest", **options)
    assert {folder.name for folder in resumed.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert_same(lora(resumed), whole)


def test_copied_alone_and_launched_in_two_processes_it_equals_one(train, tiny_model, pairs_dir, tmp_path):
    """Script and helpers are enough. Two processes on the CPU, with chunks and accumulation, take the steps of one.

    They begin with a LoRA and are tied to it. What is left behind is what the README promises; one process goes on
    from the checkpoint of two.
    """
    method = {"trajectory_chunk": 3, "max_train_steps": 3, "max_train_samples": 7, "lr_scheduler": "linear", **LINEAR}
    method |= {"lora_init": train("init", **LINEAR), "reference": "init", "rank": None}
    method |= {"num_eval_pairs": 1, "eval_steps": 3, "objective": "inversion_dpo"}
    one = train("one", train_batch_size=8, **method)
    for name in ("train_inversion_dpo.py", "inversion_utils.py", "training_utils.py", "training_options.py"):
        shutil.copy(ROOT / name, tmp_path)
    options = command_line(
        pretrained_model_name_or_path=tiny_model, train_data_dir=pairs_dir, output_dir="two", resolution=32,
        train_batch_size=2, gradient_accumulation_steps=2, checkpointing_steps=2, **method,
    )  # fmt: skip
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {key: value for key, value in ONE_THREAD.items() if key != "PYTHONPATH"}
    digest = {file: hashlib.sha256(file.read_bytes()).digest() for file in tiny_model.rglob("*") if file.is_file()}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "train_inversion_dpo.py", *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    two = tmp_path / "two"
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((two / "training_config.json").read_text())["pairs_per_step"] == 8 and "margin=" in done.stderr
    assert_same(lora(two), lora(one), atol=2e-6)
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval/margins"] for run in (one, two)]
    assert last[0] == pytest.approx(last[1], rel=1e-4) != 0
    for name in ("loss", "rewards/margins", "policy_error", "grad_norm", "lr"):  # means over the processes
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4, abs=1e-4), name
    names = {"README.md", "checkpoint-2", "checkpoint-3", "logs", LORA_FILE, "metrics.jsonl"}
    assert {path.name for path in two.iterdir()} == names | {"training_config.json", ".lock"}
    assert all(hashlib.sha256(file.read_bytes()).digest() == value for file, value in digest.items())
    assert_same(resume(train, two, "checkpoint-2", "resumed", train_batch_size=8, **method), lora(two), atol=2e-6)


# What goes wrong


def spoil_losses(script, monkeypatch, at_steps):
    """Makes the loss NaN at these steps, counted from 0."""
    seen, preference_loss = itertools.count(), script.preference_loss

    def spoilt(*args):
        loss, metrics = preference_loss(*args)
        return (loss * float("nan") if next(seen) in at_steps else loss), metrics

    monkeypatch.setattr(script, "preference_loss", spoilt)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(train, script, monkeypatch, request, precision):
    scalers = request.getfixturevalue("loss_scaling") if precision == "fp16" else []
    spoil_losses(script, monkeypatch, at_steps={0, 2})
    options = {"mixed_precision": precision, "checkpointing_steps": 1, "lr_scheduler": "linear"}
    output_dir = train(max_train_steps=4, trajectory_chunk=3, **options)
    steps = {i: lora(output_dir / f"checkpoint-{i}") for i in range(1, 5)}
    assert not any(value.any() for value in lora_b(steps[1]).values())
    assert_same(steps[2], steps[3])
    for earlier, later in ((1, 2), (3, 4)):
        assert not any(torch.equal(steps[earlier][key], value) for key, value in lora_b(steps[later]).items())
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in steps[4].values())
    assert logged(output_dir, "bad_steps") == [1, 1, 2, 2]
    assert logged(output_dir, "loss")[0] is None
    assert logged(output_dir, "lr") == pytest.approx([1e-4, 1e-4, 0.75e-4, 0.75e-4])  # good steps count
    assert [scaler.get_scale() for scaler in scalers] == ([2.0**14] if precision == "fp16" else [])


@pytest.mark.parametrize("objective", ["inpo", "diffusion_dpo"])
def test_a_pair_that_overflows_in_the_unet_is_left_out_and_its_step_counts(
    train, script, monkeypatch, caplog, objective
):
    """The policy would overflow there, too, so it is not shown that pair, the first of each batch."""
    predict_noise = script.predict_noise

    def overflow(unet, x_t, *rest):
        shown = x_t.flatten(1).any(1) | rest[1]["encoder_hidden_states"].flatten(1).any(1)
        is_bad = (torch.arange(len(x_t)) % 8 == 0) & shown
        return predict_noise(unet, x_t, *rest) * torch.where(is_bad, math.nan, 1.0)[:, None, None, None]

    monkeypatch.setattr(script, "predict_noise", overflow)
    options = {"objective": objective, "max_train_steps": 2, "train_batch_size": 4, "max_train_samples": 4}
    output_dir = train(**options)
    assert logged(output_dir, "bad_steps") == [0, 0]
    assert all(value.any() and value.isfinite().all() for value in lora_b(lora(output_dir)).values())
    assert 1 <= json.loads((output_dir / "training_config.json").read_text())["data"]["rows skipped"] <= 2
    assert "not finite" in caplog.text


def test_an_unlucky_step_after_resuming_is_no_standstill(train, script, monkeypatch):
    """The tenth good step is followed by a bad one."""
    output_dir = train(max_train_steps=10, **QUICK)
    spoil_losses(script, monkeypatch, at_steps={0})
    train(max_train_steps=11, resume_from_checkpoint="latest", **QUICK)
    assert logged(output_dir, "bad_steps")[-1] == 1


def test_fp16_learns_what_fp32_learns(train, request):
    """The margins after three steps in half precision with loss scaling are those of float32 within a tenth."""
    options = {"max_train_steps": 4, "train_batch_size": 8, "learning_rate": 1e-3, "inversion_steps": 4}
    full = train("fp32", mixed_precision="no", **options)
    scalers = request.getfixturevalue("loss_scaling")
    half = train("fp16", mixed_precision="fp16", **options)
    assert len(scalers) == 1 and logged(full, "rewards/margins")[-1] > 0.1
    for name in ("rewards/margins", "grad_norm"):
        assert logged(half, name)[-1] == pytest.approx(logged(full, name)[-1], rel=0.1)


def test_twenty_bad_steps_in_succession_end_the_run(train, tmp_path):
    """Here the first step throws the weights out of all bounds. Its checkpoint is kept."""
    with pytest.raises(RuntimeError, match="20 bad steps in a row.*--learning_rate"):
        train(learning_rate=1e30, max_train_steps=30, checkpointing_steps=19, **QUICK)
    assert len(logged(tmp_path / "run", "loss")) == 21 and (tmp_path / "run" / "checkpoint-19").is_dir()


def test_a_lora_that_does_not_move_is_an_error(train, tmp_path):
    """Preferences of strength 0 and ties teach nothing, so the LoRA stays zero to the bit."""
    rows = [{**row, "strength": 0.0, "label_0": 0.5 if i % 2 else 1.0} for i, row in enumerate(pair_rows(4))]
    for row in rows[1::2]:
        row["strength"] = 1.0
    data = {"train_data_dir": write_parquet(rows, tmp_path / "data"), "strength_column": "strength"}
    with pytest.raises(RuntimeError, match="after 10 steps the LoRA is unchanged"):
        train(tie_policy="soft", max_train_steps=12, checkpointing_steps=9, **data, **QUICK)
    assert not any(value.any() for value in lora_b(lora(tmp_path / "run" / "checkpoint-9")).values())


def test_rows_that_cannot_be_read_are_replaced_counted_and_named(train, tmp_path, caplog):
    rows = pair_rows(6)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:50]
    rows[4]["caption"] = None
    rows[5]["label_0"] = float("nan")
    data = write_parquet(rows, tmp_path / "broken")
    output_dir = train(train_data_dir=data, train_batch_size=5, max_train_steps=2)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for row in (2, 4):
        assert sum(f"row {row} is skipped" in line for line in warnings) == 1
    train(train_data_dir=data, train_batch_size=5, max_train_steps=2, resume_from_checkpoint="latest")  # nothing to do
    assert json.loads((output_dir / "training_config.json").read_text())["data"]["rows skipped"] == 3


@pytest.fixture
def overflowing(script, monkeypatch):
    """A dict to fill: the images whose latents overflow, by the number of the batch, from 0."""
    images, encode, calls = {}, AutoencoderKL.encode, itertools.count()

    def overflow(vae, *args, **options):
        output = encode(vae, *args, **options)
        output.latent_dist.mean[images.get(next(calls), [])] = float("inf")
        return output

    monkeypatch.setattr(AutoencoderKL, "encode", overflow)
    return images


def test_a_pair_whose_latents_overflow_is_named_and_teaches_nothing(train, overflowing, tmp_path, caplog):
    """Whatever else the pair says: with another caption the weights are the same."""
    overflowing.update({1: [1], 4: [1]})  # the winner of the second pair of the second batch, in either run
    rows, weights = pair_rows(8), []
    for name in ("as it was", "another caption"):
        data = write_parquet(rows, tmp_path / f"{name}, data")
        output_dir = train(name, train_data_dir=data, max_train_steps=3)
        weights.append(lora(output_dir))
        record = json.loads((output_dir / "training_config.json").read_text())
        assert record["data"]["rows skipped"] == 1 and record["metrics"]["bad_steps"] == 0
        (row,) = {int(match[1]) for match in re.finditer(r"row (\d+) is skipped: .*overflow", caplog.text)}
        rows[row]["caption"] = "a heart"
    assert_same(*weights)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_vae_that_always_overflows_ends_the_run_and_moves_nothing(train, overflowing, tmp_path, request, precision):
    _ = precision == "fp16" and request.getfixturevalue("loss_scaling")
    overflowing.update({batch: [0, 1] for batch in range(4, 30)})
    with pytest.raises(RuntimeError, match="20 bad steps in a row.*--pretrained_vae_model_name_or_path"):
        train(max_train_steps=30, checkpointing_steps=4, mixed_precision=precision, **QUICK)
    first, last = (lora(tmp_path / "run" / f"checkpoint-{step}") for step in (4, 16))
    assert_same(first, last)
    assert all(value.any() for value in lora_b(first).values())
