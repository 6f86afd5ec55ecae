"""The inversion cache: what it gives back is what was put in, under a key that says how it was made, or nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import encode, pair_rows, random_image, write_json, write_parquet
from PIL import Image
from test_train_inversion_dpo import ONE_THREAD, assert_same, launch, logged, lora

import inversion_utils
import train_inversion_dpo
import train_inversion_dpo_sdxl
from inversion_utils import (
    InversionCache,
    PreferenceDataset,
    Trajectory,
    VisitBatches,
    Visits,
    image_digest,
    join_visits,
    split_visits,
    visit_rng,
)

SCRIPTS = [train_inversion_dpo, train_inversion_dpo_sdxl]


@pytest.fixture
def family(request, script):
    """Options of the model that belongs to the script under test."""
    sdxl = script is train_inversion_dpo_sdxl
    return {"pretrained_model_name_or_path": request.getfixturevalue("tiny_sdxl_model" if sdxl else "tiny_model")}


both_families = pytest.mark.parametrize("script", SCRIPTS, ids=["sd", "sdxl"])


@pytest.fixture
def calls(script, monkeypatch):
    """Counts what a run calls: VAE, text encoders, models loaded, U-Net without and with a gradient."""
    counts = dict.fromkeys(("encode_images", "encode_prompts", "load_encoders", "invert", "reference", "policy"), 0)

    def counted(name, function):
        def call(*args, **options):
            result = function(*args, **options)
            kind = name
            if name == "predict_noise":
                kind = "policy" if result.requires_grad else "reference"
            counts[kind] += 1
            return result

        return call

    for name in ("encode_images", "encode_prompts", "load_encoders", "invert", "predict_noise"):
        monkeypatch.setattr(script, name, counted(name, getattr(script, name)))
    return counts


def shards(folder):
    return sorted(folder.glob("cache-*.safetensors"))


def reset(counts):
    counts.update(dict.fromkeys(counts, 0))


def only_policy(counts):
    """The number of policy calls, of a run that called nothing else."""
    assert not any(count for name, count in counts.items() if name != "policy"), counts
    return counts["policy"]


ANOTHER_BATCH = 1e-5  # what rounding in batches of another size does to weights that move by 3e-4 and more
MIXED = {"random_crop": True, "random_flip": True, "proportion_empty_prompts": 0.4, "cached_timesteps": 2}


@both_families
def test_a_run_from_the_cache_is_the_run_that_filled_it(train, family, calls, tmp_path):
    """Bit by bit; it calls the policy and nothing else, and loads neither VAE nor text encoder."""
    options = {**family, **MIXED, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 6}
    cold = train("cold", **options)
    assert calls["encode_images"] == calls["encode_prompts"] == calls["invert"] == 6 and calls["load_encoders"] == 1
    reset(calls)
    warm = train("warm", **options)
    assert only_policy(calls) == 6
    assert_same(lora(warm), lora(cold))
    assert any(value.any() for key, value in lora(warm).items() if "lora_B" in key or "lora.up" in key)


def test_epochs_repeat_after_the_draws(train, calls, tmp_path):
    """8 pairs, 2 draws, batches of 4: epochs 0 and 1 are computed, 2 and 3 are read, also while they are pending."""
    options = {"train_batch_size": 4, "cached_timesteps": 2, "max_train_steps": 8}
    cold = train("cold", inversion_cache_dir=tmp_path / "cache", checkpointing_steps=100, **options)
    assert calls["invert"] == 4 and len(shards(tmp_path / "cache")) == 1
    assert_same(lora(train("warm", inversion_cache_dir=tmp_path / "cache", **options)), lora(cold))


@both_families
def test_precomputing_does_all_the_work_and_leaves_no_lora(train, family, calls, tmp_path, caplog):
    options = {**family, **MIXED, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 8}
    output_dir = train("filled", precompute_only=True, train_batch_size=3, report_to="tensorboard", **options)
    assert list(output_dir.iterdir()) == [] and calls["policy"] == 0
    assert calls["invert"] == 6  # 2 draws of 8 pairs, in threes, the last two wrap around
    assert "Filled the cache" in caplog.text and "takes at most" in caplog.text
    reset(calls)
    train("again", precompute_only=True, train_batch_size=3, **options)
    assert not any(calls.values())
    warm = train("warm", **options)
    assert only_policy(calls) == 8
    shutil.rmtree(tmp_path / "cache")
    assert_same(lora(train("cold", **options)), lora(warm), atol=ANOTHER_BATCH)


@both_families
def test_hits_and_misses_in_a_batch_are_joined(train, family, calls, tmp_path, monkeypatch):
    """A third of the shards, a visit and perhaps a caption each, is taken away."""
    options = {**family, **MIXED, "inversion_cache_dir": tmp_path / "cache", "max_train_steps": 4}
    monkeypatch.setattr(inversion_utils, "SHARD_BYTES", 1)
    train("ones", precompute_only=True, train_batch_size=1, **options)
    assert len(shards(tmp_path / "cache")) == 16
    warm = lora(train("warm", **options))
    for shard in shards(tmp_path / "cache")[::3]:
        shard.unlink()
    reset(calls)
    assert_same(lora(train("mixed", **options)), warm, atol=ANOTHER_BATCH)
    assert 0 < calls["invert"] <= 4 and calls["load_encoders"] == 1


def test_data_workers_read_the_cache(train, calls, tmp_path):
    options = {"inversion_cache_dir": tmp_path / "cache", "max_train_steps": 4, **MIXED}
    cold = train("cold", **options)
    reset(calls)
    assert_same(lora(train("warm", dataloader_num_workers=2, **options)), lora(cold))
    assert calls["encode_images"] == 0


def test_the_cache_changes_draws_and_nothing_else(train, tmp_path, monkeypatch):
    """With the visits' own draws in place of the cached ones the weights are those without a cache."""
    visits = {
        index: visit for _, batch in zip(range(4), VisitBatches(8, 2, 0), strict=False) for visit, index in batch
    }
    monkeypatch.setattr(inversion_utils, "draw_rng", lambda seed, index, draw: visit_rng(seed, visits[index]))
    options = {"max_train_steps": 4, **MIXED, "cached_timesteps": None}
    cached = lora(train("cached", inversion_cache_dir=tmp_path / "cache", **options))
    assert_same(lora(train("plain", **options)), cached, atol=2e-6)


