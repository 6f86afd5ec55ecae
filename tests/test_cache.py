"""The cache: a run that reads it is the run that filled it, and nothing in it is ever taken for something else."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ONE_THREAD,
    ROOT,
    assert_same,
    command_line,
    encode,
    lora,
    pair_rows,
    random_image,
    write_json,
    write_parquet,
)
from PIL import Image

import train_inversion_dpo
import train_inversion_dpo_sdxl
import training_utils
from training_utils import LORA_FILE, TargetCache

ANOTHER_BATCH = 1e-5  # what rounding in batches of another size does to weights that move by 3e-4 and more
MIXED = {"random_crop": True, "random_flip": True, "proportion_empty_prompts": 0.4, "cached_draws": 2}
INPO = {"objective": "inpo", "inversion_steps": 2}
both_families = pytest.mark.parametrize("script", [train_inversion_dpo, train_inversion_dpo_sdxl], ids=["sd", "sdxl"])


@pytest.fixture
def family(request, script):
    """The model that belongs to the script under test."""
    sdxl = script is train_inversion_dpo_sdxl
    return {"pretrained_model_name_or_path": request.getfixturevalue("tiny_sdxl_model" if sdxl else "tiny_model")}


@pytest.fixture
def calls(script, monkeypatch):
    """Counts what a run calls: VAE, text encoders, their loading, inversions, U-Net without and with a gradient."""
    counts = dict.fromkeys(("encode_images", "encode_prompts", "load_encoders", "invert", "reference", "policy"), 0)

    def counted(name, function):
        def call(*args, **options):
            result = function(*args, **options)
            unet = "policy" if name == "predict_noise" and result.requires_grad else "reference"
            counts[unet if name == "predict_noise" else name] += 1
            return result

        return call

    for name in ("encode_images", "encode_prompts", "load_encoders", "invert", "predict_noise"):
        owner = training_utils if name == "encode_images" else script
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return counts


def take(counts):
    """Returns the counts that are not zero, and starts anew."""
    taken = {name: count for name, count in counts.items() if count}
    counts.update(dict.fromkeys(counts, 0))
    return taken


def files(cache):
    """The files of targets by draw and place."""
    found = cache.glob("*/draw-*/*.safetensors")
    return {(int(file.parent.name.removeprefix("draw-")), int(file.stem)): file for file in found}


# Filling and reading


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "inpo"}, {"objective": "diffusion_dpo"}, {"objective": "inpo", "mixed_precision": "bf16"}],
    ids=str,
)
@both_families
def test_a_run_from_the_cache_is_the_run_that_filled_it(train, family, calls, tmp_path, options):
    """Bit by bit. It calls the policy and nothing else, and loads neither VAE nor text encoders."""
    options = {**family, **MIXED, **options, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 6}
    cold = lora(train("cold", **options))
    assert take(calls)["load_encoders"] == 1
    warm = lora(train("warm", dataloader_num_workers=1, **options))
    assert take(calls) == {"policy": 6}
    assert_same(warm, cold)
    assert any(value.any() for key, value in warm.items() if "lora_B" in key or "lora.up" in key)


@both_families
def test_the_cache_changes_draws_and_nothing_else(train, family, tmp_path):
    """Where a visit draws nothing, which all timesteps of a subset and a centre crop come to, weights are equal."""
    rng = np.random.default_rng(0)
    rows = pair_rows()
    for row in rows[:4]:  # which SDXL is told; the others have winners and losers of one size
        row["jpg_1"] = encode(random_image(rng, (96, 64)))
    options = {**family, "train_data_dir": write_parquet(rows, tmp_path / "data"), "max_train_steps": 5}
    options |= {"timesteps_subset": [100, 400, 900], "timesteps_per_pair": 3}
    plain = lora(train("plain", **options))
    cached = lora(train("cached", inversion_cache_dir=tmp_path / "cache", cached_draws=1, **options))
    assert_same(cached, plain, atol=ANOTHER_BATCH)


def test_a_run_fills_what_it_visits_and_the_next_one_what_is_missing(train, calls, tmp_path):
    options = {**INPO, "inversion_cache_dir": tmp_path / "cache", "cached_draws": 2}
    train("short", max_train_steps=1, **options)
    assert len(files(tmp_path / "cache")) == 2
    before = {key: file.stat().st_mtime_ns for key, file in files(tmp_path / "cache").items()}
    take(calls)
    train("longer", max_train_steps=6, **options)
    assert take(calls)["invert"] == 5 and len(files(tmp_path / "cache")) == 12
    assert before.items() <= {key: file.stat().st_mtime_ns for key, file in files(tmp_path / "cache").items()}.items()


def test_precomputing_fills_all_draws_and_trains_nothing(train, calls, tmp_path):
    options = {**INPO, "inversion_cache_dir": tmp_path / "cache", "cached_draws": 3}
    for output, counted in (("filled", {"reference", "invert", "encode_images"}), ("again", set())):
        with pytest.raises(SystemExit) as stop:
            train(output, precompute_only=True, train_batch_size=5, **options)
        assert stop.value.code == 0 and [path.name for path in (tmp_path / output).iterdir()] == [".lock"]
        assert files(tmp_path / "cache").keys() == set(itertools.product(range(3), range(8)))
        taken = take(calls)
        assert counted <= taken.keys() and "policy" not in taken and (counted or not taken)
    train("filled", max_train_steps=13, **options)
    assert take(calls) == {"policy": 13}


def test_a_resumed_run_equals_one_that_never_stopped(train, refused, tmp_path):
    """Also if the cache has been moved. Without it the draws would be others, and it is refused."""
    options = {**INPO, **MIXED, "max_train_steps": 6, "checkpointing_steps": 3}
    whole = train("whole", inversion_cache_dir=tmp_path / "cache", **options)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    options["resume_from_checkpoint"] = "latest"
    assert "inversion_cache_dir" in refused(output="stopped", **options)
    resumed = train("stopped", inversion_cache_dir=tmp_path / "moved", **options)
    assert_same(lora(resumed), lora(whole))


def test_two_nodes_share_the_work_and_equal_one_process(train, calls, tiny_model, pairs_dir, tmp_path):
    """A process on each, by a loopback address."""
    options = {**MIXED, "objective": "inpo", "max_train_steps": 4, "learning_rate": 1e-3}
    shared = {
        "pretrained_model_name_or_path": tiny_model, "train_data_dir": pairs_dir, "output_dir": tmp_path / "two",
        "inversion_cache_dir": tmp_path / "shared", "resolution": 32, "rank": 4, "train_batch_size": 2,
        "report_to": "none",
    }  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = ["--master_addr", "127.0.0.1", "--master_port", str(probe.getsockname()[1])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *place]
    nodes = [
        subprocess.Popen(
            [*launcher, "--node_rank", rank, ROOT / "train_inversion_dpo.py", *command_line(**shared, **options)],
            env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for rank in "01"
    ]  # fmt: skip
    for node in nodes:
        _, log = node.communicate(timeout=300)
        assert node.returncode == 0, log[-3000:]
        assert set(re.findall(r"Caching: .*?/(\d+) \[", log)) == {"4"}  # batches of 2, of 16 draws
    one = train("one", inversion_cache_dir=tmp_path / "cache", train_batch_size=4, **options)
    assert files(tmp_path / "shared").keys() == files(tmp_path / "cache").keys()
    assert_same(lora(tmp_path / "two"), lora(one), atol=ANOTHER_BATCH)
    take(calls)
    warm = train("warm", inversion_cache_dir=tmp_path / "shared", train_batch_size=4, **options)
    assert take(calls) == {"policy": 4}
    assert_same(lora(tmp_path / "two"), lora(warm), atol=2e-6)


# Accidents


def test_filling_that_was_stopped_goes_on_there(train, script, calls, tmp_path, monkeypatch):
    options = {**INPO, **MIXED, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 4}
    counted = script.invert

    def invert(*args, **rest):
        if calls["invert"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return counted(*args, **rest)

    monkeypatch.setattr(script, "invert", invert)
    with pytest.raises(SystemExit) as stop:
        train("stopped", **options)
    assert stop.value.code == 128 + signal.SIGTERM
    assert take(calls)["invert"] == 2 and len(files(tmp_path / "cache")) == 4
    assert not (tmp_path / "stopped" / LORA_FILE).exists()
    first = next(iter(files(tmp_path / "cache").values()))
    first.with_name(f"99.safetensors.{os.getpid()}.partial").write_bytes(b"half a file, of a run that was killed")
    monkeypatch.setattr(script, "invert", counted)
    went_on = train("stopped", **options)
    assert take(calls)["invert"] == 2 and len(files(tmp_path / "cache")) == 8
    shutil.rmtree(tmp_path / "cache")
    assert_same(lora(went_on), lora(train("at once", **options)))


def test_a_file_that_was_cut_short_is_named_and_computed_again(train, calls, tmp_path, caplog):
    options = {**INPO, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 4}
    whole = lora(train("whole", **options))
    file = files(tmp_path / "cache")[0, 3]
    file.write_bytes(file.read_bytes()[:-50])
    take(calls)
    assert_same(lora(train("again", **options)), whole)  # to the last bit: the same batch found it
    assert take(calls)["invert"] == 1
    assert sum(str(file) in record.getMessage() for record in caplog.records) == 1
    train("after", **options)
    assert take(calls) == {"policy": 4}


def test_every_truncation_is_noticed(train, tmp_path):
    train(**INPO, inversion_cache_dir=tmp_path / "cache", max_train_steps=1)
    file = next(iter(files(tmp_path / "cache").values()))
    data, cache, named = file.read_bytes(), TargetCache(tmp_path / "small", {}, str), []
    copy = cache.path(0, 0)
    copy.parent.mkdir()
    for length in range(0, len(data), 7):
        copy.write_bytes(data[:length])
        assert cache.missing([(0, 0), (1, 0)], named.append) == [(0, 0), (1, 0)]
        assert str(copy) in named.pop() and not named
    copy.write_bytes(data)
    assert cache.missing([(0, 0)], named.append) == []


def test_pairs_that_overflow_are_named_and_stored_as_unusable_and_training_goes_on(
    train, calls, tmp_path, monkeypatch, caplog
):
    rows = pair_rows(6)
    rows[4] |= {"jpg_0": encode(Image.new("RGB", (32, 32), "white")), "label_0": 1.0}
    options = {**INPO, "train_data_dir": write_parquet(rows, tmp_path / "data"), "max_train_steps": 3}
    options |= {"inversion_cache_dir": tmp_path / "cache", "cached_draws": 1}
    encode_images = training_utils.encode_images

    def overflow(vae, pixels, *rest):
        latents = encode_images(vae, pixels, *rest)
        latents[(pixels.flatten(1) == 1).all(1)] = math.inf
        return latents

    monkeypatch.setattr(training_utils, "encode_images", overflow)
    cold = train("cold", **options)
    assert {place for _, place in files(tmp_path / "cache")} == set(range(6))
    assert sum("row 4 " in record.getMessage() for record in caplog.records) == 1
    assert json.loads((cold / "training_config.json").read_text())["data"]["rows skipped"] == 1
    take(calls)
    warm = train("warm", **options)
    assert take(calls) == {"policy": 3}
    assert json.loads((warm / "training_config.json").read_text())["data"]["rows skipped"] == 1
    assert_same(lora(warm), lora(cold))
    assert all(value.isfinite().all() for value in lora(cold).values())
    everything = write_parquet([{**rows[4], "caption": str(i)} for i in range(3)], tmp_path / "everything")
    with pytest.raises(RuntimeError):
        train("nothing", **{**options, "train_data_dir": everything})


def test_a_full_disk_ends_the_filling_with_one_error(train, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def write(self, data):
        if ".safetensors" in self.name and len(files(tmp_path / "cache")) == 3:
            write_bytes(self, data[:9])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    options = {**INPO, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 4}
    with pytest.raises(RuntimeError) as error:
        train(**options)
    assert "--inversion_cache_dir" in str(error.value) and "\n" not in str(error.value)
    assert len(files(tmp_path / "cache")) == 3 and not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    train(**options)
    assert len(files(tmp_path / "cache")) == 8


# Settings


def touch(name):
    def change(model):
        file = model / name
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))

    return change


def rewrite(name, **changes):
    return lambda model: write_json(model / name, **changes)


OTHERS, SAME = True, False


@pytest.fixture
def no_weights(script, monkeypatch):
    """Ends a run where it would load weights, as damaged files do; the cache's folder is there by then."""

    def load(*args):
        raise ValueError("damaged")

    monkeypatch.setattr(script, "load_encoders", load)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, OTHERS),
        ({"resolution": 40}, OTHERS),
        ({"random_crop": True}, OTHERS),
        ({"random_flip": True}, OTHERS),
        ({"proportion_empty_prompts": 0.2}, OTHERS),
        ({"inversion_steps": 6}, OTHERS),
        ({"timesteps_per_pair": 3, "inversion_steps": 8}, OTHERS),
        ({"min_timestep": 300}, OTHERS),
        ({"max_timestep": 300}, OTHERS),
        ({"timesteps_subset": [0, 300, 500, 999], "inversion_steps": 8}, OTHERS),
        ({"objective": "diffusion_dpo", "timesteps_per_pair": 4}, OTHERS),
        ({"mixed_precision": "bf16"}, OTHERS),
        ({"max_train_samples": 4}, OTHERS),
        ({"winner_column": "jpg_0", "loser_column": "jpg_1"}, OTHERS),
        ({"image_0_column": "jpg_1", "image_1_column": "jpg_0"}, OTHERS),
        ({"strength_column": "label_0"}, OTHERS),
        ({"variant": "non_ema"}, OTHERS),
        (touch("unet/diffusion_pytorch_model.safetensors"), OTHERS),
        (touch("vae/diffusion_pytorch_model.safetensors"), OTHERS),
        (touch("text_encoder/model.safetensors"), OTHERS),
        (rewrite("scheduler/scheduler_config.json", beta_end=0.011), OTHERS),
        (rewrite("scheduler/scheduler_config.json", prediction_type="v_prediction"), OTHERS),
        ("vae", OTHERS),
        ("data", OTHERS),
        ({}, SAME),
        ({"rank": 8, "learning_rate": 1.0, "lora_target_modules": ["to_q"], "beta_dpo": 1}, SAME),
        ({"max_train_steps": 9, "cached_draws": 2, "precompute_only": True}, SAME),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 2, "trajectory_chunk": 1}, SAME),
        ({"objective": "inpo", "timesteps_per_pair": 4, "loss_type": "ipo"}, SAME),
        ({"output_dir": "elsewhere", "dataloader_num_workers": 1, "gradient_checkpointing": True}, SAME),
    ],
    ids=lambda value: str(value) if isinstance(value, dict | str) else "",
)
def test_what_determines_the_targets_has_a_folder_of_its_own(
    refused, no_weights, tiny_model, tmp_path, monkeypatch, change, expected
):
    """The folder is there before anything is loaded. What merely trains on the targets shares them."""
    monkeypatch.chdir(tmp_path)
    model, data = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "data"
    write_parquet(pair_rows(), data)
    options = {"pretrained_model_name_or_path": model, "train_data_dir": data, "inversion_cache_dir": "cache"}
    refused(**options)
    (before,) = Path("cache").iterdir()
    if callable(change):
        change(model)
    elif change == "vae":
        options["pretrained_vae_model_name_or_path"] = shutil.copytree(model / "vae", tmp_path / "vae")
    elif change == "data":
        write_parquet(pair_rows(seed=1), data)
    else:
        options |= change
    refused(**options)
    assert (set(Path("cache").iterdir()) != {before}) == expected
    assert all(json.loads((folder / "settings.json").read_text()) for folder in Path("cache").iterdir())


