"""--report_to trackio, with the real package; tensorboard is in test_results.py."""

import json
import sqlite3
import subprocess
import sys

from conftest import ONE_THREAD, ROOT, command_line, logged

WITHOUT_NETWORK = """
import runpy, socket, sys

def connect(self, address):
    raise AssertionError(f"a connection to {address}")

socket.socket.connect = socket.socket.connect_ex = connect
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_trackio_keeps_metrics_and_options_on_the_disk(tiny_model, pairs_dir, tmp_path):
    """In its own folder and nowhere else, without any connection; the process ends by itself."""
    output_dir = tmp_path / "run"
    options = command_line(
        pretrained_model_name_or_path=tiny_model, train_data_dir=pairs_dir, output_dir=output_dir, resolution=32,
        train_batch_size=2, max_train_steps=3, objective="inpo", inversion_steps=1, report_to="trackio", rank=3,
    )  # fmt: skip
    home = tmp_path / "home"
    environment = {**ONE_THREAD, "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(home), "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NETWORK, str(ROOT / "train_inversion_dpo.py"), *options],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (home / "trackio").exists()
    database = sqlite3.connect(tmp_path / "trackio" / "inversion-dpo.db")
    stored = database.execute("select step, metrics from metrics order by step")
    rows = [(step, json.loads(text)) for step, text in stored]
    assert [step for step, _ in rows] == [1, 2, 3]
    for name in ("loss", "rewards/margins", "lr", "bad_steps"):
        assert [metrics[name] for _, metrics in rows] == logged(output_dir, name)
    ((config,),) = database.execute("select config from configs").fetchall()
    assert json.loads(config)["rank"] == 3 and json.loads(config)["objective"] == "inpo"
