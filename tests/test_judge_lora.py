"""examples/judge_lora.py: how good a LoRA is, and at which scale to use it."""

import json
import re

import judge_lora
import numpy as np
import pytest
import torch
from conftest import build_pipeline, build_sdxl_pipeline
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_lora import random_lora

from inversion_utils import LORA_FILE, lora_weights, write_lora

PROMPTS = ["a red circle", 'a <script>alert(1)</script> & "b"', "a green heart"]
TASTE = """
import numpy

def light(image, prompt):
    assert prompt in PROMPTS
    return float(numpy.mean(image))

def contrast(image, prompt):
    return float(numpy.std(image))
"""


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_lora(folder / LORA_FILE, lora_weights(random_lora(build_pipeline().unet)))
    return folder


@pytest.fixture
def judged(tiny_model, lora_dir, tmp_path):
    """Runs the program with small settings; returns its folder."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    taste = tmp_path / "taste.py"
    taste.write_text(f"PROMPTS = {PROMPTS}\n{TASTE}")

    def run(output="out", **options):
        defaults = {
            "base": tiny_model, "lora": lora_dir, "prompts": tmp_path / "prompts.txt", "num_inference_steps": 2,
            "scorers": [f"{taste}:light", f"{taste}:contrast"], "scales": [1, 0.5], "output_dir": tmp_path / output,
        }  # fmt: skip
        argv = []
        for name, value in {**defaults, **options}.items():
            if value is not None:
                argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        judge_lora.main(argv)
        return tmp_path / output

    return run


@pytest.fixture
def refused(judged, capsys):
    def run(**options):
        with pytest.raises(SystemExit) as stop:
            judged(**options)
        *_, usage, message = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and usage.startswith("usage: ")
        return message.split(": error: ", 1)[1]

    return run


def pixels(folder, scale, i):
    return np.asarray(Image.open(folder / "images" / f"scale-{scale}" / f"{i:05}.png"), dtype=float)


def test_the_same_prompts_and_seeds_at_each_scale_are_scored(judged, tiny_model, lora_dir, capsys):
    folder = judged()
    figures = json.loads((folder / "judge.json").read_text())
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(lora_dir, adapter_name="it")
    for scale in (0, 0.5, 1):
        pipeline.set_adapters("it", scale)
        for i in range(6):
            generator = torch.Generator().manual_seed(judge_lora.SEED + i)
            sample = pipeline(PROMPTS[i // 2], num_inference_steps=2, generator=generator).images[0]
            assert np.abs(pixels(folder, f"{scale:g}", i) - np.asarray(sample, dtype=float)).max() <= 1
    means = {f"{s:g}": [pixels(folder, f"{s:g}", i).mean() for i in range(6)] for s in (0, 0.5, 1)}
    for scale, row in figures["scorers"]["light"].items():
        assert row["mean"] == pytest.approx(np.mean(means[scale]))
        assert row["gain"] == pytest.approx(np.mean(np.subtract(means[scale], means["0"])))
        assert row["win_rate"] == pytest.approx(np.mean(np.sign(np.subtract(means[scale], means["0"])) / 2 + 0.5))
    assert figures["scales"] == [0, 0.5, 1] and figures["recommended_scale"] in (0, 0.5, 1)
    assert figures["scorers"]["light"]["1"]["gain"] != 0
    table = (folder / "judge.md").read_text()
    assert table in capsys.readouterr().out and "Scorers run: light, contrast." in table and "| light | 0.5 |" in table


def test_a_run_that_was_stopped_goes_on_and_ends_alike(judged, monkeypatch):
    whole, sampled = judged("whole"), []
    original = judge_lora.sample_pictures

    def sample(pipeline, prompts, seeds, **options):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.append(seeds)
        return original(pipeline, prompts, seeds, **options)

    monkeypatch.setattr(judge_lora, "sample_pictures", sample)
    with pytest.raises(KeyboardInterrupt):
        judged("stopped")
    (judged_files := sorted((whole.parent / "stopped" / "images").rglob("*.png")))[
        0
    ].unlink()  # one of the first batch
    monkeypatch.setattr(judge_lora, "sample_pictures", original)
    stopped = judged("stopped")
    assert len(judged_files) == 10 and len(list((stopped / "images").rglob("*.png"))) == 18
    assert not list(stopped.rglob("*.partial"))
    for name in ("judge.json", "judge.md"):
        assert (stopped / name).read_text() == (whole / name).read_text()
    monkeypatch.setattr(judge_lora, "sample_pictures", None)  # what is there is not sampled again
    judged("stopped", scorers=[f"{whole.parent / 'taste.py'}:contrast"], max_loss=1)


def test_sdxl(judged, tmp_path):
    build_sdxl_pipeline().save_pretrained(tmp_path / "xl")
    write_lora(tmp_path / "xl.safetensors", lora_weights(random_lora(build_sdxl_pipeline().unet)))
    figures = json.loads((judged(base=tmp_path / "xl", lora=tmp_path / "xl.safetensors") / "judge.json").read_text())
    assert abs(figures["scorers"]["light"]["1"]["gain"]) > 0.1 and figures["diversity"]["0"] > 0.01


def test_a_lora_of_zeros_gains_nothing(judged, lora_dir, tmp_path):
    zeros = {name: torch.zeros_like(value) for name, value in lora_weights(random_lora(build_pipeline().unet)).items()}
    write_lora(tmp_path / "zeros.safetensors", zeros)
    figures = json.loads((judged(lora=tmp_path / "zeros.safetensors") / "judge.json").read_text())
    assert figures["recommended_scale"] == 0 and figures["reason"].startswith("Do not use this LoRA")
    for row in figures["scorers"]["light"].values():
        assert (row["win_rate"], row["p"], row["gain"]) == (0.5, 1.0, 0.0)


def test_the_page_needs_nothing_else_and_prompts_are_text(judged):
    text = (judged() / "judge.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;b&quot;" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert text.count("data:image/jpeg;base64,") == 6 * 3 and "<svg" in text
    assert text.index("Worst losses") < text.index("</html>") and len(text) < 1e6


def test_worst_losses_come_first(judged):
    folder = judged()
    text, figures = (folder / "judge.html").read_text(), json.loads((folder / "judge.json").read_text())
    scale = f"{figures['recommended_scale'] or 1:g}"
    gains = [pixels(folder, scale, i).mean() - pixels(folder, "0", i).mean() for i in range(6)]
    shown = [int(number) for number in re.findall(r"<small>\(picture (\d)\)", text)]
    assert shown == [int(i) % 2 + 1 for i in np.argsort(gains)]


# Statistics


def test_sign_test_and_intervals_worked_by_hand():
    assert judge_lora.sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert judge_lora.sign_test(0, 5) == 2 / 2**5 and judge_lora.sign_test(3, 3) == judge_lora.sign_test(0, 0) == 1
    assert judge_lora.wilson_interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert judge_lora.wilson_interval(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-3)
    base, scores = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.nan]]), np.array([[2.0, 2.0], [2.0, 6.0], [9.0, 7.0]])
    result = judge_lora.compare(scores, base)
    assert (result["gain"], result["win_rate"], result["pictures"]) == ((1 + 0 - 1 + 2 + 4) / 5, 3.5 / 5, 5)
    assert result["p"] == judge_lora.sign_test(3, 1)
    with pytest.raises(ValueError, match="finite"):
        judge_lora.compare(base * np.nan, base)


def test_intervals_hold_what_they_promise_and_see_that_pictures_of_a_prompt_agree():
    """95 of 100 intervals hold the true mean, 0, although the 8 pictures of a prompt share most of their deviation."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = judge_lora.interval(rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 8)))
        held += low <= 0 <= high
    assert 0.9 <= held / 200 <= 0.98


