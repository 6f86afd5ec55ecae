"""A Hub on loopback: what the Hugging Face client calls to create a model repository, upload a folder, and read files.

It keeps what it receives in memory and answers errors with the Hub's statuses and headers. All files travel within the
commit. Left out: LFS and Xet, checks of cards, other users, data sets, branches, pull requests, deletions.
"""

import base64
import hashlib
import json
import re
import threading
from collections import namedtuple
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

USER = "tester"
Request = namedtuple("Request", "method path authorization")


@dataclass
class Repo:
    """`private` is None where the client left it to the Hub; `files` holds exact bytes, `commits` the messages."""

    private: bool | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An error as the Hub answers it: message and code in headers, and the message in the JSON body too."""

    def __init__(self, status, message, code=None, **body):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class HubServer:
    """Context manager that serves on a free port; `fail_commits` is a status to refuse commits with, such as 403."""

    def __init__(self, token="hf_token_of_tester"):
        self.token, self.fail_commits = token, 0
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    @property
    def environment(self):
        """Variables that point a subprocess's client at this server, logged in as the user."""
        settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, **settings}

    def answer(self, request, body):
        """JSON for a request, or a Refusal."""
        if request.authorization != f"Bearer {self.token}":
            wrong = "credentials in Authorization header" if request.authorization else "username or password."
            raise Refusal(401, f"Invalid {wrong}")
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, request.path.split("?")[0])
            if match and method == request.method:
                return action(self, body, *match.groups())
        raise Refusal(404, f"Sorry, there is no {request.method} {request.path} here.")

    def create(self, body):
        asked = json.loads(body)
        if (namespace := asked.get("organization") or USER) != USER:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{asked['name']}"
        created = {"name": repo_id, "url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", **created)
        self.repos[repo_id] = Repo(private={"private": True, "public": False, None: None}[asked.get("visibility")])
        return created

    def find(self, repo_id, write=True):
        if repo_id not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not repo_id.startswith(f"{USER}/"):
            raise Refusal(403, "You have read access but not the required permissions for this operation")
        return self.repos[repo_id]

    def info(self, _, repo_id):
        repo = self.find(repo_id, write=False)
        files = [{"rfilename": name} for name in repo.files]
        return {"id": repo_id, "sha": "0" * 40, "private": bool(repo.private), "siblings": files}

    def file(self, _, repo_id, name):
        files = self.find(repo_id, write=False).files
        if name not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return files[name]

    def check_write(self, _, repo_id):
        self.find(repo_id)
        return {}

    def validate_yaml(self, _):
        return {"warnings": []}

    def preupload(self, body, repo_id):
        self.find(repo_id)
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def commit(self, body, repo_id):
        repo = self.find(repo_id)
        if self.fail_commits:
            raise Refusal(self.fail_commits, "Commit refused")
        header, *lines = (json.loads(line)["value"] for line in body.splitlines())
        repo.files |= {line["path"]: base64.b64decode(line["content"], validate=True) for line in lines}
        repo.commits.append(header["summary"])
        return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{'1' * 40}"}


ROUTES = [
    ("POST", "/api/repos/create", HubServer.create),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("GET", "/api/models/([^/]+/[^/]+)(?:/revision/main)?", HubServer.info),
    ("GET", "/api/models/([^/]+/[^/]+)/auth-check/write", HubServer.check_write),
    ("GET", "/([^/]+/[^/]+)/resolve/main/(.+)", HubServer.file),
    ("HEAD", "/([^/]+/[^/]+)/resolve/main/(.+)", HubServer.file),
    ("POST", "/api/models/([^/]+/[^/]+)/preupload/main", HubServer.preupload),
    ("POST", "/api/models/([^/]+/[^/]+)/commit/main", HubServer.commit),
]


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP/1.0, one request per connection, so that nothing is served after the server has closed."""

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, self.headers.get("Authorization"))
        if request.path != "/api/agent-harnesses":  # asked at most once per process, for the user agent
            self.hub.requests.append(request)
        try:
            status, headers, answer = 200, {}, self.hub.answer(request, body)
        except Refusal as refusal:
            status, headers, answer = refusal.status, refusal.headers, refusal.body
        if isinstance(answer, bytes):
            digest = hashlib.sha256(answer).hexdigest()
            headers = {"X-Repo-Commit": "1" * 40, "ETag": f'"{digest}"', "Content-Length": str(len(answer))}
        else:
            answer = json.dumps(answer).encode()
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(b"" if request.method == "HEAD" else answer)

    do_GET = do_HEAD = do_POST = respond

    def log_message(self, *args):
        """Says nothing on stderr."""


def point_client_at(monkeypatch, server, token=True):
    """Lets this process's client reach the server and nothing else; logs in with its token, another, or None."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/dev/null")
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # huggingface_hub.create_repo etc. are its methods
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT", None)  # the client made before has read the proxies that were set
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", server.token if token is True else token or "")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "")
