"""examples/choose_pairs.py: pairs chosen by hand, in memory, over HTTP and in a real browser."""

import contextlib
import http.client
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import choose_pairs
import numpy as np
import pyarrow.parquet as pq
import pytest
from choose_pairs import Session
from conftest import ONE_THREAD, ROOT, command_line, encode, logged, random_image
from PIL import Image

import train_inversion_dpo
from training_utils import load_pairs

HTML = '<img src=x onerror="document.title = 1"> & a "blue" square'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SEEN = """place => {
    const canvas = document.createElement("canvas"), size = canvas.width = canvas.height = 8;
    const pen = canvas.getContext("2d");
    pen.drawImage(document.querySelector(`#${place} img`), 0, 0, size, size);
    return pen.getImageData(0, 0, size, size).data.reduce((sum, x) => sum + x, 0);
}"""  # how light the picture on a side is


def read_back(folder):
    """The pairs that the training script reads in a folder, ties among them."""
    argv = ["--pretrained_model_name_or_path", "x", "--output_dir", "y", "--train_data_dir", str(folder)]
    pairs = load_pairs(train_inversion_dpo.parse_args([*argv, "--tie_policy", "soft"])[0])
    return [pairs[i] for i in range(len(pairs))]


def lightness(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float).mean()


def add_images(folder, captions, count, seed=0, **options):
    """Writes pictures with captions beside them, `count` of each caption."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        for j in range(count):
            (folder / f"{seed}-{i:02}-{j}.png").write_bytes(encode(random_image(rng, **options)))
            (folder / f"{seed}-{i:02}-{j}.txt").write_text(caption)
    return folder


@pytest.fixture
def session(tmp_path):
    """Two captions with four and three pictures."""
    session = Session(tmp_path)
    session.add_group("a", list("0123"))
    session.add_group("b", list("456"))
    return session


def choose(session, choice, window="w"):
    """Makes a choice of what a window shows; returns the two pictures, on their sides, and whether it counts."""
    pair = session.reply(window)["pair"]
    place = (pair["group"], pair["left"], pair["right"])
    names = [session.groups[place[0]].pictures[i] for i in place[1:]]
    return names, session.choose(window, choice, *place)


def shown(session, window="w"):
    pair = session.reply(window)["pair"]
    return pair and {session.groups[pair["group"]].pictures[pair[side]] for side in ("left", "right")}


def test_the_winner_stays_against_the_next(session):
    for best, choice in (("0", "tie"), ("0", "skip"), ("3", "left"), ("5", "right")):
        names, counts = choose(session, choice)
        assert counts and best in names
        if choice in ("left", "right") and names[choice == "right"] != best:  # the side is random: the other one won
            session.undo("w")
            choose(session, {"left": "right", "right": "left"}[choice])
    assert shown(session) == {"5", "6"}
    choose(session, "tie")
    assert shown(session) is None and session.reply("w")["chosen"] == 4 and session.reply("w")["ties"] == 2


def test_sides_are_random_and_stay_after_a_reload(tmp_path):
    session = Session(tmp_path)
    for i in range(40):
        session.add_group("a", [f"{i} first", f"{i} second"])
    lefts = []
    for _ in range(40):
        assert session.reply("w") == session.reply("w")
        lefts.append(choose(session, "left")[0][0].split()[1])
    assert 8 < lefts.count("first") < 32


def test_every_choice_is_in_the_file_at_once_and_undone_by_another_line(session, tmp_path):
    for i, choice in enumerate(("left", "right", "tie", "skip"), 1):
        choose(session, choice)
        lines = [json.loads(line) for line in (tmp_path / "choices.jsonl").read_text().splitlines()]
        assert len(lines) == i and lines[-1]["choice"] == choice and lines[-1]["time"] and lines[-1]["caption"] in "ab"
    session.undo("w")
    assert len((tmp_path / "choices.jsonl").read_text().splitlines()) == 5
    again = Session(tmp_path)
    assert again.choices == session.choices and len(again.choices) == 3
    assert shown(again) == shown(session)
    assert [row["label_0"] for row in again.rows()] == [1, 0, 0.5]


def test_undo_takes_back_the_windows_own_choice(session):
    first, _ = choose(session, "left", "one")
    second, _ = choose(session, "left", "two")
    assert not set(first) & set(second)  # each window has its own pictures
    assert session.undo("one") and shown(session, "one") == set(first)
    assert len(session.choices) == 1 and session.choices[0]["window"] == "two"
    assert session.undo("a new window") and not session.undo("one") and not session.choices


def test_two_windows_at_the_same_pair_make_one_choice(session):
    while len(session.choices) < 4:
        choose(session, "left", "one")
    pair = session.reply("one")["pair"]
    assert session.reply("two")["pair"] == pair  # nothing else is left
    place = (pair["group"], pair["left"], pair["right"])
    assert session.choose("one", "left", *place) and not session.choose("two", "right", *place)
    assert session.choices[-1]["choice"] == "left"


def test_a_choice_that_cannot_be_written_does_not_count(session, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = shown(session)
    monkeypatch.setattr(choose_pairs, "append_line", full)
    with pytest.raises(OSError, match="No space"):
        choose(session, "left")
    assert shown(session) == before and not session.choices


def test_half_a_line_is_left_out_and_nothing_is_lost_after_it(session, tmp_path, capsys):
    choose(session, "left")
    for name in ("choices.jsonl", "candidates.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"choice": "le')
    again = Session(tmp_path)
    again.add_group("c", ["7", "8"])
    choose(again, "tie")
    assert "not JSON" in capsys.readouterr().err
    last = Session(tmp_path)
    assert [line["choice"] for line in last.choices] == ["left", "tie"] and last.groups[2].caption == "c"


def images_in(folder, tmp_path, known=(), **options):
    """What the program finds in a folder: captions with files."""
    args = choose_pairs.parse_args(command_line(images=folder, output_dir=tmp_path / "out", **options))[0]
    (tmp_path / "out").mkdir(exist_ok=True)
    return list(choose_pairs.read_images(args, tmp_path / "out", list(known)))


def test_images_in_a_folder_are_compared_by_caption_and_stay_where_they_are(tmp_path, capsys):
    folder = add_images(tmp_path / "images", ["a cat", " a  dog "], 5)
    (folder / "alone.png").write_bytes((folder / "0-00-0.png").read_bytes() + b"more")
    (folder / "alone.txt").write_text("nothing else has this caption")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("a cat")
    (folder / "scan.tiff").write_bytes(encode(random_image(np.random.default_rng(9)), "TIFF"))
    (folder / "scan.txt").write_text("a dog")
    groups = images_in(folder, tmp_path, num_pictures_per_prompt=2)
    assert [(caption, len(group)) for caption, group in groups] == [
        ("a cat", 2), ("a cat", 3), ("a dog", 2), ("a dog", 2), ("a dog", 2),
    ]  # fmt: skip
    names = [name for _, group in groups for name in group]
    assert len(set(names)) == 11
    assert "left out: broken: unreadable image" in capsys.readouterr().out
    copies = [name for name in names if name.startswith("pictures/")]
    assert len(copies) == 1 and Image.open(tmp_path / "out" / copies[0]).format == "PNG"  # which browsers show
    assert {name for name in names if name not in copies} <= {str(file) for file in folder.glob("*.png")}
    known = [group for _, group in groups]
    assert images_in(folder, tmp_path, known) == []
    add_images(folder, ["a bird"], 2, seed=1)
    assert [caption for caption, _ in images_in(folder, tmp_path, known)] == ["a bird"]


def test_images_of_a_metadata_file_and_pairs_of_parquet(pairs_dir, tmp_path):
    folder = add_images(tmp_path / "images", ["x"], 3)
    rows = [{"file_name": file.name, "text": "a cat"} for file in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ((caption, names),) = images_in(folder, tmp_path, caption_column="text")
    assert caption == "a cat" and names == [str(folder / row["file_name"]) for row in rows]
    pairs = pq.read_table(pairs_dir).to_pylist()
    groups = images_in(pairs_dir, tmp_path)
    assert [caption for caption, _ in groups] == [row["caption"] for row in pairs]
    for (_, names), row in zip(groups, pairs, strict=True):
        assert [(tmp_path / "out" / name).read_bytes() for name in names] == [row["jpg_0"], row["jpg_1"]]
    assert images_in(pairs_dir, tmp_path, [names for _, names in groups[1:]]) == groups[:1]


def test_a_killed_sampling_goes_on(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    options = {"model": tiny_model, "prompts": tmp_path / "prompts.txt", "output_dir": tmp_path, "num_pairs": 5,
               "num_pictures_per_prompt": 3, "num_inference_steps": 2, "batch_size": 2}  # fmt: skip
    args = choose_pairs.parse_args(command_line(**options))[0]
    ready, *whole = choose_pairs.sample(args, tmp_path, ["a cat", "a dog"], 0, 0)
    assert ready == "ready" and [caption for caption, _ in whole] == ["a cat", "a dog", "a cat"]
    names = [name for _, group in whole for name in group]
    assert len(set(names)) == 9 == len(list((tmp_path / "pictures").iterdir()))
    _, *rest = choose_pairs.sample(args, tmp_path, ["a cat", "a dog"], 1, 2)
    assert rest == whole[1:]


def chosen(folder, choices):
    """A folder in which pairs of a light and a dark picture were chosen from."""
    rng = np.random.default_rng(0)
    (folder / "__choosing__" / "pictures").mkdir(parents=True, exist_ok=True)
    session = Session(folder / "__choosing__")
    for choice in choices:
        names = []
        for offset in (0, 127):
            picture = Image.fromarray((np.asarray(random_image(rng)) // 2 + offset).astype("u1"))
            names.append(choose_pairs.save(session.folder, encode(picture), "png"))
        session.add_group("a cat", names)
        pair = {"light": names[1], "dark": names[0]}
        sides = session.reply("w")["pair"]
        left = session.groups[-1].pictures[sides["left"]]
        side = choice if choice not in pair else "left" if pair[choice] == left else "right"
        assert session.choose("w", side, len(session.groups) - 1, sides["left"], sides["right"])
    return folder


def finish(folder):
    choose_pairs.main(["--finish", "--output_dir", str(folder)])
    return read_back(folder)


def test_finish_writes_what_the_trainer_reads_with_ties_and_without_skips(tmp_path):
    pairs = finish(chosen(tmp_path / "out", ["light", "dark", "tie", "skip"] * 3))
    assert [pair.is_tie for pair in pairs] == [False, False, True] * 3
    assert [lightness(pair.winner) > lightness(pair.loser) for pair in pairs if not pair.is_tie] == [True, False] * 3
    assert pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet")["label_0"].to_pylist().count(0.5) == 3
    assert len(finish(chosen(tmp_path / "out", ["light", "dark"]))) == 11  # again, after more choices
    assert [file.suffix for file in (tmp_path / "out").iterdir() if file.is_file()] == [".parquet"]


def test_a_finish_that_fails_leaves_the_earlier_pairs(tmp_path, capsys):
    before = finish(chosen(tmp_path / "out", ["light", "dark"]))
    for file in (tmp_path / "out" / "__choosing__" / "pictures").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        finish(tmp_path / "out")
    assert stop.value.code == 2 and read_back(tmp_path / "out") == before


def test_bad_input_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    add_images(tmp_path / "images", ["a"], 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "train.parquet").write_bytes(b"")
    model = {"model": ROOT / "examples" / "small_world_model"}
    for options, named in (
        ({}, "--model"),
        ({"images": tmp_path / "empty", **model}, "--images"),
        ({"images": tmp_path / "none"}, "no such folder"),
        ({"images": tmp_path / "images", "num_pairs": 7}, "--num_pairs"),
        ({"images": tmp_path, "output_dir": tmp_path / "out"}, "lies in --images"),
        ({"images": tmp_path / "images", "output_dir": tmp_path / "full"}, "already holds parquet files"),
        ({"images": tmp_path / "images", "num_pictures_per_prompt": 1}, "--num_pictures_per_prompt"),
        (model, "--prompts"),
        ({"model": tmp_path / "none", "prompts": "everyday"}, "no such folder"),
        ({**model, "prompts": tmp_path / "none.txt"}, "none.txt"),
        ({"finish": True}, "nothing is chosen"),
    ):
        with pytest.raises(SystemExit) as stop:
            choose_pairs.main(command_line(**{"output_dir": tmp_path / "new", **options}))
        *_, usage, message = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and usage.startswith("usage: ") and named in message
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr(choose_pairs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        choose_pairs.parse_args(command_line(images=tmp_path / "images", output_dir=tmp_path / "new"))
    assert "pip install starlette uvicorn" in capsys.readouterr().err


# Over HTTP


class Program:
    """The program in a process of its own, once it has printed its address."""

    def __init__(self, **options):
        words = [sys.executable, "-u", ROOT / "examples" / "choose_pairs.py", "--no_browser", *command_line(**options)]
        self.process = subprocess.Popen(words, env=ONE_THREAD, text=True, stdout=subprocess.PIPE)
        self.address = next((line.split()[-1] for line in self.process.stdout if "http" in line), None)

    def ask(self, method, path, body=None, **headers):
        """Returns status and body of an answer; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", urlsplit(self.address).port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def end(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def start():
    programs = []

    def start(**options):
        programs.append(Program(**options))
        return programs[-1]

    yield start
    for program in programs:
        if program.process.poll() is None:
            program.end()


