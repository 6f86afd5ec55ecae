"""Make preference pairs by hand: pick the better of two pictures in the browser.

    python examples/choose_pairs.py --model M --prompts everyday --output_dir my-pairs
    python examples/choose_pairs.py --images my-candidates --output_dir my-pairs
    accelerate launch train_inversion_dpo.py --train_data_dir my-pairs ...

Pictures are sampled while you choose, or are there already: a folder of pictures with captions (`a.png` with `a.txt`,
or a metadata file of an image folder), or parquet files of pairs, such as sample_pairs.py writes. Of several pictures
with one caption, the winner stays against the next.

`<output_dir>/__choosing__` keeps what was sampled, and each choice at once (`choices.jsonl`), so that the same command
goes on wherever it was stopped; another command adds its pictures. When the program ends, by the page or by Ctrl-C,
and with --finish, convert_pairs.py writes all choices to `<output_dir>` as the training scripts read them. Only this
machine, and who knows the address with its token, reaches the page.
"""

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import secrets
import signal
import socket
import statistics
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import Parser, missing_folder, number, one_line, printable

ENOUGH = 200  # pairs, for a first LoRA
CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5, "skip": None}  # and what each means as a label
SHOWN = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what every browser shows
LOCAL = {"127.0.0.1", "localhost", "::1"}
AT_MODEL = ("model", "lora", "variant", "prompts", "num_pairs", "num_inference_steps", "guidance_scale", "batch_size",
            "dtype")  # fmt: skip


def parse_args(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0],
        usage="%(prog)s {--model M --prompts P | --images I | --finish} --output_dir O [options, see --help]",
        epilog="From another machine: ssh -L PORT:127.0.0.1:PORT user@this-machine, then open the address there.",
    )
    path, count = os.path.expanduser, number(int, least=1)
    # fmt: off
    add = parser.add_argument
    add("--output_dir", type=path, required=True, help="folder for the pairs; the same folder goes on")
    add("--finish", action="store_true", help="only write the pairs that are chosen")
    add("--no_browser", action="store_true", help="print the address, do not open it")
    add("--port", type=number(int, least=0, most=65535), default=0, help="of the page; 0 takes a free one")
    add("--num_pictures_per_prompt", type=number(int, least=2), default=4,
        help="pictures with one caption, compared with each other; more need fewer pictures a pair, and vary less")
    add = parser.add_argument_group("pictures that exist").add_argument
    add("--images", type=path, help="folder of pictures with captions, or of pairs in parquet files")
    add("--caption_column", default="caption", help="column of the caption in parquet and metadata files")
    add = parser.add_argument_group("pictures that are sampled while you choose").add_argument
    add("--model", type=path, help="pipeline: a Hub id or a folder")
    add("--lora", type=path, help="LoRA on it: a Hub id, a folder or a file")
    add("--variant", help="variant of the model's files, such as fp16")
    add("--prompts", type=path, help="text file with a prompt on each line, or a name (see prompt_sources.py)")
    add("--num_pairs", type=count, default=ENOUGH, help="sample for so many pairs; prompts repeat with new seeds")
    add("--num_inference_steps", type=count, default=30, help="sampler steps; more costs time")
    add("--guidance_scale", type=number(float, least=0), default=7.5, help="higher obeys prompts more, varies less")
    add("--batch_size", type=count, default=4, help="pictures sampled at a time; more is faster and takes memory")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the weights; the half ones take half the memory")
    add("--seed", type=number(int, least=0), default=0, help="of the pictures, and of the side each is shown on")
    # fmt: on
    args = parser.parse_args(argv)
    check_args(args, parser)
    return args, parser.error


def check_args(args, parser):
    """Ends the program with one line if options contradict each other or something is missing."""
    if not args.finish:
        if bool(args.images) == bool(args.model):
            parser.error("name either --model, to sample pictures, or --images, a folder of them")
        given = [name for name in AT_MODEL if getattr(args, name) != parser.get_default(name)]
        if args.images and given:
            parser.error(f"--images and --{given[0]} do not go together")
        if problem := args.model and missing_folder(args.model):
            parser.error(f"--model: {problem}")
        if args.model and not args.prompts:
            parser.error("--prompts is missing: a text file with a prompt on each line, or a name such as everyday")
        if args.images and not Path(args.images).is_dir():
            parser.error(f"--images {args.images}: {missing_folder(args.images, was_asked_for=True) or 'no folder'}")
        if args.images and Path(args.output_dir).resolve().is_relative_to(Path(args.images).resolve()):
            parser.error(f"--output_dir {args.output_dir}: lies in --images, whose files it would then be among")
        if lacking := [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]:
            parser.error(f"the page needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")