def test_pairs_of_equal_number_are_not_the_same_pairs(refused, no_weights, tmp_path):
    for options in ({"max_train_samples": 6}, {"num_eval_pairs": 2}, {"num_eval_pairs": 1, "max_train_samples": 7}):
        refused(inversion_cache_dir=tmp_path / "cache", **options)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_commit_stands_for_a_model_on_the_hub(refused, no_weights, tiny_model, tmp_path):
    """The cache of downloads is laid out as the Hub's client does; the configurations are all that has to be there."""
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / commit / "models--me--model"
        shutil.copytree(tiny_model, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        options = {"pretrained_model_name_or_path": "me/model", "inversion_cache_dir": tmp_path / "cache"}
        refused(cache_dir=tmp_path / commit, **options)
        refused(cache_dir=tmp_path / commit, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"inversion_model": "policy"}, "--inversion_model policy"),
        ({"cached_draws": 0}, "--cached_draws"),
        ({"inversion_cache_dir": None, "precompute_only": True}, "--precompute_only"),
        ({"inversion_cache_dir": __file__}, "--inversion_cache_dir"),
    ],
    ids=str,
)
def test_combinations_that_are_refused(refused, no_models, tmp_path, options, named):
    assert named in refused(**{"inversion_cache_dir": tmp_path / "cache", **options})