@pytest.mark.parametrize("objective", [{"objective": "diffusion_dpo"}, {"inversion_model": "policy"}], ids=len)
@both_families
def test_cached_latents_equal_the_plain_path(train, family, calls, tmp_path, objective):
    """Timesteps and noise are the visit's, so nothing but rounding may differ."""
    options = {**family, **objective, "max_train_steps": 6}
    plain = lora(train("plain", **options))
    reset(calls)
    cached = {"inversion_cache_dir": tmp_path / "cache", "cache_latents": True}
    assert_same(lora(train("cold", **cached, **options)), plain, atol=1e-5)
    assert calls["encode_images"] == 4  # an entry per row: 8 pairs in twos, the second epoch finds them
    reset(calls)
    assert_same(lora(train("warm", **cached, **options)), plain, atol=1e-5)
    assert calls["encode_images"] == calls["encode_prompts"] == calls["load_encoders"] == 0


def test_a_resumed_run_equals_one_that_never_stopped(train, refused, tmp_path):
    options = {"inversion_cache_dir": tmp_path / "cache", "max_train_steps": 6, "checkpointing_steps": 3, **MIXED}
    whole = train("whole", **options)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    resume = {**options, "resume_from_checkpoint": "latest", "inversion_cache_dir": tmp_path / "moved"}
    assert "--cached_timesteps is 3" in refused(output="stopped", **{**resume, "cached_timesteps": 3})
    without = {name: value for name, value in resume.items() if name not in ("inversion_cache_dir",)}
    message = refused(output="stopped", **{**without, "cached_timesteps": 4})
    assert "was made with --inversion_cache_dir" in message
    assert_same(lora(train("stopped", **resume)), lora(whole))
    train("plain", max_train_steps=1)
    resume = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "inversion_cache_dir": tmp_path / "cache"}
    assert "was made without --inversion_cache_dir" in refused(output="plain", **resume)