# 1  What is chosen


class Group(NamedTuple):
    """Pictures with one caption, by their files; the one that won so far is compared with the next."""

    caption: str
    pictures: list[str]
    choices: list[dict]  # as they stand in the file

    def pair(self):
        """Returns the two pictures to choose from; None when all were compared."""
        place = len(self.choices) + 1
        if place >= len(self.pictures):
            return None
        won = [choice[choice["choice"]] for choice in self.choices if choice["choice"] in ("left", "right")]
        return (won or self.pictures)[-1 if won else 0], self.pictures[place]


class Session:
    """What there is to choose from and what was chosen, in memory and in a folder, whose files are only appended to.

    A window of the browser keeps to its group, and others get other groups, as long as there are any.
    """

    def __init__(self, folder, seed=0):
        self.folder, self.seed = folder, seed
        self.groups, self.choices = [], []  # the choices of all groups, in order of time
        self.at, self.times = {}, []  # the group that a window is at; when choices of this run were made
        self.is_complete, self.problem = False, ""
        for line in read_lines(folder / "candidates.jsonl"):
            self.groups.append(Group(line["caption"], line["pictures"], []))
        for line in read_lines(folder / "choices.jsonl"):
            with contextlib.suppress(IndexError, KeyError, TypeError):  # edited by hand
                self._apply(line)

    def _apply(self, line):
        """Returns whether a choice, or taking one back, fits what was chosen before; if so, it counts."""
        group, pair = self.groups[line["group"]], [line["left"], line["right"]]
        last = group.choices[-1] if group.choices else {}
        if line["choice"] == "undo" and [last.get("left"), last.get("right")] == pair:
            self.choices.remove(group.choices.pop())
        elif line["choice"] in CHOICES and set(pair) == set(group.pair() or ()):
            group.choices.append(line)
            self.choices.append(line)
        else:
            return False
        return True

    def add_group(self, caption, pictures):
        append_line(self.folder / "candidates.jsonl", {"caption": caption, "pictures": pictures})
        self.groups.append(Group(caption, pictures, []))

    def choose(self, window, choice, group, left, right):
        """Writes a choice and returns whether it counts: another window may have been first. Raises OSError."""
        caption, pictures, _ = self.groups[group]
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "window": window, "group": group, "caption": caption,
            "left": pictures[left], "right": pictures[right], "choice": choice,
        }  # fmt: skip
        if not self._apply(line):
            return False
        try:
            append_line(self.folder / "choices.jsonl", line)
        except OSError:
            self._apply({**line, "choice": "undo"})
            raise
        self.times.append(time.monotonic())
        return True

    def undo(self, window):
        """Takes back the window's last choice, or the last at all if it has none; that pair is shown next."""
        last = [line for line in self.choices if self.groups[line["group"]].choices[-1] is line]
        last = [line for line in last if line["window"] == window] or last
        if not last:
            return False
        line = {**last[-1], "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "window": window, "choice": "undo"}
        append_line(self.folder / "choices.jsonl", line)
        self._apply(line)
        self.at[window] = line["group"]
        return True

    def open_groups(self, window):
        """Returns the groups that a window can choose from: its own, those of no window, those of others."""
        others = {group for key, group in self.at.items() if key != window}
        numbers = [number for number, group in enumerate(self.groups) if group.pair()]
        return sorted(numbers, key=lambda number: (number != self.at.get(window), number in others))

    def reply(self, window, note=""):
        """Returns what the page shows next, and which pictures it can load ahead."""
        pair, ahead = None, []
        for key in self.open_groups(window)[:2]:
            group = self.groups[key]
            places = sorted(group.pictures.index(name) for name in group.pair())
            if pair:
                ahead += [(key, place) for place in places]
                continue
            self.at[window] = key
            random.Random(f"{self.seed} {key} {places}").shuffle(places)  # the same after a reload
            pair = {"group": key, "caption": group.caption, "left": places[0], "right": places[1]}
            ahead = [(key, place) for place in range(max(places) + 1, len(group.pictures))][:2]
        gaps = [after - before for before, after in itertools.pairwise(self.times[-20:])]
        labels = [CHOICES[line["choice"]] for line in self.choices]
        return {
            "pair": pair, "ahead": ahead, "note": note, "enough": ENOUGH, "chosen": len(labels) - labels.count(None),
            "ties": labels.count(0.5), "per_minute": 60 / statistics.median(gaps) if len(gaps) > 3 else None,
            "is_complete": self.is_complete, "problem": self.problem,
        }  # fmt: skip

    def rows(self):
        """Returns what was chosen as rows that convert_pairs.py reads."""
        return [
            {
                "jpg_0": str((self.folder / line["left"]).absolute()),
                "jpg_1": str((self.folder / line["right"]).absolute()),
                "label_0": CHOICES[line["choice"]],
                "caption": line["caption"],
            }
            for line in self.choices
            if line["choice"] != "skip"
        ]


def read_lines(file):
    """Returns the objects of a JSONL file; lines that a crash of the machine left incomplete are left out."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"left out: {file}: not JSON: {printable(line)[:80]}", file=sys.stderr)
    return values


def append_line(file, value):
    """Writes a line whole and at once; raises OSError if that fails, and leaves the file as it was."""
    with open(file, "ab+", buffering=0) as out:
        size = out.seek(0, os.SEEK_END)
        if size and out.seek(size - 1) and out.read(1) != b"\n":  # a crash of the machine left half a line
            out.write(b"\n")
        data = (json.dumps(value) + "\n").encode()
        if out.write(data) < len(data):
            out.truncate(size)
            raise OSError("no space left on the disk")


# 2  Pictures, in a process of their own: neither waits for the other, and it can be ended at any moment


def work(connection, groups, *args):
    """Sends groups, "ready" before the first if that takes long, and at the end "done" or what went wrong."""
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, and Python warns of those that an ended process leaves
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that there is no torchvision
    try:
        for group in groups(*args):
            connection.send(group)
        connection.send("done")
    except Exception as error:  # a GPU out of memory, a full disk, ...: the page tells it
        connection.send(one_line(error))


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # even amid a batch: the same command may be started again already


def sample(args, folder, prompts, num_groups, num_pairs):
    """Yields "ready", then captions with the names of sampled pictures, until there are `--num_pairs` pairs."""
    import sample_pairs
    import torch

    sample_pairs.check_model("--model", args.model, "--lora", args.lora, args.variant)
    dtype, count = getattr(torch, args.dtype), args.num_pictures_per_prompt
    pipeline = sample_pairs.load_pipeline("--model", args.model, "--lora", args.lora, dtype, variant=args.variant)
    yield "ready"
    last = num_groups + -((num_pairs - args.num_pairs) // (count - 1))
    captions = [prompts[i % len(prompts)] for i in range(num_groups, last)]
    first_seed = (args.seed << 32) + num_groups * count
    pictures = sample_pairs.pictures_of(
        pipeline, [caption for caption in captions for _ in range(count)],
        [first_seed + i for i in range(len(captions) * count)],
        args.num_inference_steps, args.guidance_scale, args.batch_size,
    )  # fmt: skip
    for caption in captions:
        group = [picture for picture in itertools.islice(pictures, count) if picture.any()]  # a black one is none
        yield caption, unique(save(folder, sample_pairs.encode_png(picture), "png") for picture in group)


def read_images(args, folder, known):
    """Yields captions with the names of pictures in `--images`, but for groups that are known; raises ValueError."""
    import convert_pairs
    from pair_sources import PairColumns, content_of, find_data_files, open_rows, rows_of_folders
    from PIL import Image

    source, columns = Path(args.images), ["--caption_column", args.caption_column]
    options, _ = convert_pairs.parse_args(["--train_data_dir", args.images, "--output_dir", str(folder), *columns])
    columns, report, by_caption = PairColumns(options), convert_pairs.Report(options.max_bad_fraction), {}
    try:
        find_data_files(source, "train")
        rows = open_rows(options, columns)
    except FileNotFoundError:
        rows = rows_of_folders(source, {"image": source}, args.caption_column)

    def name_of(row, value):
        """Returns an image's own path, or the name of a copy that browsers show; None if it cannot be read."""
        try:
            data = convert_pairs.open_image(value, row.image_root, options, report)
        except convert_pairs.BadRow as problem:
            return report.leave_out(row, problem)
        suffix, path = Image.open(io.BytesIO(data)).format, path_of(row, value)
        if suffix not in SHOWN:
            suffix, data = "png", convert_pairs.to_readable(Image.open(io.BytesIO(data)))[0]
        elif path and path.read_bytes() == data:
            return str(path)
        return save(folder, data, suffix.lower())

    def path_of(row, value):
        path = Path(row.image_root, value).absolute() if isinstance(value := content_of(value), str) else None
        return path if path and path.is_file() else None

    known, known_pictures = set(map(tuple, known)), set().union(*known)
    for row in rows.rows:
        report.num_rows += 1
        try:
            caption = " ".join(columns.captions(row.values, row.caption_files)[0].split())
        except convert_pairs.BadRow as problem:
            report.leave_out(row, problem)
            continue
        images = [row.values[name] for name in ("jpg_0", "jpg_1") if name in row.values]
        if len(images) == 2:
            names = unique(name_of(row, image) for image in images)
            if len(names) == 2 and tuple(names) not in known:
                known.add(tuple(names))
                yield caption, names
        elif "image" not in row.values:
            raise ValueError(f"--images {args.images}: the columns are {', '.join(row.values)}; needed: caption, and "
                             "jpg_0 and jpg_1, or file_name in a metadata file")  # fmt: skip
        elif str(path_of(row, row.values["image"])) not in known_pictures:
            by_caption.setdefault(caption, []).append((row, row.values["image"]))
    for caption, images in by_caption.items():
        names = []
        for image in images:
            name = name_of(*image)
            names += [name] if name and name not in known_pictures and name not in names else []
            if len(names) == args.num_pictures_per_prompt + 2:  # so that at the end none is left alone
                yield caption, names[:-2]
                names = names[-2:]
        if len(names) > 1:
            yield caption, names


def unique(names):
    return list(dict.fromkeys(filter(None, names)))


def save(folder, data, suffix):
    """Writes a picture, whole or not at all, under a name made of its content, and returns that."""
    name = f"pictures/{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
    (folder / "pictures").mkdir(exist_ok=True)
    unfinished = folder / f"{name}.{os.getpid()}.part"
    unfinished.write_bytes(data)
    unfinished.replace(folder / name)
    return name


def start_worker(session, groups, args, *more):
    """Starts the process, and a thread that takes its groups in; returns the process when it is ready, or failed."""
    context, is_ready = multiprocessing.get_context("spawn"), threading.Event()
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sender, groups, args, session.folder, *more), daemon=True)
    worker.start()
    sender.close()

    def listen():
        try:
            while (message := receiver.recv()) != "done":
                if not isinstance(message, str):
                    session.add_group(*message)
                elif message != "ready":
                    raise OSError(message)
                is_ready.set()
        except EOFError:
            session.problem = "the process was ended from outside"
        except OSError as problem:
            session.problem = one_line(problem)
        session.is_complete = True
        is_ready.set()

    threading.Thread(target=listen, daemon=True).start()
    is_ready.wait()
    return worker


