"""The real Hugging Face client against the Hub on loopback."""

import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from conftest import encode, random_image
from httpx2 import ConnectError
from hub_server import HubServer, point_client_at
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

CARD = "---\nlicense: mit\ntags:\n- lora\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        point_client_at(monkeypatch, server)
        yield server


@pytest.fixture
def folder(tmp_path):
    """Folder with a model card, weights and a picture, and a checkpoint that nobody wants uploaded."""
    folder, rng = tmp_path / "folder", np.random.default_rng(0)
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "x.safetensors").write_bytes(rng.bytes(50_000))
    (folder / "image_0.png").write_bytes(encode(random_image(rng)))
    (folder / "checkpoint-1" / "optimizer.bin").write_bytes(rng.bytes(1000))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def called(hub):
    return [f"{request.method} {request.path}" for request in hub.requests]


def test_the_token_says_who_it_is(hub):
    assert HfApi(endpoint=hub.endpoint, token=hub.token).whoami()["name"] == "tester"
    assert huggingface_hub.whoami()["name"] == "tester"  # by HF_TOKEN, at the module's own endpoint
    assert {request.authorization for request in hub.requests} == {f"Bearer {hub.token}"}


@pytest.mark.parametrize("private", [True, False, None])
def test_repositories_are_created_as_asked_and_once(hub, private):
    url = huggingface_hub.create_repo("model", private=private)
    assert (url, url.repo_id) == (f"{hub.endpoint}/tester/model", "tester/model")
    assert hub.repos["tester/model"].private is private
    assert huggingface_hub.create_repo("tester/model", private=not private, exist_ok=True).repo_id == "tester/model"
    assert hub.repos["tester/model"].private is private
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        huggingface_hub.create_repo("tester/model")
    assert error.value.response.status_code == 409


def test_a_folder_arrives_as_it_is_on_disk(hub, folder):
    before = contents(folder)
    repo_id = huggingface_hub.create_repo("model").repo_id
    info = huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="End of training")
    assert info.oid == hub.repos[repo_id].sha
    assert info.repo_url.repo_id == repo_id
    assert hub.repos[repo_id].files == contents(folder) == before
    assert hub.repos[repo_id].commits == ["End of training"]
    assert len(hub.objects) == 2  # x.safetensors and optimizer.bin went by LFS, the others within the commit
    huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder)  # nothing has changed
    assert len(hub.repos[repo_id].commits) == 1


def test_only_files_of_allowed_patterns_are_sent(hub, folder):
    huggingface_hub.create_repo("model")
    huggingface_hub.upload_folder(
        repo_id="tester/model", folder_path=folder, allow_patterns=["README.md", "*.safetensors"],
        ignore_patterns=["checkpoint-*/*"],
    )  # fmt: skip
    assert hub.repos["tester/model"].files.keys() == {"README.md", "x.safetensors"}


def test_a_card_with_broken_metadata_stops_the_upload(hub, folder):
    huggingface_hub.create_repo("model")
    (folder / "README.md").write_text("---\ntags: [lora\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        huggingface_hub.upload_folder(repo_id="tester/model", folder_path=folder)
    assert called(hub) == ["POST /api/repos/create", "POST /api/validate-yaml"]


@pytest.mark.parametrize("token", ["hf_other", None])
def test_without_the_right_token_nothing_is_done(monkeypatch, hub, token):
    point_client_at(monkeypatch, hub, token=token)
    for exist_ok in (False, True):
        with pytest.raises(HfHubHTTPError, match="Invalid") as error:
            huggingface_hub.create_repo("model", exist_ok=exist_ok)
        assert type(error.value) is HfHubHTTPError and error.value.response.status_code == 401
    with pytest.raises(
        HfHubHTTPError if token else OSError, match="Invalid user token" if token else "Token is required"
    ):
        huggingface_hub.whoami()
    assert not hub.repos


def test_foreign_and_missing_repositories_are_refused(hub, folder):
    for exist_ok in (False, True):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights") as error:
            huggingface_hub.create_repo("other/model", exist_ok=exist_ok)
        assert type(error.value) is HfHubHTTPError
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.upload_folder(repo_id="tester/missing", folder_path=folder)


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_commit_that_fails_leaves_no_file(hub, folder, status):
    huggingface_hub.create_repo("model")
    hub.fail_commits = status
    with pytest.raises(HfHubHTTPError, match="Commit refused") as error:
        huggingface_hub.upload_folder(repo_id="tester/model", folder_path=folder)
    assert error.value.response.status_code == status
    assert hub.objects and not hub.repos["tester/model"].files


def test_an_upload_that_fails_leaves_no_file(hub, folder):
    huggingface_hub.create_repo("model")
    hub.fail_uploads = 403
    with pytest.raises(RuntimeError, match="Error while uploading") as error:
        huggingface_hub.upload_folder(repo_id="tester/model", folder_path=folder)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert not hub.objects and not hub.repos["tester/model"].files


def test_a_closed_server_refuses_connections(monkeypatch):
    with HubServer() as server:
        point_client_at(monkeypatch, server)
        huggingface_hub.whoami()
    with pytest.raises(ConnectError):
        huggingface_hub.create_repo("model")


def test_pointing_the_client_elsewhere_ends_with_the_test(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with HubServer() as server, pytest.MonkeyPatch.context() as inner:
        point_client_at(inner, server)
        huggingface_hub.whoami()
        inner.undo()
        assert huggingface_hub.constants.ENDPOINT != server.endpoint != huggingface_hub.hf_api.api.endpoint
        with pytest.raises(OfflineModeIsEnabled):
            HfApi(endpoint=server.endpoint, token=server.token).whoami()
    assert len(server.requests) == 1


def test_environment_variables_point_a_subprocess_at_the_server(folder):
    program = (
        "import sys, huggingface_hub as h; r = h.create_repo('model', private=True).repo_id; "
        "h.upload_folder(repo_id=r, folder_path=sys.argv[1])"
    )
    with HubServer() as server:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **server.environment}
        subprocess.run([sys.executable, "-c", program, folder], env=environment, check=True, capture_output=True)
        assert server.repos["tester/model"].private is True
        assert server.repos["tester/model"].files == contents(folder)