def test_only_this_machines_own_page_is_answered(start, tmp_path):
    folder = add_images(tmp_path / "images", ["a cat"], 2)
    (folder / "secret.txt").write_text("secret")
    program = start(images=folder, output_dir=tmp_path / "out")
    port, path = urlsplit(program.address).port, urlsplit(program.address).path
    words, body = {"Content-Type": "application/json"}, json.dumps({"window": "w"})

    def status(path=path, **headers):
        return program.ask("GET", path, **headers)[0]

    with pytest.raises(ConnectionRefusedError):  # it listens at 127.0.0.1 alone
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
    assert status() == status(Host="localhost:99") == status(Host="127.0.0.1") == 200  # a tunnel has its own port
    assert status(Origin="http://localhost:8000") == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::", ""):
        assert status(Host=host) == 403
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost.evil.example",
        "http://[",
        "https://127.0.0.1@e.com",
    ):
        assert status(Origin=origin) == 403
        assert program.ask("POST", f"{path}next", body, Origin=origin, **words)[0] == 403
    for wrong in ("/", "/next", f"/{'x' * 22}/", f"{path[:-2]}/", f"{path.rstrip('/').upper()}/", "/picture/0/0"):
        assert status(wrong) == 404
    code, answer = program.ask("POST", f"{path}next", body, Origin=f"http://127.0.0.1:{port}", **words)
    assert code == 200 and json.loads(answer)["pair"]["caption"] == "a cat"
    assert status(f"{path}picture/0/0") == status(f"{path}picture/0/1") == 200
    secret = str(folder / "secret.txt")
    for wrong in (
        "0/2", "1/0", "-1/0", "0/-1", "0", "../secret.txt", "..%2f..%2fetc%2fpasswd", "0/..%2f..%2fsecret.txt",
        "0/0/../../secret.txt", secret, f"0/{secret}", f"%00{secret}", "99999999999999999999/0",
    ):  # fmt: skip
        code, answer = program.ask("GET", f"{path}picture/{wrong}")
        assert code == 404 and b"secret" not in answer
    for wrong in ("", "[]", "{}", "x", '{"window": 1, "choice": "left"}', json.dumps({"window": "w", "choice": "best",
                  "group": 0, "left": 0, "right": 1}), json.dumps({"window": "w", "choice": "left", "group": -1,
                  "left": 0, "right": 1}), json.dumps({"window": "w", "choice": "left", "group": 7, "left": 0,
                  "right": 1})):  # fmt: skip
        assert program.ask("POST", f"{path}choose", wrong)[0] == 400
    headers = program.ask("GET", path)[1].decode()
    assert "NONCE" not in headers and not (tmp_path / "out" / "__choosing__" / "choices.jsonl").exists()