# 3  The page


class Guard:
    """Lets only this machine's own page pass: Host and Origin are checked by name (a tunnel has its own port)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        headers, app = Request(scope).headers, self.app
        addresses = ["//" + headers.get("host", ""), *headers.getlist("origin")]
        if not all(host_of(address) in LOCAL for address in addresses):
            app = PlainTextResponse("this page is for the machine it runs on", 403)
        await app(scope, receive, send)


def host_of(address):
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def make_app(session, token, end):
    """Returns the web application under `/<token>/`; it opens no path that a request names."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.routing import Mount, Route

    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")

    async def show(request):
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
            f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return HTMLResponse(page.replace("NONCE", nonce), headers=headers)

    async def picture(request):
        group, place = request.path_params["group"], request.path_params["place"]
        if group >= len(session.groups) or place >= len(session.groups[group].pictures):
            return PlainTextResponse("no such picture", 404)
        file = session.folder / session.groups[group].pictures[place]
        if not file.is_file():
            return PlainTextResponse("the picture is gone", 404)
        kind = file.suffix[1:].lower().replace("jpg", "jpeg")
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return FileResponse(file, media_type=f"image/{kind}", headers=headers)

    async def act(request):
        action, note = request.path_params["action"], ""
        try:
            asked = await request.json()
            window = str(asked["window"])[:64]
            if action == "choose":
                choice, *pair = asked["choice"], *(int(asked[name]) for name in ("group", "left", "right"))
                if choice not in CHOICES or min(pair) < 0:
                    raise ValueError("no such choice")
                if not session.choose(window, choice, *pair):
                    note = "This pair was chosen in another window."
            elif action == "undo" and not session.undo(window):
                note = "There is nothing to undo."
            elif action == "finish":
                end()
        except OSError as problem:
            note = f"Not saved: {one_line(problem)}"
        except (IndexError, KeyError, TypeError, ValueError) as problem:
            return PlainTextResponse(one_line(problem), 400)
        return JSONResponse(session.reply(window, note))

    routes = [
        Route("/", show),
        Route("/picture/{group:int}/{place:int}", picture),
        Route("/{action:str}", act, methods=["POST"]),
    ]
    return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=[Middleware(Guard)])