def test_diversity_is_the_distance_within_a_prompt():
    thumbnails = np.zeros((2, 2, 768))
    thumbnails[0, 1], thumbnails[1] = 0.5, 1.0
    assert judge_lora.diversity(thumbnails) == 0.25 and judge_lora.diversity(thumbnails[:, :1]) is None


def scores_of(*gains):
    """Scores of 50 prompts and 2 pictures at scales 0, 0.5 and 1, of standard deviation 1, with these mean gains."""
    rng = np.random.default_rng(1)
    base, *noise = rng.normal(size=(3, 50, 2))
    noise = [0.01 * (x - x.mean()) for x in noise]
    return np.stack([base / base.std(), *(base / base.std() + gain + x for gain, x in zip(gains, noise, strict=True))])


@pytest.mark.parametrize(
    ("wanted", "guard", "expected", "said"),
    [
        ((0.3, 0.6), (0, 0), 1.0, "gains 0.6"),
        ((0.3, 0.301), (0, 0), 0.5, "not significantly less"),
        ((0.3, 0.6), (0, -0.5), 0.5, "at 1 guard by 0.50"),
        ((0.3, 0.6), (-0.3, -0.5), 0.5, "costs the least"),
        ((-0.1, 0.0), (0, 0), 0.0, "Do not use"),
        ((-0.1, 0.4), (0, -0.3), 1.0, "costs the least"),
    ],
)  # fmt: skip
def test_the_recommended_scale(wanted, guard, expected, said):
    scores = {"wanted": scores_of(*wanted), "guard": scores_of(*guard)}
    scale, reason = judge_lora.recommend(scores, [0.0, 0.5, 1.0], ["wanted", "guard"], 0.2)
    assert scale == expected and said in reason and ("guard by" in reason) == (min(guard) < -0.2)


# Refusals


def test_bad_input_is_refused_before_weights_load(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_lora, "load_pipeline", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for options in (
        {"scorers": None}, {"base": "no/such/model"}, {"base": tmp_path}, {"lora": tmp_path}, {"prompts": "nothing"},
        {"scorers": ["beauty"]}, {"scorers": ["taste.py:none"]}, {"scales": [0]}, {"scales": [-1]}, {"max_loss": -1},
        {"num_images_per_prompt": 0}, {"output_dir": tmp_path / "full"},
        {"output_dir": tmp_path / "prompts.txt" / "x"},
    ):  # fmt: skip
        assert f"--{next(iter(options))}" in refused(**options)


def test_pictures_with_other_settings_are_not_mixed(judged, refused, lora_dir, tmp_path):
    folder = judged()
    assert "--guidance_scale" in refused(guidance_scale=3) and "--prompts" in refused(max_prompts=2)
    (tmp_path / "other").mkdir()
    weights = lora_weights(random_lora(build_pipeline().unet))
    before = (lora_dir / LORA_FILE).read_bytes()
    write_lora(lora_dir / LORA_FILE, {name: value * 2 for name, value in weights.items()})
    try:
        assert "--lora" in refused()
    finally:
        (lora_dir / LORA_FILE).write_bytes(before)
    assert (folder / "judge.html").exists()