def test_one_program_at_a_time_works_in_a_folder(start, tmp_path):
    folder = add_images(tmp_path / "images", ["a cat"], 2)
    first, second = (start(images=folder, output_dir=tmp_path / "out") for _ in range(2))
    assert first.address and second.process.wait(timeout=60) == 2 and second.address is None


def test_a_folder_without_pairs_is_refused_by_what_is_missing(tmp_path, capfd):
    add_images(tmp_path / "images", ["a cat", "a dog"], 1)
    with pytest.raises(SystemExit) as stop:
        choose_pairs.main(command_line(images=tmp_path / "images", output_dir=tmp_path / "out"))
    assert stop.value.code == 2 and "no two usable pictures" in capfd.readouterr().err.splitlines()[-1]


# In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


def current(page):
    return page.evaluate("document.body.dataset.pair")


@pytest.fixture
def visit(browser):
    """Opens the page of a program in a window of its own, and returns it when a pair is shown."""
    contexts = []

    def visit(program, **options):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(program.address)
        page.wait_for_function("() => document.body.dataset.pair", timeout=60_000)
        return page

    yield visit
    for context in contexts:
        errors = [error for page in context.pages for error in page.errors]
        context.close()
        assert not errors


NEXT = """before => document.body.dataset.pair !== before
    && (document.body.dataset.pair || document.activeElement.id === "finish")"""  # a pair, or there are no more


