"""examples/judge_lora.py: how good LoRAs are, which one is best, and at which scale to use it."""

import json
import re
import shlex
import shutil

import convert_lora
import judge_lora
import numpy as np
import pytest
import torch
from conftest import build_pipeline, build_sdxl_pipeline, write_json
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from scorers import Scorer
from test_lora import random_lora

from training_utils import LORA_FILE, METRICS_FILE, lora_weights, write_lora

PROMPTS = ["a red circle", 'a <script>alert(1)</script> & "b"', "a green heart"]
TASTE = """
import numpy

def light(image, prompt):
    assert prompt in PROMPTS
    return float(numpy.mean(image))

def contrast(image, prompt):
    return float(numpy.std(image))
"""


def write_loras(folder, strengths, build=build_pipeline):
    """Folders of LoRAs, by name, of this strength each."""
    weights = lora_weights(random_lora(build().unet))
    for name, strength in strengths.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        scaled = convert_lora.scaled(weights, strength)
        write_lora(folder / name / LORA_FILE, scaled, "unet")
    return [folder / name for name in strengths]


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory):
    return write_loras(tmp_path_factory.mktemp("lora"), {"taste": 1})[0]


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
        judge_lora.main(*judge_lora.parse_args(argv))
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


def pixels(folder, scale, i, lora="taste"):
    lora = lora if float(scale) else "base"
    return np.asarray(Image.open(folder / "images" / lora / f"scale-{scale}" / f"{i:05}.png"), dtype=float)


def figures_of(folder):
    """What judge.json holds, and its results by LoRA and scale."""
    figures = json.loads((folder / "judge.json").read_text())
    return figures, {(row["lora"], row["scale"]): row for row in figures["results"]}


def never_sampled(*args, **options):
    pytest.fail("what is there was sampled again")


