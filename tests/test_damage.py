"""The meter of damage: drawings are near themselves, spoilt pictures are far, and farther the more they are spoilt."""

import json

import damage
import evaluate
import make_pairs
import numpy as np
import pytest
import small_world
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from test_small_world import MODEL

from training_utils import LORA_FILE

CAPTIONS = small_world.CAPTIONS


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    looks = [small_world.random_look(rng) for _ in CAPTIONS]
    return np.stack([small_world.draw(*pair) for pair in zip(CAPTIONS, looks, strict=True)]), looks


def test_a_drawing_is_found_again(drawn):
    """To a third of a grey level, its rounding; size and edge, too."""
    pictures, looks = drawn
    fit = damage.fit_drawings(pictures, CAPTIONS)
    assert fit.distance.max() < 0.002 and fit.drawings.shape == pictures.shape
    np.testing.assert_allclose(fit.area, [look.area for look in looks], rtol=0.01)
    np.testing.assert_allclose(fit.edge_width, [look.edge_width for look in looks], rtol=0.05)
    assert np.abs(fit.drawings - pictures / 255).max() < 0.1


def blurred(pictures, radius):
    return np.stack([Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)) for picture in pictures])


def noisy(pictures, level):
    noise = np.random.default_rng(1).normal(size=pictures.shape)
    return np.clip(pictures + level * noise, 0, 255).astype(np.uint8)


def shifted(pictures, level):
    return np.clip(pictures + np.array([level, 0, -level]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "levels"),
    [(blurred, (1, 2, 4)), (noisy, (3, 8, 20)), (shifted, (6, 15, 40))],
)  # fmt: skip
def test_what_spoils_pictures_raises_the_distance_in_order(drawn, spoil, levels):
    pictures, captions = drawn[0][::4], CAPTIONS[::4]
    distances = [damage.fit_drawings(pictures, captions).distance.mean()]
    distances += [damage.fit_drawings(spoil(pictures, level), captions).distance.mean() for level in levels]
    assert all(high > 1.4 * low for low, high in zip(distances, distances[1:], strict=False)), distances


def test_another_caption_is_far(drawn):
    others = [CAPTIONS[(i + 1) % len(CAPTIONS)] for i in range(len(CAPTIONS))]  # another shape, now and then colour
    near, far = (damage.fit_drawings(drawn[0], captions).distance for captions in (CAPTIONS, others))
    assert far.min() > 5 * near.max()


def test_pictures_are_compared_at_the_same_size_and_edge():
    """Distances that grow with size and sharpness as the base model's do are no damage; all doubled are."""
    area, width = np.array([0.1, 0.2, 0.3]), np.array([2.0, 4.0, 8.0])

    def looks(area, width):
        distance = 1 + damage.SIZE_SLOPE * np.sqrt(area) + damage.EDGE_SLOPE * np.log(width)
        return damage.Fit(distance, area, width, None)

    small, large, sharp = looks(area, width), looks(2 * area, width), looks(area, width / 2)
    assert large.distance.mean() > small.distance.mean() and sharp.distance.mean() > small.distance.mean()
    for other in (large, sharp):
        assert damage.distance_ratio(other, small) == pytest.approx(1)
        assert damage.distance_ratio(other._replace(distance=2 * other.distance), small) == pytest.approx(2)


def test_blur_is_damage_although_soft_drawings_exist(drawn):
    """The fit follows a little blur; the loss of sharpness does not let it pass. Sharper edges are no damage."""
    pictures, captions = drawn[0][::4], CAPTIONS[::4]
    base, blur = (evaluate.look_at(x, captions) for x in (pictures, blurred(pictures, 1)))
    soft = evaluate.compare_looks(blur, base, "area")
    assert soft["damage"] >= 2 - soft["sharpness_ratio"] > 1.05
    same = evaluate.compare_looks(base, base, "area")
    assert same["damage"] == same["distance_ratio"] == same["sharpness_ratio"] == 1
    assert same["gain"] == same["drift_tone"] == 0 and same["win_rate"] == 0.5
    back = evaluate.compare_looks(base, blur, "sharpness")
    assert back["damage"] < 1 and back["gain"] > 0.05 and back["win_rate"] > 0.9


def result(gain, damage):
    return {"gain": gain, "damage": damage}


def test_the_recommended_scale_gains_most_within_the_limit():
    results = {0.25: result(0.1, 1.01), 0.5: result(0.2, 1.05), 0.75: result(0.3, 1.051), 1.0: result(0.4, 1.0)}
    assert evaluate.recommend(results) == 0.5
    assert evaluate.recommend({0.25: result(-0.1, 0.9), 0.5: result(0.2, 1.2)}) == 0.0
    assert evaluate.recommend({0.25: result(0.1, 1.2)}) == 0.0


def test_a_lora_that_does_not_fit_is_refused_before_anything_is_sampled_or_written(tmp_path, monkeypatch, capsys):
    """diffusers leaves it out silently: every scale was like the base model."""
    monkeypatch.setattr(evaluate, "sample_scales", lambda *_: pytest.fail("it was sampled"))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"unet.{name}.lora_A.weight": torch.zeros(4, 64), f"unet.{name}.lora_B.weight": torch.zeros(64, 4)}
    weights |= {key.replace("down", "no"): value.clone() for key, value in weights.items()}
    save_file(weights, tmp_path / LORA_FILE)
    argv = ["--model", MODEL, "--preference", "tone", "--lora", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.parse_args(argv))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"--lora {tmp_path}: of its 2 modules 1 fit" in line
    assert not (tmp_path / "out").exists()


def test_the_evaluation_of_a_lora(train, tmp_path, capsys):
    """A LoRA that has hardly moved: every scale is like the base model, and the picture has a row for each label."""
    pairs = tmp_path / "pairs"
    quick = ["--num_inference_steps", "2", "--model", MODEL, "--preference", "tone"]
    make_pairs.main(make_pairs.parse_args([*quick, "--output_dir", str(pairs), "--num_pairs", "8"]))
    lora = train(
        pretrained_model_name_or_path=MODEL, train_data_dir=pairs, resolution=64, max_train_steps=1,
        train_batch_size=2, learning_rate=1e-7, objective="diffusion_dpo",
    )  # fmt: skip
    argv = [*quick, "--lora", str(lora), "--output_dir", str(tmp_path / "judged"), "--num_images", "6"]
    evaluate.main(evaluate.parse_args(argv))
    record = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert list(record["scales"]) == ["0", "0.125", "0.25", "0.375", "0.5", "0.75", "1"]
    assert all(abs(found["damage"] - 1) < 0.05 and abs(found["gain"]) < 0.01 for found in record["scales"].values())
    shown = {0, 0.5, 1, record["recommended_scale"]}
    assert Image.open(tmp_path / "judged" / "before_after.png").height == 116 + 134 * len(shown)
    printed = capsys.readouterr().out
    assert "scale" in printed and str(tmp_path / "judged" / "before_after.png") in printed
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.parse_args(argv))