def press(page, key):
    before = current(page)
    page.keyboard.press(key)
    page.wait_for_function(NEXT, arg=before, timeout=60_000)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "__choosing__" / "choices.jsonl").read_text().splitlines()]


def test_sixty_choices_by_keys_make_a_lora(start, visit, train, tmp_path):
    """The whole way on the small world, by somebody who likes what is darker, while it is sampled."""
    model, out = ROOT / "examples" / "small_world_model", tmp_path / "out"
    program = start(model=model, prompts="small_world", num_pairs=60, num_inference_steps=4, guidance_scale=1.5,
                    batch_size=8, output_dir=out)  # fmt: skip
    page = visit(program)
    for _ in range(60):
        left, right = page.evaluate(SEEN, "left"), page.evaluate(SEEN, "right")
        press(page, "ArrowLeft" if left < right else "ArrowRight")
    page.keyboard.press("Enter")
    output = program.process.communicate(timeout=60)[0]
    assert program.process.returncode == 0 and "60" in output
    pairs = read_back(out)
    assert len(pairs) == 60 == len(lines_of(out))
    assert np.mean([lightness(pair.winner) < lightness(pair.loser) for pair in pairs]) > 0.95  # of 8 x 8 pixels
    run = train(pretrained_model_name_or_path=model, train_data_dir=out, resolution=64, max_train_steps=5)
    assert len(logged(run, "loss")) == 5