def test_the_same_prompts_and_seeds_at_each_scale_are_scored(judged, tiny_model, lora_dir, capsys):
    folder = judged()
    figures, results = figures_of(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(lora_dir, adapter_name="it")
    for scale in (0, 0.5, 1):
        pipeline.set_adapters("it", scale)
        for i in range(6):
            generator = torch.Generator().manual_seed(judge_lora.SEED + i)
            sample = pipeline(PROMPTS[i // 2], num_inference_steps=2, generator=generator).images[0]
            assert np.abs(pixels(folder, f"{scale:g}", i) - np.asarray(sample, dtype=float)).max() <= 1
    means = {s: [pixels(folder, f"{s:g}", i).mean() for i in range(6)] for s in (0, 0.5, 1)}
    for (_, scale), result in results.items():
        row = result["scorers"]["light"]
        assert row["mean"] == pytest.approx(np.mean(means[scale]))
        assert row["gain"] == pytest.approx(np.mean(np.subtract(means[scale], means[0])))
        assert row["win_rate"] == pytest.approx(np.mean(np.sign(np.subtract(means[scale], means[0])) / 2 + 0.5))
    assert figures["scales"] == [0, 0.5, 1] and list(results) == [(None, 0), ("taste", 0.5), ("taste", 1)]
    assert results["taste", 1]["scorers"]["light"]["gain"] != 0 == results[None, 0]["change"]
    table = (folder / "judge.md").read_text()
    assert table in capsys.readouterr().out and "Scorers run: light, contrast." in table
    assert "| light | taste | 0.5 |" in table


def test_several_loras_share_the_base_models_pictures(judged, tmp_path, monkeypatch):
    """One command for two LoRAs samples and says what two commands for one LoRA each do, but the base model once."""
    loras = write_loras(tmp_path, {"run/checkpoint-1": 0.5, "run": 1}), []
    original = judge_lora.sample_pictures

    def sample(pipeline, prompts, seeds, **options):
        loras[1].extend(seeds)
        return original(pipeline, prompts, seeds, **options)

    monkeypatch.setattr(judge_lora, "sample_pictures", sample)
    folder = judged("both", lora=loras[0])
    assert len(loras[1]) == len(list((folder / "images").rglob("*.png"))) == 6 * (1 + 2 * 2)
    _, results = figures_of(folder)
    for lora in loras[0]:
        _, alone = figures_of(judged(f"only-{lora.name}", lora=lora))
        for (name, scale), row in alone.items():
            assert results[name, scale] == row
    assert {name for name, _ in results} == {None, "checkpoint-1", "run"}
    text = (folder / "judge.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 6 * 2 * 3 and "checkpoint-1 at 0.5" in text


def test_a_lora_is_added_without_sampling_anything_twice(judged, tmp_path, monkeypatch):
    first, second = write_loras(tmp_path, {"a/checkpoint-1": 1, "b/checkpoint-1": 0.5})
    folder, sampled = judged(lora=first), []
    original = judge_lora.sample_pictures
    monkeypatch.setattr(
        judge_lora, "sample_pictures", lambda *args, **o: sampled.append(args[2]) or original(*args, **o)
    )
    judged(lora=[second, first])
    assert sum(map(len, sampled)) == 6 * 2
    assert {path.name for path in (folder / "images").iterdir()} == {"base", "checkpoint-1", "b-checkpoint-1"}
    figures, results = figures_of(folder)
    assert figures["loras"] == {"b-checkpoint-1": str(second), "checkpoint-1": str(first)}
    monkeypatch.setattr(judge_lora, "sample_pictures", never_sampled)
    judged(lora=first)
    assert all(results[key] == row for key, row in figures_of(folder)[1].items())
    assert pixels(folder, 1, 0, "checkpoint-1").tolist() != pixels(folder, 1, 0, "b-checkpoint-1").tolist()


def test_equal_loras_are_judged_once(judged, tmp_path, capsys):
    """As those of a run and its last checkpoint are; the run may hold the file for other programs, too."""
    loras = write_loras(tmp_path, {"run/checkpoint-2": 1, "run": 1})
    (loras[1] / "pytorch_lora_weights_kohya.safetensors").write_bytes(b"")
    folder = judged(lora=loras)
    assert "judged once" in capsys.readouterr().err and list(figures_of(folder)[0]["loras"]) == ["checkpoint-2"]


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
    write_lora(tmp_path / "taste.safetensors", lora_weights(random_lora(build_sdxl_pipeline().unet)), "unet")
    _, results = figures_of(judged(base=tmp_path / "xl", lora=tmp_path / "taste.safetensors"))
    assert abs(results["taste", 1]["scorers"]["light"]["gain"]) > 0.1 and results[None, 0]["diversity"] > 0.01


def test_a_lora_of_zeros_gains_nothing(judged, tmp_path):
    (zeros,) = write_loras(tmp_path, {"zeros": 0})
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:1] * 10))
    figures, results = figures_of(judged(lora=zeros, num_images_per_prompt=1))
    assert (figures["recommended_lora"], figures["recommended_scale"]) == (None, 0)
    for row in results.values():
        assert [row["scorers"]["light"][name] for name in ("win_rate", "p", "gain")] == [0.5, 1.0, 0.0]
        assert row["change"] == 0


def test_what_it_prints_uses_the_lora_at_that_scale(judged, tiny_model, tmp_path, monkeypatch, capsys):
    """Both the lines for diffusers and the command that writes a file, whose scale 1 it is."""
    loras = write_loras(tmp_path, {"run": 1, "run/checkpoint 1": 0.5})
    monkeypatch.setattr(judge_lora, "recommend", lambda scores, columns, *_: (columns.index(("run", 0.5)), "so"))
    monkeypatch.chdir(tmp_path)
    folder = judged(lora=loras)
    (figures, _), out = figures_of(folder), capsys.readouterr().out
    assert (figures["recommended_lora"], figures["recommended_scale"]) == ("run", 0.5)
    assert "Recommended: run at scale 0.5" in (folder / "judge.html").read_text()
    (command,) = [line for line in out.splitlines() if "convert_lora.py" in line]
    convert_lora.main(*convert_lora.parse_args(shlex.split(command)[2:]))
    at_half, converted = (StableDiffusionPipeline.from_pretrained(tiny_model) for _ in range(2))
    code = [line.strip() for line in out.splitlines() if line.startswith("    pipe.")]
    exec("\n".join(code), {"pipe": at_half})
    converted.load_lora_weights("run-0.5.safetensors")
    samples = [
        pipe("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (at_half, converted)
    ]
    assert np.abs(samples[0] - samples[1]).max() < 1e-4


def test_what_the_model_predicts_and_the_variant_of_its_files_can_be_said(judged, refused, tiny_model, tmp_path):
    build_pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    line = refused(base=tmp_path / "half")
    assert f"--base {tmp_path / 'half'}: " in line and "--variant fp16" in line
    model = shutil.copytree(tiny_model, tmp_path / "v")
    write_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    folders = [
        judged("1", base=model), judged("2", base=tmp_path / "half", variant="fp16", prediction_type="v_prediction"),
        judged("3", base=tmp_path / "half", variant="fp16"),
    ]  # fmt: skip
    first, second, other = (pixels(folder, 0, 0) for folder in folders)
    assert (first == second).all() and (first != other).any()
    assert "--prediction_type" in refused(
        output="3", base=tmp_path / "half", variant="fp16", prediction_type="epsilon"
    )


def test_one_prompt_has_no_interval_and_no_recommendation(judged, tmp_path):
    folder = judged(max_prompts=1)
    figures, results = figures_of(folder)
    assert figures["recommended_scale"] is figures["recommended_lora"] is None and "prompts" in figures["reason"]
    assert results["taste", 1]["scorers"]["light"]["gain_interval"] == [None, None]  # rather than of width zero
    assert "No recommendation" in (folder / "judge.md").read_text() and "nan" not in (folder / "judge.md").read_text()


def test_the_page_shows_the_run_that_made_the_lora(judged, tmp_path):
    loras = write_loras(tmp_path, {"run": 1, "run/checkpoint-1": 0.5, "other": 2})
    for step in (1, 2):
        row = {"step": step, "loss": 0.5, "policy_error": 0.1, "reference_error": 0.2}
        with (loras[0] / METRICS_FILE).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    text = (judged(lora=loras) / "judge.html").read_text()
    assert text.count("Training run run") == 1 and text.count("<svg") == 2 and "Training run other" not in text


def test_a_report_by_other_scorers_is_kept(judged, tmp_path, capsys):
    folder = judged()
    judged()
    assert not list(folder.glob("judge-1.*"))
    before = {file.suffix: file.read_bytes() for file in folder.glob("judge.*")}
    capsys.readouterr()
    judged(scorers=[f"{tmp_path / 'taste.py'}:contrast"])
    assert "judge-1.html" in capsys.readouterr().out and figures_of(folder)[0]["scorers"] == ["contrast"]
    assert {file.suffix: file.read_bytes() for file in folder.glob("judge-1.*")} == before


def test_the_page_needs_nothing_else_and_prompts_are_text(judged):
    text = (judged() / "judge.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;b&quot;" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert text.count("data:image/jpeg;base64,") == 6 * 3 and "<svg" in text
    assert text.index("Lowest gains") < text.index("</html>") and len(text) < 1e6


def test_lowest_gains_come_first(judged):
    folder = judged()
    text, (_, results) = (folder / "judge.html").read_text(), figures_of(folder)
    gain = {scale: results["taste", scale]["scorers"]["light"]["gain"] for scale in (0.5, 1)}
    scale = max(gain, key=gain.get)
    gains = [pixels(folder, f"{scale:g}", i).mean() - pixels(folder, "0", i).mean() for i in range(6)]
    shown = [int(number) for number in re.findall(r"<small>\(picture (\d)\)", text)]
    assert shown == [int(i) % 2 + 1 for i in np.argsort(gains)]
    assert f"Of 6 pictures of taste at {scale:g}, {sum(gain < 0 for gain in gains)} have lost" in text


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
    assert np.isnan(judge_lora.interval(rng.normal(size=(1, 8)))).all()  # one prompt says nothing of others
    for _ in range(200):
        low, high = judge_lora.interval(rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 8)))
        held += low <= 0 <= high
    assert 0.9 <= held / 200 <= 0.98


def test_diversity_is_the_distance_within_a_prompt():
    thumbnails = np.zeros((2, 2, 768))
    thumbnails[0, 1], thumbnails[1] = 0.5, 1.0
    assert judge_lora.diversity(thumbnails) == 0.25 and judge_lora.diversity(thumbnails[:, :1]) is None


def scores_of(*gains, prompts=50):
    """Scores of 2 pictures of each prompt: the base model's, of standard deviation 1, and others with these gains."""
    rng = np.random.default_rng(1)
    base, *noise = rng.normal(size=(1 + len(gains), prompts, 2))
    noise = [0.01 * (x - x.mean()) for x in noise]
    return np.stack([base / base.std(), *(base / base.std() + gain + x for gain, x in zip(gains, noise, strict=True))])


def column(text):
    lora, _, scale = text.rpartition(" ")
    return judge_lora.Column(lora, float(scale))


ONE, CHANGE = ["a 0.5", "a 1", "a 2"], [0, 0.1, 0.2, 0.4]
TWO = ["a 1", "a 2", "b 0.5", "b 1"]


@pytest.mark.parametrize(
    ("columns", "change", "wanted", "guard", "expected", "said"),
    [
        (ONE, CHANGE, (0.3, 0.6, 0.6), (0, 0, -1), "a 1", "gains 0.6"),
        (ONE, CHANGE, (0.3, 0.301, 0.2), (0, 0, 0), "a 0.5", "not significantly less"),
        (ONE, CHANGE, (0.3, 0.6, 0.9), (0, -0.5, -1), "a 0.5", "a at 1 (guard by 0.50)"),
        (ONE, CHANGE, (0.3, 0.6, 0.9), (-0.3, -0.5, -1), "a 0.5", "changes the pictures least"),
        (ONE, CHANGE, (-0.1, 0.0, 0.0), (0, 0, 0), 0, "no LoRA"),
        (ONE, CHANGE, (-0.1, -0.1, 0.4), (0, 0, -0.3), "a 2", "changes the pictures least"),
        (ONE, CHANGE, (0.3, 0.6, 0.9), (0, 0, 0), None, "highest scale"),
        # Of two LoRAs a weak one at a high scale may change less than a strong one at a low scale.
        (TWO, [0, 0.1, 0.2, 0.15, 0.3], (0.5, 0.1, 0.501, 0.2), (0,) * 4, "a 1", "not significantly less"),
        (TWO, [0, 0.2, 0.3, 0.15, 0.3], (0.5, 0.1, 0.499, 0.2), (0,) * 4, "b 0.5", "not significantly less"),
        (TWO, [0, 0.1, 0.2, 0.15, 0.3], (0.5, 0.1, 0.7, 0.2), (0,) * 4, "b 0.5", "b at 0.5 gains 0.7"),
        (TWO, [0, 0.1, 0.2, 0.15, 0.3], (0.5, 0.1, 0.7, 0.2), (0, 0, -0.3, 0), "a 1", "b at 0.5 (guard by 0.30)"),
        (TWO, [0, 0.1, 0.2, 0.15, 0.3], (0.3, 0.1, 0.5, 0.6), (0,) * 4, None, "b at 1 gains 0.6"),
    ],
)  # fmt: skip
def test_what_is_recommended(columns, change, wanted, guard, expected, said):
    scores = {"wanted": scores_of(*wanted), "guard": scores_of(*guard)}
    columns = [judge_lora.BASE, *map(column, columns)]
    chosen, reason = judge_lora.recommend(scores, columns, change, 0.2)
    assert (columns[chosen] if chosen else chosen) == (column(expected) if isinstance(expected, str) else expected)
    assert said in reason and ("guard by" in reason) == (min(guard) < -0.2)


@pytest.mark.parametrize("missing", ["guard", "prompts"])
def test_what_is_not_recommended(missing):
    scores = {name: scores_of(*gains, prompts=9 if missing == "prompts" else 10)
              for name, gains in (("wanted", (0.3, 0.6, 0.4)), ("guard", (0, 0, 0)))}  # fmt: skip
    if missing == "guard":
        del scores["guard"]
    chosen, reason = judge_lora.recommend(scores, [judge_lora.BASE, *map(column, ONE)], CHANGE, 0.2)
    assert chosen is None and missing in reason


def test_diversity_that_falls_is_said():
    """Here the pictures of a prompt become one."""
    rng, prompts = np.random.default_rng(0), [str(i // 2) for i in range(40)]
    shades = rng.integers(0, 99, size=40)

    def picture(c, i):
        shade = shades[i] if c == 0 else 100 + shades[i // 2 * 2] if c == 1 else 0
        return Image.new("RGB", (16, 16), (int(shade),) * 3)

    def scorer(name, score):
        return Scorer(name, lambda images, prompts: np.array([score(np.asarray(x)) for x in images]))

    scorers = [scorer("light", np.mean), scorer("even", lambda x: 1.0)]
    figures, _ = judge_lora.judge(picture, prompts, scorers, [judge_lora.BASE, *map(column, ["a 1", "a 2"])], 2, 0.2)
    assert figures["recommended_scale"] == 1 and "diversity" in figures["reason"]


# Refusals


def test_bad_input_is_refused_before_weights_load(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_lora, "load_pipeline", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for options in (
        {"scorers": None}, {"base": "no/such/model"}, {"base": tmp_path}, {"lora": tmp_path}, {"prompts": "nothing"},
        {"scorers": ["beauty"]}, {"scorers": ["taste.py:none"]}, {"scales": [0]}, {"scales": [-1]}, {"max_loss": -1},
        {"num_images_per_prompt": 0}, {"output_dir": tmp_path / "full"}, {"lora": [tmp_path / "no"]},
        {"output_dir": tmp_path / "prompts.txt" / "x"},
    ):  # fmt: skip
        assert f"--{next(iter(options))}" in refused(**options)


def test_a_typo_leaves_nothing(judged, refused, lora_dir, tmp_path):
    """So that the corrected command works."""
    assert f"--lora {lora_dir}x" in refused(lora=[lora_dir, f"{lora_dir}x"]) and not (tmp_path / "out").exists()
    assert judged().exists()


def test_a_lora_that_does_not_fit_as_a_whole_is_refused_before_sampling(refused, lora_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_lora, "sample_pictures", never_sampled)
    weights = load_file(lora_dir / LORA_FILE)
    renamed = {name.replace("down_blocks", "down_block"): value for name, value in weights.items()}
    peft = {name.replace("unet.", "base_model.model."): value for name, value in weights.items()}
    for name, state in (("some", renamed), ("none", peft)):
        save_file(state, tmp_path / f"{name}.safetensors")
    (other,) = write_loras(tmp_path, {"xl": 1}, build_sdxl_pipeline)
    for lora, said in (
        (tmp_path / "some.safetensors", ""),
        (tmp_path / "none.safetensors", "0 fit"),
        (other, "is for"),
    ):
        message = refused(lora=[lora_dir, lora])
        assert message.startswith(f"--lora {lora}: ") and said in message and not (tmp_path / "out").exists()


def test_pictures_with_other_settings_are_not_mixed(judged, refused, tmp_path):
    (lora,) = write_loras(tmp_path, {"run": 1})
    folder = judged(lora=lora)
    assert "--guidance_scale" in refused(guidance_scale=3) and "--prompts" in refused(max_prompts=2)
    write_lora(lora / LORA_FILE, convert_lora.scaled(lora_weights(random_lora(build_pipeline().unet)), 2), "unet")
    assert f"--lora {lora}" in refused(lora=lora)
    assert (folder / "judge.html").exists()