# Keys


def change_weights(name):
    def change(model):
        file = model / name
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
        return {}

    return change


def change_json(name, **changes):
    return lambda model: write_json(model / name, **changes)


def change_caption(rows):
    for row in rows:
        row["caption"] += " b"


def change_an_image_byte(column):
    def change(rows):
        for row in rows:
            row[column] += b"\0"

    return change


def keys_of(script, dtype=torch.float32, **options):
    """The keys of the first pair's visit and caption under these options, as a run makes them."""
    words = ["--output_dir", "unused"]
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    args, _ = script.parse_args(words)
    scheduler = script.load_noise_scheduler(args)
    pairs, targets = script.load_pairs(args), script.timesteps_per_pair(args)
    dataset = PreferenceDataset(
        pairs, args.resolution, targets, args.seed, args.random_crop, args.random_flip, args.proportion_empty_prompts
    )
    timesteps = script.allowed_timesteps(args, scheduler)
    dataset.cache = script.open_cache(args, scheduler, script.load_model_index(args), timesteps, dtype)
    cached = dataset[0, 0]["cached"]
    return cached.key, cached.text_key


VISIT, BOTH = (True, False), (True, True)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"options": {"resolution": 40}}, VISIT),
        ({"options": {"inversion_steps": 6}}, VISIT),
        ({"options": {"inversion_order": 1}}, VISIT),
        ({"options": {"inversion_spacing": "uniform"}}, VISIT),
        ({"options": {"inversion_guidance_scale": 2.0}}, VISIT),
        ({"options": {"timesteps_per_pair": 3, "inversion_steps": 8}}, VISIT),
        ({"options": {"min_timestep": 300}}, VISIT),
        ({"options": {"timesteps_subset": [100, 300, 500, 700], "inversion_steps": 8}}, VISIT),
        ({"options": {"seed": 1}}, VISIT),
        ({"options": {"random_crop": True}}, VISIT),
        ({"options": {"min_image_size": 8}}, VISIT),
        ({"options": {"cache_latents": True}}, VISIT),
        ({"options": {"cache_latents": True, "random_flip": True}, "before": {"cache_latents": True}}, VISIT),
        ({"options": {"allow_tf32": True}}, BOTH),
        ({"options": {"proportion_empty_prompts": 0.999}}, BOTH),
        ({"dtype": torch.bfloat16}, BOTH),
        ({"rows": change_caption}, BOTH),
        ({"rows": change_an_image_byte("jpg_0")}, VISIT),
        ({"rows": change_an_image_byte("jpg_1")}, VISIT),
        ({"model": change_weights("unet/diffusion_pytorch_model.safetensors")}, BOTH),
        ({"model": change_weights("vae/diffusion_pytorch_model.safetensors")}, BOTH),
        ({"model": change_weights("text_encoder/model.safetensors")}, BOTH),
        ({"model": change_weights("text_encoder_2/model.safetensors"), "script": train_inversion_dpo_sdxl}, BOTH),
        ({"model": change_json("vae/config.json", scaling_factor=2.0)}, BOTH),
        ({"model": change_json("tokenizer/tokenizer_config.json", model_max_length=12)}, BOTH),
        ({"model": change_json("scheduler/scheduler_config.json", beta_end=0.011)}, VISIT),
        ({"model": change_json("scheduler/scheduler_config.json", prediction_type="v_prediction")}, VISIT),
        ({"model": change_json("model_index.json", force_zeros_for_empty_prompt=False)}, BOTH),
        ({"format": 2}, BOTH),
        ({"options": {"objective": "inpo", "timesteps_per_pair": 4}}, (False, False)),
        ({"options": {"trajectory_chunk": 1, "learning_rate": 1.0, "train_batch_size": 1}}, (False, False)),
        ({}, (False, False)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_determines_an_entry_is_in_its_key(tiny_model, tiny_sdxl_model, tmp_path, monkeypatch, change, changed):
    script = change.get("script", train_inversion_dpo)
    model = shutil.copytree(tiny_model if script is train_inversion_dpo else tiny_sdxl_model, tmp_path / "model")
    rows = pair_rows(1)
    options = {
        "pretrained_model_name_or_path": model, "inversion_cache_dir": tmp_path / "cache", "resolution": 32,
        **change.get("before", {}),
    }  # fmt: skip
    before = keys_of(script, train_data_dir=write_parquet(rows, tmp_path / "data"), **options)
    change.get("model", lambda model: None)(model)
    change.get("rows", lambda rows: None)(rows)
    monkeypatch.setattr(inversion_utils, "CACHE_FORMAT", change.get("format", inversion_utils.CACHE_FORMAT))
    options["train_data_dir"] = write_parquet(rows, tmp_path / "changed")
    after = keys_of(script, change.get("dtype", torch.float32), **{**options, **change.get("options", {})})
    assert tuple(a != b for a, b in zip(after, before, strict=True)) == changed


def test_the_commit_stands_for_a_model_on_the_hub(tiny_model, pairs_dir, tmp_path):
    """Its configurations are all that has to be there; the cache of downloads is laid out as the Hub's client does."""
    keys = []
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / commit / "models--me--model"
        shutil.copytree(tiny_model, folder / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        keys += keys_of(
            train_inversion_dpo, pretrained_model_name_or_path="me/model", cache_dir=tmp_path / commit,
            train_data_dir=pairs_dir, inversion_cache_dir=tmp_path / "cache", resolution=32,
        )  # fmt: skip
    assert len(set(keys)) == 4


def test_a_text_entry_serves_every_crop_and_resolution(train, tmp_path):
    """Eight pairs in four captions: four texts and eight visits, and eight visits more at another resolution."""
    options = {"inversion_cache_dir": tmp_path / "cache", "precompute_only": True, "cached_timesteps": 1}
    for resolution, count in ((32, 12), (40, 20)):
        train(str(resolution), resolution=resolution, **options)
        assert sum(len(inversion_utils._read_header(shard)) for shard in shards(tmp_path / "cache")) == count


def test_images_are_told_apart_in_every_form():
    image = random_image(np.random.default_rng(0))
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert image_digest(encode(image)) == image_digest(encode(image)) != image_digest(encode(changed))
    assert image_digest(image) == image_digest(image.copy()) != image_digest(changed)
    assert image_digest(Image.new("RGB", (2, 3))) != image_digest(Image.new("RGB", (3, 2)))


def test_large_files_are_sampled_from_the_first_byte_to_the_last_stride(tmp_path):
    (tmp_path / "unet").mkdir()
    file, stride = tmp_path / "unet" / "weights.safetensors", inversion_utils.SAMPLE_STRIDE
    data = bytearray(20 * stride)
    digests = set()
    for position in (None, 0, 7 * stride + 5, 19 * stride):
        if position is not None:
            data[position] ^= 1
        file.write_bytes(data)
        digests.add(inversion_utils.files_digest(tmp_path, ["unet", "vae"]))
    file.write_bytes(data + b"\0")
    digests.add(inversion_utils.files_digest(tmp_path, ["unet", "vae"]))
    assert len(digests) == 5


# Storage


def an_entry(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"latents": torch.randn(2, 3, generator=generator), "usable": torch.tensor([True, True])}


def a_cache(folder):
    return InversionCache(folder, {"a": 1}, {"b": 2}, torch.arange(1000), 4, False)


def filled(folder, count=3):
    cache = a_cache(folder)
    for i in range(count):
        cache._add(f"{cache.prefix}-{i}", an_entry(i))
    cache.flush()
    return cache


def assert_same_entry(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_entries_come_back_bit_by_bit_also_in_half_precision(tmp_path):
    cache = a_cache(tmp_path)
    entries = {
        f"{cache.prefix}-{dtype}": {"x": torch.randn(3, 5).to(dtype), "t": torch.tensor([[999]])}
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    for key, entry in entries.items():
        cache._add(key, entry)
        assert_same_entry(cache.find(key), entry)
    cache.flush()
    for key, entry in entries.items():
        assert_same_entry(a_cache(tmp_path).find(key), entry)
    assert cache.size() == sum(shard.stat().st_size for shard in shards(tmp_path)) > 0


def test_another_process_s_shards_are_found_and_nothing_is_overwritten(tmp_path):
    one, two = a_cache(tmp_path), a_cache(tmp_path)
    one._add("k-1", an_entry(1))
    two._add("k-2", an_entry(2))
    one.flush()
    two.flush()
    two.flush()
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.glob("*.partial"))
    assert_same_entry(one.find("k-2"), an_entry(2))
    assert_same_entry(two.find("k-1"), an_entry(1))
    two._add("k-1", an_entry(7))
    assert_same_entry(two.find("k-1"), an_entry(1))


@pytest.fixture
def full_disk(monkeypatch):
    """Lets no file be written to its end."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inversion_utils.os, "fsync", full)


def test_a_shard_is_written_whole_or_not_at_all(full_disk, tmp_path, caplog):
    """And a full disk ends the keeping, not the training."""
    cache = a_cache(tmp_path)
    cache._add("k-1", an_entry())
    cache.flush()
    cache._add("k-2", an_entry())
    assert list(tmp_path.iterdir()) == [] and cache.find("k-1") is None and cache.find("k-2") is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"--inversion_cache_dir {tmp_path} cannot be written" in message and "No space left" in message


def test_what_a_killed_run_was_writing_goes_after_a_day(tmp_path):
    old, young = tmp_path / "cache-1.partial", tmp_path / "cache-2.partial"
    for file, age in ((old, 25 * 3600), (young, 3600)):
        file.write_bytes(b"half a shard")
        os.utime(file, (time.time() - age, time.time() - age))
    (tmp_path / "other.partial").touch()
    os.utime(tmp_path / "other.partial", (0, 0))
    a_cache(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [young.name, "other.partial"]


@both_families
def test_a_folder_deleted_while_training_costs_the_cache_and_nothing_else(
    train, script, family, tmp_path, monkeypatch, caplog
):
    options = {**family, "max_train_steps": 4, "learning_rate": 1e-3, "cached_timesteps": 1}
    kept = train("kept", inversion_cache_dir=tmp_path / "kept-cache", **options)
    calls, join = [], script.join_visits

    def join_without_folder(*args):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "cache")
        return join(*args)

    monkeypatch.setattr(script, "join_visits", join_without_folder)
    train("filling", inversion_cache_dir=tmp_path / "cache", **options | {"max_train_steps": 2})
    deleted = train("deleted", inversion_cache_dir=tmp_path / "cache", **options)
    assert_same(lora(deleted), lora(kept), atol=ANOTHER_BATCH)
    assert f"--inversion_cache_dir {tmp_path / 'cache'} cannot be written" in caplog.text


def test_what_is_not_finite_is_not_kept(tmp_path):
    cache, entry = a_cache(tmp_path), an_entry()
    cache._add("k-1", {**entry, "x": torch.tensor([1.0, math.nan])})
    cache._add("k-2", {**entry, "usable": torch.tensor([True, False])})
    assert cache.find("k-1") is None and cache.find("k-2") is None


def test_another_user_s_partial_shard_stays(tmp_path, monkeypatch):
    stale = tmp_path / "cache-1.partial"
    stale.touch()
    os.utime(stale, (0, 0))

    def unlink(self, missing_ok=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(inversion_utils.Path, "unlink", unlink)
    a_cache(tmp_path)
    assert stale.exists()


def test_pairs_that_overflow_are_named_and_computed_again(train, script, calls, tmp_path, monkeypatch, caplog):
    """Their latents may have been an accident: half precision, another VAE."""
    options = {"inversion_cache_dir": tmp_path / "cache", "cached_timesteps": 2, "max_bad_fraction": 1}
    encode = script.encode_images

    def overflow(vae, pixel_values, *rest):
        latents = encode(vae, pixel_values, *rest)
        latents[0] = math.inf  # the first winner
        return latents

    monkeypatch.setattr(script, "encode_images", overflow)
    train("fill", precompute_only=True, **options)
    named = [record.getMessage() for record in caplog.records if "the VAE overflows" in record.getMessage()]
    assert 4 <= len(named) <= 8 and "rows were skipped for latents not finite" in caplog.text
    monkeypatch.setattr(script, "encode_images", encode)
    plain = train(
        "plain", max_train_steps=4, learning_rate=1e-3, **options | {"inversion_cache_dir": tmp_path / "new"}
    )
    reset(calls)
    cached = train("cached", max_train_steps=4, learning_rate=1e-3, **options)
    assert calls["invert"] == 4 and calls["policy"] == 4
    assert_same(lora(cached), lora(plain), atol=ANOTHER_BATCH)


def test_a_full_disk_ends_the_filling_with_an_error(train, calls, full_disk, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inversion_utils, "SHARD_BYTES", 1)
    with pytest.raises(RuntimeError, match="cannot be written any more .* make room"):
        train(precompute_only=True, inversion_cache_dir=tmp_path / "cache")
    assert calls["invert"] == 1 and "Filled" not in caplog.text
    monkeypatch.setattr(inversion_utils, "SHARD_BYTES", 2**30)  # noticed at the last write only
    with pytest.raises(RuntimeError, match="cannot be written any more"):
        train(precompute_only=True, inversion_cache_dir=tmp_path / "cache")


def test_a_batch_from_a_worker_has_a_tensor_a_field_and_comes_apart_again(tmp_path):
    """Each tensor from a worker takes a file descriptor, of which a process has few."""
    cache = a_cache(tmp_path)
    cached = [
        inversion_utils.CachedVisit(f"v-{i}", f"t-{i}", an_entry(i), {"e": torch.full((2,), i)}, []) for i in range(9)
    ]
    examples = [
        {"visit": i, "row": str(i), "strength": 1.0, "is_tie": False, "uniforms": torch.zeros(1), "bad_rows": [],
         "caption": "x", "cached": one}
        for i, one in enumerate(cached)
    ]  # fmt: skip
    tokenizer = type(
        "Tokens", (), {"model_max_length": 9, "__call__": lambda *a, **k: type("I", (), {"input_ids": [0]})}
    )
    batch = inversion_utils.collate_cached(examples, None, [tokenizer()])
    tensors = [value for part in batch["known"].values() for value in part.values()]
    assert len(tensors) == len(an_entry()) + 1 and not any(c.entry or c.text for c in batch["cached"])
    for i, (entry, text) in enumerate(cache.complete(batch, None)):
        assert_same_entry(entry, an_entry(i))
        assert text["e"].tolist() == [i, i]


def test_every_flipped_bit_is_noticed(tmp_path):
    """In header, names, shapes, checksums and data: an entry comes back right, or not and the shard is named."""
    (shard,) = shards(filled(tmp_path / "whole").folder)
    data = shard.read_bytes()
    (tmp_path / "damaged").mkdir()
    copy = tmp_path / "damaged" / shard.name
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 7
        copy.write_bytes(damaged)
        cache = a_cache(tmp_path / "damaged")
        found = [cache.find(f"{cache.prefix}-{i}") for i in range(3)]
        for i, entry in enumerate(found):
            if entry is not None:
                assert_same_entry(entry, an_entry(i))
        assert None not in found or list(cache.damaged) == [shard.name], position
        if not data[position] == ord(" "):  # the header's padding
            assert None in found, position


def test_every_truncation_is_noticed(tmp_path):
    (shard,) = shards(filled(tmp_path).folder)
    data = shard.read_bytes()
    for length in range(0, len(data), 7):
        shard.write_bytes(data[:length])
        cache = a_cache(tmp_path)
        assert cache.find(f"{cache.prefix}-0") is None and list(cache.damaged) == [shard.name]


@pytest.mark.parametrize("damage", ["cut short", "flipped"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named_once_and_made_again(train, calls, tmp_path, caplog, damage, workers):
    options = {"inversion_cache_dir": tmp_path / "cache", "cached_timesteps": 1, "dataloader_num_workers": workers}
    whole = lora(train("whole", max_train_steps=4, **options))
    (shard,) = shards(tmp_path / "cache")
    data = bytearray(shard.read_bytes())
    data[-20] ^= 4
    shard.write_bytes(data[:-50] if damage == "cut short" else data)
    reset(calls)
    caplog.clear()
    assert_same(lora(train("again", max_train_steps=4, **options)), whole, atol=2e-6)
    warnings = [record.getMessage() for record in caplog.records if "of the cache is damaged" in record.getMessage()]
    assert len(warnings) == 1 and shard.name in warnings[0]
    assert (calls["invert"] == 4) if damage == "cut short" else (1 <= calls["invert"] < 4)
    reset(calls)
    train("after", max_train_steps=4, **options)
    assert calls["invert"] == 0


def test_a_signal_stops_the_filling_and_it_goes_on_there(train, script, calls, tmp_path, monkeypatch, caplog):
    options = {"inversion_cache_dir": tmp_path / "cache", "precompute_only": True, "cached_timesteps": 2}
    counted = script.invert

    def invert(*args, **rest):
        if calls["invert"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return counted(*args, **rest)

    monkeypatch.setattr(script, "invert", invert)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train("one", **options)
    assert stop.value.code == 128 + signal.SIGTERM and calls["invert"] == 3
    assert "Stopped filling" in caplog.text and signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(script, "invert", counted)
    reset(calls)
    train("one", **options)
    assert calls["invert"] == 8 - 3


def test_two_processes_share_the_folder(train, calls, tiny_model, pairs_dir, tmp_path):
    """They divide the rows to be filled; training under two from it is training under one from it."""
    options = {"cached_timesteps": 2, "max_train_steps": 4, "report_to": "tensorboard"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--inversion_cache_dir", str(tmp_path / "cache")]
    command = launch(tmp_path / "fill", tiny_model, pairs_dir, *words, "--precompute_only", processes=2)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(shards(tmp_path / "cache")) == 2
    keys = [set(inversion_utils._read_header(shard)) for shard in shards(tmp_path / "cache")]
    visits = [{key for key in some if key.split("-")[0] != min(prefixes(keys, texts=4))} for some in keys]
    assert not visits[0] & visits[1]
    one = train("one", inversion_cache_dir=tmp_path / "cache", train_batch_size=4, **options)
    assert only_policy(calls) == 4
    command = launch(tmp_path / "two", tiny_model, pairs_dir, *words, processes=2)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(lora(tmp_path / "two"), lora(one), atol=2e-6)
    assert len(shards(tmp_path / "cache")) == 2
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)


def prefixes(keys, texts):
    """The prefix of the text entries: that with so many keys in all."""
    found = {}
    for key in set().union(*keys):
        found.setdefault(key.split("-")[0], set()).add(key)
    return [prefix for prefix, members in found.items() if len(members) == texts]


# Options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "diffusion_dpo"}, ["--objective diffusion_dpo", "--cache_latents"]),
        ({"inversion_model": "policy"}, ["--inversion_model policy", "--cache_latents"]),
        ({"cache_latents": True, "inversion_guidance_scale": 2}, ["--cache_latents", "--inversion_guidance_scale 1"]),
        ({"cached_timesteps": 0}, ["--cached_timesteps", "at least 1"]),
        ({"inversion_cache_dir": None, "cache_latents": True}, ["--cache_latents", "--inversion_cache_dir"]),
        ({"inversion_cache_dir": None, "precompute_only": True}, ["--precompute_only", "--inversion_cache_dir"]),
        ({"inversion_cache_dir": None, "cached_timesteps": 2}, ["--cached_timesteps", "--inversion_cache_dir"]),
        ({"streaming": True}, ["--inversion_cache_dir", "--streaming"]),
        ({"precompute_only": True, "dry_run": True}, ["--precompute_only", "--dry_run"]),
        ({"inversion_cache_dir": __file__}, ["--inversion_cache_dir", "cannot be used"]),
    ],
    ids=str,
)
def test_combinations_that_are_refused(refused, no_models, tmp_path, options, named):
    message = refused(**{"inversion_cache_dir": tmp_path / "cache", **options})
    assert all(text in message for text in named), message


@pytest.mark.parametrize("options", [{}, {"dry_run": True}], ids=str)
def test_a_disk_without_room_is_refused(refused, no_models, script, tmp_path, monkeypatch, options):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    message = refused(inversion_cache_dir=tmp_path / "cache", **options)
    assert "has 0.00 GiB free" in message and "--cached_timesteps" in message


@pytest.mark.parametrize(
    "options", [{}, {"cache_latents": True}, {"cache_latents": True, "random_crop": True}], ids=str
)
def test_a_full_cache_needs_no_room_and_a_short_run_little(train, refused, script, tmp_path, monkeypatch, options):
    options = {**options, "inversion_cache_dir": tmp_path / "cache"}

    def leave(free):
        usage = shutil._ntuple_diskusage(10**9, 10**9, free)
        monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: usage)

    leave(10**5)
    train("short", max_train_steps=1, train_batch_size=1, **options)
    assert "GiB free" in refused(precompute_only=True, resolution=256, **options)
    leave(10**9)
    train("fill", precompute_only=True, **options)
    leave(0)
    train("full", max_train_steps=9, **options)


@both_families
@pytest.mark.parametrize("options", [{}, {"cache_latents": True}], ids=len)
def test_the_estimate_covers_what_is_written(train, script, family, tmp_path, options):
    """The tiny models have 77 / 16 fewer tokens than CLIP, and two pairs here share a caption."""
    arguments = {**family, **options, "inversion_cache_dir": tmp_path / "cache", "resolution": 128}
    train(precompute_only=True, **arguments)
    words = ["--output_dir", "o", "--dataset_name", "d"]
    for name, value in arguments.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    args, _ = script.parse_args(words)
    written = sum(shard.stat().st_size for shard in shards(tmp_path / "cache"))
    pairs = type("Pairs", (), {"__len__": lambda self: 8, "max_captions": 1})()
    visits, captions, visit, caption = script.cache_size(args, pairs, torch.float32)
    size = visits * visit + captions * caption
    texts = 8 * 4 * 77 * (40 if "sdxl" in script.__name__ else 16)
    assert written <= size < 1.25 * (written + texts)


def test_a_dry_run_says_the_size_and_leaves_the_cache_as_it_is(train, calls, tmp_path):
    cache = tmp_path / "cache"
    train("filled", inversion_cache_dir=cache, max_train_steps=1)
    before, options = {file.name: file.read_bytes() for file in cache.iterdir()}, {"max_train_steps": 9}
    reset(calls)
    output_dir = train("dry", inversion_cache_dir=cache, dry_run=True, **options)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before
    report = json.loads((output_dir / inversion_utils.DRY_RUN_FILE).read_text())
    assert 0 < report["cache"]["GiB to come"] < report["cache"]["GiB at most"] < report["cache"]["GiB free"]
    assert calls["invert"] > 0 and report["training"]["updates"] == 9


# Conversion


def test_visits_survive_splitting_and_joining_in_another_order():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(6, 4, 2, 2, generator=generator), torch.randn(5, 6, 4, 2, 2, generator=generator)
    text = torch.randn(3, 7, 8, generator=generator)
    cond = {
        "encoder_hidden_states": torch.cat([text, text]).bfloat16(),
        "added_cond_kwargs": {"time_ids": torch.arange(36.0).view(6, 6)},
    }
    abar = torch.linspace(0.99, 0.01, 100)
    timesteps = torch.randint(100, (5, 3), generator=generator).repeat(1, 2)
    x_t = inversion_utils.add_noise(latents, noise, timesteps, abar)
    usable = torch.tensor([True, False, True]).repeat(2)
    errors = torch.randn(5, 6, generator=generator)
    visits = Visits(latents, usable, cond, Trajectory(timesteps, x_t, noise, None), errors)
    order = torch.tensor([2, 0])
    both = torch.cat([order, order + 3])
    entries = split_visits(visits)
    joined = join_visits([entries[i] for i in order], abar)
    assert torch.equal(joined.latents, latents[both]) and torch.equal(joined.usable, usable[both])
    assert torch.equal(joined.trajectory.latents, x_t[:, both]) and torch.equal(
        joined.reference_error, errors[:, both]
    )
    assert torch.equal(joined.trajectory.timesteps, timesteps[:, both])
    assert torch.equal(joined.cond["encoder_hidden_states"], cond["encoder_hidden_states"][both])
    times = joined.cond["added_cond_kwargs"]["time_ids"]
    assert torch.equal(times, cond["added_cond_kwargs"]["time_ids"][both])
