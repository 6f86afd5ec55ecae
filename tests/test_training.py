"""What the scripts share around the loop: chunked backward, LoRA files, checkpoints, number types."""

import argparse
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import build_pipeline
from diffusers import StableDiffusionPipeline

from inversion_utils import (
    LORA_FILE,
    STATE_FILE,
    Checkpoint,
    StopSignal,
    add_lora,
    backward_in_chunks,
    check_output_dir,
    check_resumed_run,
    checkpoint_steps,
    encode_images,
    find_checkpoint,
    is_zero_lora,
    load_lora,
    map_condition,
    number,
    preference_loss,
    reference_policy,
    save_lora,
)


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


def test_lora_files_round_trip_in_float32(tmp_path):
    unet = build_pipeline().unet.to(torch.bfloat16)
    parameters = add_lora(unet, rank=4, lora_alpha=8)
    assert is_zero_lora(unet) and all(parameter.dtype == torch.float32 for parameter in parameters)
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    assert not is_zero_lora(unet)
    before = [parameter.clone() for parameter in parameters]
    assert save_lora(unet, tmp_path, StableDiffusionPipeline) == tmp_path / "pytorch_lora_weights.safetensors"
    for parameter in parameters:
        torch.nn.init.zeros_(parameter)
    load_lora(unet, tmp_path, StableDiffusionPipeline)
    after = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert list(unet.peft_config) == ["default"]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(after, before, strict=True))
    pipe = build_pipeline()
    pipe.load_lora_weights(tmp_path)
    assert pipe.unet.peft_config["default_0"].lora_alpha == 8


def test_a_lora_of_another_rank_does_not_fit(tmp_path):
    unet, other = build_pipeline().unet, build_pipeline().unet
    add_lora(unet, 4, 4)
    add_lora(other, 8, 8)
    save_lora(unet, tmp_path, StableDiffusionPipeline)
    with pytest.raises(ValueError, match="another --rank"):
        load_lora(other, tmp_path, StableDiffusionPipeline)


def test_the_reference_is_the_base_even_after_an_error():
    unet = build_pipeline().unet
    x, t, text = torch.randn(1, 4, 4, 4), torch.tensor([10]), torch.randn(1, 16, 16)
    with torch.no_grad():
        base = unet(x, t, text).sample
        for parameter in add_lora(unet, 4, 4):
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


def test_conditions_are_mapped_at_any_depth():
    cond = {"encoder_hidden_states": torch.ones(2), "added_cond_kwargs": {"time_ids": torch.zeros(2)}}
    doubled = map_condition(lambda a, b: torch.cat([a, b]), cond, cond)
    assert doubled["encoder_hidden_states"].shape == doubled["added_cond_kwargs"]["time_ids"].shape == (4,)


