"""--push_to_hub with the real client against a Hub on loopback: what arrives, what never does, how it fails."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_same, lora
from hub_server import HubServer, Repo, point_client_at

from training_utils import KOHYA_FILE, LORA_FILE

VALIDATION = {"validation_prompts": ["a red circle"], "num_validation_images": 1, "validation_inference_steps": 1}
VALIDATION |= {"output_kohya_format": True}
SHORT = {"max_train_steps": 1, "objective": "inpo", "inversion_steps": 1}
PUSHED = {
    LORA_FILE,
    KOHYA_FILE,
    "README.md",
    "training_config.json",
    "validation/step-000001-prompt-0.png",
}


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        point_client_at(monkeypatch, server)
        yield server


def on_disk(folder):
    return {name: (folder / name).read_bytes() for name in PUSHED}


def test_what_arrives_is_what_is_on_disk_and_nothing_else(train, hub, tmp_path):
    """No checkpoint, log or metrics file, and no stranger's file that lies in the folder or below it."""
    (tmp_path / "run" / "secrets").mkdir(parents=True)
    (tmp_path / "run" / "secrets" / "README.md").write_text("mine")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    output_dir = train(
        push_to_hub=True, hub_private_repo=True, report_to="tensorboard", **VALIDATION, **SHORT,
    )  # fmt: skip
    repo = hub.repos["tester/run"]
    assert repo.private is True and len(repo.commits) == 1
    assert repo.files == on_disk(output_dir)
    assert (output_dir / "checkpoint-1").is_dir() and (output_dir / "logs").is_dir()
    assert b"pipe.load_lora_weights('tester/run', " in repo.files["README.md"]


def test_a_run_begins_with_a_lora_on_the_hub(train, hub, tmp_path, monkeypatch):
    """Of the files that are there, the one for diffusers."""
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    first = train("first", push_to_hub=True, output_kohya_format=True, learning_rate=1e-3, **SHORT)
    options = {"rank": None, "learning_rate": 1e-30, "cache_dir": tmp_path / "cache", **SHORT}
    second = train("second", lora_init="tester/first", **options)
    assert_same(lora(second), lora(first), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "token", "named"),
    [
        ({}, "hf_wrong", "401"),
        ({}, None, "401"),
        ({"hub_model_id": "somebody/lora"}, True, "403"),
        ({"hub_model_id": "somebody/readable"}, True, "403"),
        ({"hub_model_id": "tester/public", "hub_private_repo": True}, True, "--hub_private_repo"),
        ({"hub_model_id": "a/b/c"}, True, "a/b/c"),
    ],
    ids=["bad_token", "no_token", "foreign", "foreign_readable", "public", "bad_name"],
)
def test_a_hub_that_refuses_ends_the_run_before_it_begins(refused, no_models, hub, monkeypatch, options, token, named):
    point_client_at(monkeypatch, hub, token)
    hub.repos["tester/public"], hub.repos["somebody/readable"] = Repo(private=False), Repo()
    message = refused(push_to_hub=True, **options)
    assert "--push_to_hub" in message and named in message and "hf_wrong" not in message
    assert set(hub.repos) == {"tester/public", "somebody/readable"}


def test_no_repository_is_made_for_a_run_that_cannot_start(refused, no_models, hub):
    refused(push_to_hub=True, label_column="nothing")
    assert not hub.requests


def test_a_failed_upload_keeps_everything_and_says_how_to_repeat_it(train, hub, caplog, tmp_path):
    hub.fail_commits = 403
    with pytest.raises(SystemExit) as stop:
        train(push_to_hub=True, hub_model_id="tester/elsewhere", **VALIDATION, **SHORT)
    assert stop.value.code == 1 and hub.repos["tester/elsewhere"].files == {}
    command = shlex.split(caplog.text.strip().splitlines()[-1])
    assert command[:3] == ["hf", "upload", "tester/elsewhere"]

    hub.fail_commits = 0
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf, *command[1:]], env={**os.environ, **hub.environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.repos["tester/elsewhere"].files == on_disk(tmp_path / "run")


def test_the_token_is_nowhere(train, hub, caplog, capfd, monkeypatch):
    """Not in a checkpoint, a log, a tracker, the card, the configuration, what is pushed; nor in a failure's text."""
    hub.token = "hf_planted_" + "x" * 20
    point_client_at(monkeypatch, hub)
    hub.fail_commits = 403
    with pytest.raises(SystemExit):
        train("failing", push_to_hub=True, **SHORT)
    hub.fail_commits = 0
    output_dir = train(push_to_hub=True, report_to="tensorboard", **VALIDATION, **SHORT)
    printed = capfd.readouterr()
    for text in (printed.out, printed.err, caplog.text):
        assert hub.token not in text
    files = [path for path in output_dir.parent.rglob("*") if path.is_file()]
    assert len(files) > 15 and not any(hub.token.encode() in path.read_bytes() for path in files)
    assert not any(hub.token.encode() in content for content in hub.repos["tester/run"].files.values())
    used = {request.authorization for request in hub.requests if request.method == "POST"}
    assert used == {f"Bearer {hub.token}"}
