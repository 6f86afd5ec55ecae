"""examples/scorers.py and prompt_sources.py: what a scorer returns, and which prompts a name stands for."""

import sys
import types

import numpy as np
import prompt_sources
import pytest
import scorers
import small_world
import torch
from conftest import build_parts, random_image, write_parquet
from huggingface_hub import HfApi, constants
from PIL import Image
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

PROMPTS = ["a red circle", "a blue square", "a green heart"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [random_image(rng, size) for size in ((40, 32), (32, 40), (64, 64))]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Folder of a CLIP with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    parts, text_config, _ = build_parts()
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    config = CLIPConfig(
        text_config={**text_config, "projection_dim": 8}, projection_dim=8,
        vision_config={**vision, "patch_size": 8, "projection_dim": 8},
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), parts["tokenizer"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["pickscore", "clip"])
def test_clip_scores_are_scaled_cosines(tiny_clip, images, name):
    """Worked out picture by picture from the two embeddings; a batch changes nothing."""
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        with torch.no_grad():
            vision = model.vision_model(pixel_values=inputs.pixel_values).pooler_output
            text = model.text_model(inputs.input_ids).pooler_output
            vision, text = model.visual_projection(vision)[0], model.text_projection(text)[0]
        expected.append(float(torch.cosine_similarity(vision, text, dim=0)))
    scale = model.logit_scale.exp().item() if name == "pickscore" else 100
    scorer = scorers.load_scorer(f"{name}={tiny_clip}", batch_size=2)
    scores = scorer.score(images, PROMPTS)
    assert scorer.name == name and scores.dtype == np.float64
    np.testing.assert_allclose(scores, scale * np.array(expected), rtol=1e-4)
    assert np.ptp(scores) > 0.1


def test_functions_in_a_file_get_a_picture_and_its_prompt():
    file, look = small_world.__file__, small_world.random_look(np.random.default_rng(0))
    drawn = [Image.fromarray(small_world.draw("a red circle", look._replace(area=area))) for area in (0.1, 0.3)]
    scorer = scorers.load_scorer(f"{file}:area")
    assert scorer.name == "area"
    assert scorer.score(drawn, ["a red circle"] * 2) == pytest.approx([0.1, 0.3], abs=0.02)
    obeyed = scorers.load_scorer(f"{file}:follows_caption").score(drawn, ["a red circle", "a blue star"])
    assert obeyed.tolist() == [1.0, 0.0]


def test_brisque_is_negated_and_needs_its_package(monkeypatch, images):
    """A stand-in for the package, which returns one feature as an array; the real one is not a requirement."""

    class BRISQUE:
        def __init__(self, url):
            assert url is False

        def calculate_brisque_features(self, image):
            return [image.mean(), np.array([1.0])]

        def score(self, image):
            return sum(float(feature) for feature in self.calculate_brisque_features(image))

    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        scorers.check_scorer("brisque")
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "brisque", types.SimpleNamespace(BRISQUE=BRISQUE))
    scores = scorers.load_scorer("brisque").score(images, PROMPTS)
    assert scores == pytest.approx([-np.asarray(image).mean() - 1 for image in images])


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("beauty", "pickscore, clip, brisque"), ("clip", "cannot be loaded"), ("pickscore=.", "cannot be loaded"),
        ("no/such/file.py:area", "no file"), ("pyproject.toml:x", "no scorer"),
        (f"{small_world.__file__}:draws", "draws"), (f"{small_world.__file__}:SIZE", "SIZE"),
        (f"{small_world.__file__}:random_look", "argument"), ("broken.py:score", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_is_no_scorer_is_refused_in_one_line(spec, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=named.replace(".", r"\.")) as problem:
        scorers.check_scorer(spec)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["parti", "hpdv2", "some/data:text"])
def test_without_a_network_prompts_of_the_hub_fail_at_once(name, monkeypatch):
    """Half a minute of retries came before the message."""
    asked = []

    def no_network(_, repo, repo_type, **__):
        asked.append((repo, repo_type))
        raise ConnectionError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", no_network)
    with pytest.raises(ValueError, match=f"--prompts {name}: cannot be read: "):
        prompt_sources.read_prompts(name)
    assert constants.HF_HUB_OFFLINE and {kind for _, kind in asked} == {"dataset"}


def test_prompts_are_lines_names_and_columns(tmp_path):
    (tmp_path / "mine.txt").write_text("\ufeffa cat\n\n  two   dogs \na cat\n", encoding="utf-8")
    assert prompt_sources.read_prompts(tmp_path / "mine.txt") == ["a cat", "two dogs", "a cat"]
    assert prompt_sources.read_prompts(str(tmp_path / "mine.txt"), 1) == ["a cat"]
    assert prompt_sources.read_prompts("small_world") == small_world.HELD_OUT_CAPTIONS
    assert prompt_sources.read_prompts("small_world_training") == small_world.TRAINING_CAPTIONS
    folder = write_parquet([{"text": text} for text in ("a", "b", "a", None)], tmp_path / "data")
    assert prompt_sources.read_prompts(f"{folder}:text") == ["a", "b"]
    for name in ("everyday", "people", "composition"):
        prompts = prompt_sources.read_prompts(name)
        assert len(prompts) == len(set(prompts)) >= 20


def test_what_was_meant_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "data").mkdir()
    for spec, meant in (
        ("promts.txt", "prompts.txt"), (f"{tmp_path}/promts.txt", f"{tmp_path}/prompts.txt"),
        ("everyda", "everyday"), (f"{tmp_path}/dat:text", f"{tmp_path}/data"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"did you mean {meant}\\?"):
            prompt_sources.read_prompts(spec)
    (tmp_path / "prompts.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match="Latin-1"):
        prompt_sources.read_prompts("prompts.txt")
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_: pytest.fail("it was looked for on the Hub"))
    with pytest.raises(ValueError, match=f"did you mean {tmp_path}/data\\?"):
        scorers.check_scorer(f"clip={tmp_path}/dtaa")


@pytest.mark.parametrize("spec", ["nothing.txt", "empty.txt", "bytes.txt", "data:nothing", "no/such:text", "parti"])
def test_prompts_that_cannot_be_read_are_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    write_parquet([{"text": "a"}], tmp_path / "data")
    with pytest.raises(ValueError, match=f"^--prompts {spec}: "):
        prompt_sources.read_prompts(spec)