@pytest.fixture
def run_dir(tmp_path):
    """Folder of a run with checkpoints 9 and 10, an unfinished one, and one that is none."""
    for name in ("checkpoint-9", "checkpoint-10", "partial-checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
        state = {"step": 10, "visit": 40, "num_pairs": 8, "options": {"rank": 4, "output_dir": "a"}}
        state |= {"metrics": [], "stream": None, "bad_rows": {}, "cut_captions": {}}
        (tmp_path / name / STATE_FILE).write_text(json.dumps(state))
    return tmp_path


def test_checkpoints_are_found_by_step_not_by_name(run_dir):
    assert list(checkpoint_steps(run_dir)) == [9, 10]
    newest = Checkpoint(run_dir / "checkpoint-10", 10, 40, 8, {"rank": 4, "output_dir": "a"}, [], None, {}, {})
    assert find_checkpoint(run_dir, "latest") == find_checkpoint(run_dir, "checkpoint-10") == newest
    assert find_checkpoint("elsewhere", str(run_dir / "checkpoint-10")) == newest
    assert find_checkpoint("elsewhere", str(run_dir / "checkpoint-9")).folder == run_dir / "checkpoint-9"
    assert find_checkpoint(run_dir, None) is None is find_checkpoint(run_dir / "empty", "latest")
    for name in ("checkpoint-11", "partial-checkpoint-11", "checkpoint-x", str(run_dir)):
        with pytest.raises(ValueError, match="--resume_from_checkpoint .* no such checkpoint"):
            find_checkpoint(run_dir, name)


def test_a_checkpoint_that_is_not_the_newest_of_its_run_is_refused(run_dir):
    """Going on from it would leave checkpoint-10 of another course beside its own."""
    with pytest.raises(ValueError, match="checkpoint-10 of the same run is newer"):
        find_checkpoint(run_dir, "checkpoint-9")


def test_the_name_is_looked_up_in_the_output_dir_first(run_dir, monkeypatch):
    (run_dir / "other" / "checkpoint-10").mkdir(parents=True)
    (run_dir / "other" / "checkpoint-10" / STATE_FILE).write_text("{}")
    monkeypatch.chdir(run_dir / "other")
    assert find_checkpoint(run_dir, "checkpoint-10").visit == 40


def test_a_damaged_state_is_named(run_dir):
    (run_dir / "checkpoint-10" / STATE_FILE).write_text("{}")
    with pytest.raises(ValueError, match="checkpoint-10/training_state.json is damaged"):
        find_checkpoint(run_dir, "latest")


def test_a_resumed_run_keeps_its_data_and_options_but_for_the_free_ones(run_dir):
    checkpoint = find_checkpoint(run_dir, "latest")
    check_resumed_run(checkpoint, 8, {"rank": 4, "output_dir": "b"}, free={"output_dir"})
    with pytest.raises(ValueError, match="--rank is 8, .* was made with 4"):
        check_resumed_run(checkpoint, 8, {"rank": 8, "output_dir": "a"}, free={"output_dir"})
    with pytest.raises(ValueError, match="the data have 9 pairs, .* was made with 8"):
        check_resumed_run(checkpoint, 9, {"rank": 4, "output_dir": "a"}, free={"output_dir"})


def test_output_dirs_in_use_or_unusable(run_dir):
    check_output_dir(run_dir / "new" / "deep", None)
    assert not any((run_dir / "new" / "deep").iterdir())
    checkpoint = find_checkpoint(run_dir, "latest")
    check_output_dir(run_dir, checkpoint)
    with pytest.raises(ValueError, match="--output_dir .* continue that run with --resume_from_checkpoint latest"):
        check_output_dir(run_dir, None)
    (run_dir / "new" / LORA_FILE).touch()
    for stranger in (None, checkpoint):  # a finished LoRA of another run is never replaced
        with pytest.raises(ValueError, match="--output_dir .* move it away"):
            check_output_dir(run_dir / "new", stranger)
    (run_dir / "file").touch()
    with pytest.raises(ValueError, match="--output_dir .* cannot be written"):
        check_output_dir(run_dir / "file", None)


def test_processes_that_check_the_same_folder_do_not_disturb_each_other(tmp_path):
    """As all ranks of a run do at the same moment."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check_output_dir(tmp_path, None), range(200)))


def test_the_first_signal_is_remembered_and_the_second_one_ends(monkeypatch):
    lines, ends = [], []
    previous = signal.signal(signal.SIGTERM, lambda *args: ends.append(args))
    try:
        stop = StopSignal(lines.append)
        assert stop.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM and "SIGTERM" in lines[0] and not ends
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(ends) == 1 and len(lines) == 1
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("text", ["0", "5", "nan", "inf", "-1"])
def test_numbers_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"is {text}; allowed: at least 1 and below 5"):
        number(float, least=1, below=5)(text)
    assert number(float, least=1, below=5)("4.5") == 4.5
    assert number(float, above=0, most=1)("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: above 0 and at most 1"):
        number(float, above=0, most=1)("0" if text == "5" else text)