def serve(session, args, error):
    """Shows the page until it, or Ctrl-C, ends the program."""
    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", args.port))
        except OSError as problem:
            error(f"--port {args.port}: {one_line(problem)}")
        listener.listen()
        port, token = listener.getsockname()[1], secrets.token_urlsafe(16)
        address = f"http://127.0.0.1:{port}/{token}/"
        print(f"Choose at {address}")
        print(f"    from another machine, first run there: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}")
        print("    End with Finish in the page, or with Ctrl-C here. The same command goes on.", flush=True)
        has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if has_screen and not args.no_browser:
            webbrowser.open(address)

        def end():
            server.should_exit = True

        app = make_app(session, token, end)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])


def write_pairs(session, output_dir, seed):
    """Writes all choices with the converter, in the place of those that it wrote of this session before."""
    import convert_pairs

    rows, file = session.rows(), session.folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    root = os.path.commonpath([Path(row[name]).parent for row in rows for name in ("jpg_0", "jpg_1")])
    earlier = {old: session.folder / f"{old.name}.old" for old in Path(output_dir).glob("train-*-of-*.parquet")}
    for old, aside in earlier.items():
        old.replace(aside)
    try:
        convert_pairs.main(["--train_data_dir", str(file), "--image_root", root, "--tie_policy", "soft",
                            "--output_dir", output_dir, "--seed", str(seed)])  # fmt: skip
    except BaseException:
        for old, aside in earlier.items():
            aside.replace(old)
        raise
    for aside in earlier.values():
        aside.unlink()