@pytest.fixture
def program(start, tmp_path):
    return start(
        images=add_images(tmp_path / "images", [HTML, "error", "a long caption, " * 30, *"ab"], 4),
        output_dir=tmp_path / "out",
    )


def test_keys_buttons_undo_reload_and_two_windows(program, start, visit, tmp_path):
    page, out = visit(program), tmp_path / "out"
    assert page.locator("#caption").inner_text() == HTML and page.title() == "Choose pairs"  # captions are text
    pairs = []
    for key, choice in (("ArrowLeft", "left"), ("ArrowDown", "tie"), ("ArrowUp", "skip"), ("ArrowRight", "right")):
        pairs.append(current(page))
        press(page, key)
        assert lines_of(out)[-1]["choice"] == choice
    assert page.locator("#count").inner_text().startswith("3 chosen (1 tie) · 197 more")
    for pair in reversed(pairs[2:]):
        press(page, "Backspace")
        assert current(page) == pair
    page.reload()
    page.wait_for_function("() => document.body.dataset.pair")
    assert current(page) == pairs[2]
    program.end()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.getElementById('note').textContent.includes('Not saved')")
    program = start(images=tmp_path / "images", output_dir=out)  # killed, and gone on with
    page = visit(program)
    assert current(page) == pairs[2]
    press(page, "Backspace")
    assert current(page) == pairs[1]
    page.locator("[data-key=ArrowRight]").click()
    page.wait_for_function("pair => document.body.dataset.pair !== pair", arg=pairs[1])
    other = visit(program)
    assert current(other).split(":")[0] != current(page).split(":")[0]
    for _ in range(3):
        press(page, "ArrowLeft")
        press(other, "ArrowRight")
    before = current(page)
    page.locator("#left img").click()
    page.wait_for_function("pair => document.body.dataset.pair !== pair", arg=before)
    assert [line["choice"] for line in lines_of(out)][-7:] == ["left", "right"] * 3 + ["left"]
    page.locator("#finish").click()
    program.process.wait(60)
    assert len(read_back(out)) == 9


def test_pictures_are_as_large_as_the_window_allows_and_loaded_ahead(program, visit):
    page = visit(program)
    for size in ((1600, 900), (390, 780), (600, 400)):
        check_layout(page, size)
    page.wait_for_load_state("networkidle")
    page.route("**/picture/**", lambda route: route.abort())  # no picture comes any more
    press(page, "ArrowLeft")
    assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [40, 40]


def check_layout(page, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    places = {name: page.locator(name).bounding_box() for name in ("#left img", "#right img", "#buttons", "#status")}
    for box in places.values():
        assert box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
    left, right = places["#left img"], places["#right img"]
    assert left["width"] / left["height"] == pytest.approx(40 / 32, rel=0.02)
    area = (left["width"] * left["height"] + right["width"] * right["height"]) / (size[0] * size[1])
    assert area > 0.35
    for _ in range(4):  # to another caption, too
        press(page, "ArrowLeft")
        assert {name: page.locator(name).bounding_box() for name in places} == places  # nothing jumps
