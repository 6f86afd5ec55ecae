"""What tests/soak.sh runs; see there."""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ONE_THREAD, ROOT, build_pipeline, command_line, pair_rows, write_parquet
from hub_server import HubServer
from safetensors.torch import load_file

from training_utils import LORA_FILE, METRICS_FILE, VALIDATION_DIR, read_metrics

OPTIONS = {
    "resolution": 32, "train_batch_size": 2, "max_train_steps": 120, "rank": 4, "report_to": "none",
    "learning_rate": 1e-3, "objective": "inpo", "checkpointing_steps": 2, "checkpoints_total_limit": 3,
    "num_eval_pairs": 4, "eval_steps": 7, "random_flip": True, "dataloader_num_workers": 1,
    "validation_prompts": ["a"], "validation_steps": 20, "validation_inference_steps": 2, "num_validation_images": 1,
    "push_to_hub": True, "resume_from_checkpoint": "latest",
}  # fmt: skip
PHASES = {"Pairs:": "training", "Caching": "caching", "Saved": "uploading"}  # by what the log says last


def command(folder, output, processes=1, **options):
    """The command line of a run in a folder with a model and pairs."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    places = {"pretrained_model_name_or_path": folder / "model", "train_data_dir": folder / "pairs"}
    options = {**OPTIONS, **places, "output_dir": folder / output, **options}
    return [sys.executable, *launcher, str(ROOT / "train_inversion_dpo.py"), *command_line(**options)]


def phase_of(log, folder, started):
    """Where a run was killed, by its log, its folder and the time when it started."""
    if any(partial.stat().st_mtime > started for partial in folder.glob("partial-checkpoint-*")):
        return "saving"
    step = [0, *(row["step"] for row in read_metrics(folder / METRICS_FILE))][-1]
    is_due = step and step % OPTIONS["validation_steps"] == 0 and f"checkpoint-{step}" not in log  # not resumed from
    is_saved = (folder / f"checkpoint-{step}").exists()
    if is_due and is_saved and not (folder / VALIDATION_DIR / f"step-{step:06}-prompt-0.png").exists():
        return "sampling"
    found = {name: log.rfind(word) for word, name in PHASES.items()}
    last = max(found, key=found.get)
    return last if found[last] >= 0 else "starting"


def kill_until_done(folder, output, env, kills, processes, **options):
    """Runs a command again and again, killing it `kills` times; returns how often in which phase."""
    counts, longest = Counter(), 9.0 if processes == 1 else 16.0
    while True:
        log = folder / f"{output}.log"
        started = time.time()
        with log.open("w") as stream:
            run = subprocess.Popen(
                command(folder, output, processes, **options), env=env, stdout=stream, stderr=stream,
            )  # fmt: skip
        try:
            if counts.total() >= kills:
                longest = 1000
            run.wait(timeout=random.uniform(0.3 * longest, longest))
        except subprocess.TimeoutExpired:
            # A launcher's processes are in sessions of their own, and would outlive it and hold the folder's lock.
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            run.wait()
            counts[phase_of(log.read_text(), folder / output, started)] += 1
            continue
        if run.returncode:
            raise SystemExit(f"a run failed:\n{log.read_text()[-3000:]}")
        return counts


def largest_difference(one, other):
    a, b = load_file(one), load_file(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def soak_kills(folder, kills):
    """Kills runs with and without cache, in one process and in two, until there were that many kills."""
    total, number = Counter(), 0
    with HubServer() as hub:
        env = {**ONE_THREAD, **hub.environment}
        whole = {}
        while total.total() < kills:
            processes, cached = 1 + (number % 3 == 2), number % 2 == 0
            kind = f"{processes} {'cached' if cached else 'uncached'}"
            if kind not in whole:
                cache = {"inversion_cache_dir": folder / f"cache of {kind}"} if cached else {}
                subprocess.run(
                    command(folder, kind.replace(" ", "-"), processes, **cache), env=env, check=True,
                    capture_output=True,
                )  # fmt: skip
                whole[kind] = folder / kind.replace(" ", "-")
            cache = {"inversion_cache_dir": folder / f"cache {number}"} if cached else {}
            broken = folder / f"broken-{number}"
            share = min(kills - total.total(), -(-kills // 4))  # four runs at least, also on a slow machine
            total += kill_until_done(folder, broken.name, env, share, processes, **cache)
            difference = largest_difference(broken / LORA_FILE, whole[kind] / LORA_FILE)
            assert difference == 0, f"{kind}: {difference}"
            assert (broken / METRICS_FILE).read_text() == (whole[kind] / METRICS_FILE).read_text()
            number += 1
            print(
                f"{total.total()} kills, {number} runs ended bit for bit as undisturbed ones: {dict(total)}",
                flush=True,
            )


def soak_memory(folder, steps):
    """Takes many steps and prints the growth of the process's memory after the first fifth."""
    options = {"max_train_steps": steps, "checkpointing_steps": steps, "push_to_hub": None, "validation_prompts": None}
    run = subprocess.Popen(
        command(folder, "long", **options), env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sizes, metrics = [], folder / "long" / METRICS_FILE
    while run.poll() is None:
        time.sleep(2)
        status = Path(f"/proc/{run.pid}/status")
        line = (
            next((x for x in status.read_text().splitlines() if x.startswith("VmRSS")), None)
            if status.exists()
            else None
        )
        if line and metrics.exists():
            sizes.append((metrics.read_text().count("\n"), int(line.split()[1]) / 1024))
    assert run.returncode == 0
    late = [(step, size) for step, size in sizes if steps / 5 < step < steps]  # at the end, results are written
    growth = (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0]) * 1000
    print(f"{steps} steps: {late[0][1]:.0f} MiB at step {late[0][0]}, {late[-1][1]:.0f} MiB at step {late[-1][0]}: "
          f"{growth:+.2f} MiB for 1,000 steps")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_pipeline().save_pretrained(folder / "model")
        write_parquet(pair_rows(32), folder / "pairs")
        soak_kills(folder, args.kills)
        soak_memory(folder, args.steps)


if __name__ == "__main__":
    main()