def choose(args, folder, error):
    """Lets the person choose, while pictures are added to the folder."""
    import filelock
    from pair_files import check_output_dir
    from prompt_sources import read_prompts

    if not folder.exists():
        check_output_dir(args.output_dir, error)
    try:
        prompts = args.model and read_prompts(args.prompts)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        error(printable(str(problem)))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
        except filelock.Timeout:
            error(f"--output_dir {args.output_dir}: another choose_pairs.py is at work in it")
        session = Session(folder, args.seed)
        known, worker = [group.pictures for group in session.groups], None
        num_pairs = sum(max(0, len(pictures) - 1) for pictures in known)
        if args.images:
            print(f"Looking for pictures in {args.images}", flush=True)
            worker = start_worker(session, read_images, args, known)
        elif num_pairs < args.num_pairs:
            print(f"Loading {args.model}", flush=True)
            worker = start_worker(session, sample, args, prompts, len(known), num_pairs)
        session.is_complete = session.is_complete or worker is None
        if session.is_complete and not any(group.pair() for group in session.groups) and not session.choices:
            error(printable(session.problem) or f"--images {args.images}: no two usable pictures have one caption")
        serve(session, args, error)
        if worker:
            worker.terminate()
        if session.problem:
            print(f"not all pictures came: {printable(session.problem)}", file=sys.stderr)


def main(argv=None):
    args, error = parse_args(argv)
    folder = Path(args.output_dir) / "__choosing__"  # after two underscores, whatever reads data leaves it alone
    if not args.finish:
        with contextlib.suppress(KeyboardInterrupt):
            choose(args, folder, error)
    session = Session(folder, args.seed)
    if session.rows():
        write_pairs(session, args.output_dir, args.seed)
    elif args.finish:
        error(f"--output_dir {args.output_dir}: nothing is chosen in it yet")


if __name__ == "__main__":
    main()
