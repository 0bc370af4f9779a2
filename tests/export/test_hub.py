"""`sclite export --push`: what a Hub receives, and its errors. The fake Hub speaks huggingface_hub's HTTP API."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sclite.config import Export
from sclite.errors import DONE, NETWORK, USAGE, NetworkError
from sclite.export.hub import open_repository
from sclite.records import Template
from sclite.run import Run
from tests.toy import random_adapter, sample_texts

TOKEN = "hf_abcdefghijklmnop"


class Hub:
    """A Hub with one user, whose token is TOKEN. `repos`: {"models/me/x": {"private": .., "files": {path: bytes}}}."""

    def __init__(self):
        self.repos, self.blobs, self.commits, self.puts = {}, {}, [], []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_any(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, found = hub.answer(self.command, self.path, self.headers, body)
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, headers, body):
        path = path.partition("?")[0]
        if method == "PUT":  # to the storage, whose addresses are signed
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self.blobs[oid] = body
            self.puts.append(oid)
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": f"Invalid user token {headers.get('Authorization')}"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlicense: ")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "me":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            kind = "datasets" if asked.get("type") == "dataset" else "models"
            name = f"{kind}/me/{asked['name']}"
            url = f"{self.url}/{name.removeprefix('models/')}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": url}
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[name] = {"private": private, "files": {}}
            return 200, {"url": url, "name": f"me/{asked['name']}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = []
            for found in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.url}/storage/{found['oid']}"}}
                objects.append(found if found["oid"] in self.blobs else found | {"actions": upload})
            return 200, {"transfer": "basic", "objects": objects}
        kind, owner, name, action, *_ = [*path.removeprefix("/api/").split("/"), ""]
        if f"{kind}/{owner}/{name}" not in self.repos:
            return 404, {"error": "Repository not found"}
        repo = self.repos[f"{kind}/{owner}/{name}"]
        files = repo["files"]
        if action == "preupload":
            rows = []
            for file in json.loads(body)["files"]:
                large = file["path"].endswith((".gguf", ".safetensors", ".model"))
                content = files.get(file["path"])
                oid = None
                if content is not None and large:
                    oid = hashlib.sha256(content).hexdigest()
                elif content is not None:
                    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                mode = "lfs" if large else "regular"
                rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return 200, {"files": rows}
        if action == "commit":
            changed = []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                changed += [value["path"]] if "path" in value else []
            self.commits.append(sorted(changed))
            url = f"{self.url}/{owner}/{name}/commit/{'0' * 40}"
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": url}
        if action in ("", "revision"):
            found = {"id": f"{owner}/{name}", "sha": "0" * 40, "tags": [], "downloads": 0}
            return 200, found | {"private": repo["private"]}
        raise AssertionError(path)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # not the chunked protocol of the real storage
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        yield hub


def test_pushed_gguf_card_and_modelfile_are_the_exported_bytes(sclite, student, hub):
    options = ("--push", "me/adder", "--quant", "q8_0,f16", "--set", f"student.model={student}", "--json")
    ended = sclite("export", *options, "--set", "export.license=mit")
    assert (ended.code, ended.error) == (DONE, "")
    assert json.loads(ended.out)["url"] == f"{hub.url}/me/adder"
    folder = Run("runs/default").path("export")
    names = ["Modelfile", "README.md", "base-f16.gguf", "base-q8_0.gguf"]
    repo = hub.repos["models/me/adder"]
    assert repo == {"private": True, "files": {name: (folder / name).read_bytes() for name in names}}
    assert repo["files"]["README.md"].startswith(b"---\nlicense: mit\n")
    assert hub.commits == [names]
    # again: nothing is sent; with another model card: only that
    assert sclite("export", *options, "--set", "export.license=mit").code == DONE
    assert hub.commits == [names]
    assert sclite("export", *options, "--set", "export.license=apache-2.0").code == DONE
    assert (hub.commits[1:], len(hub.puts)) == ([["README.md"]], 2)
    assert not [p for p in folder.parent.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_merged_folder_and_data_are_pushed_with_their_cards(sclite, student, hub):
    run = Run("runs/default")
    rows = [text.split("\n", 1) for text in sample_texts(3)]
    run.replace("templates.jsonl", [Template(id=q, question=q, trace=t, answer="1") for q, t in rows])
    options = ("--push", "me/x", "--set", f"student.model={student}")
    ended = sclite("export", "--format", "merged", *options, "--set", "export.private=false")
    assert f"Uploaded to {hub.url}/me/x" in ended.out
    assert "set export.license" in ended.err
    model = hub.repos["models/me/x"]
    merged = {p.name: p.read_bytes() for p in run.path("export/base-merged").iterdir()}
    assert model["files"] == merged
    written = [name for name in merged if name != "tokenizer.model"]  # written by SentencePiece
    assert not [name for name in written if str(student).encode() in merged[name]]  # no local paths
    assert not model["private"]
    assert b"library_name: transformers" in model["files"]["README.md"]
    assert b"vllm serve me/x" in model["files"]["README.md"]
    ended = sclite("export", "--format", "data", *options, "--json")
    assert json.loads(ended.out)["url"] == f"{hub.url}/datasets/me/x"
    data = hub.repos["datasets/me/x"]
    assert data["private"]
    assert data["files"]["templates.jsonl"] == run.path("export/data/templates.jsonl").read_bytes()
    assert sorted(data["files"]) == ["README.md", "dataset_info.json", "templates.jsonl"]


def test_pushed_adapter_has_a_card_that_names_its_base(sclite, student, hub, converter):
    folder = Run("runs/default").path("export")
    random_adapter(student, Run("runs/default").path("sft/adapter"), std=0.05, r=2, target_modules=["q_proj"])
    options = ("--push", "me/adder", "--set", f"student.model={student}")
    ended = sclite("export", "--format", "lora", *options)
    assert (ended.code, ended.error) == (DONE, "")
    said = r"^Checked .*: same next token: (99|100)\.\d% .KL 0.000"
    assert re.search(said, ended.out, re.M)
    files = hub.repos["models/me/adder"]["files"]
    exported = {"README.md": "sft-lora.md", "sft-lora.gguf": "sft-lora.gguf"}
    assert files == {name: (folder / path).read_bytes() for name, path in exported.items()}
    card = files["README.md"].decode()
    command = "llama-server -m BASE.gguf --lora sft-lora.gguf --temp 0"
    assert f"{command}  # BASE: {student.name}" in card
    assert "The chat template is that of BASE.gguf" in card
    assert "one used in training" not in card


@pytest.mark.parametrize(
    ("name", "token", "code", "message", "hint"),
    [
        ("adder", TOKEN, USAGE, "'adder' is not a repository name", "--push OWNER/NAME"),
        ("me/a b", TOKEN, USAGE, "'me/a b' is not a repository name", "--push OWNER/NAME"),
        ("me/adder", "", USAGE, "no Hugging Face Hub token found", "export HF_TOKEN=..."),
        ("me/adder", "hf_refused_refused", NETWORK, "the Hub rejects the token", "export HF_TOKEN=..."),
        ("me/public", TOKEN, USAGE, "me/public on the Hub is public", "export.private=false"),
        ("other/adder", TOKEN, NETWORK, "does not let this token write to other/adder", "OWNER/NAME"),
    ],
)
def test_push_that_cannot_succeed_fails_before_the_export(
    sclite, student, hub, monkeypatch, name, token, code, message, hint
):
    hub.repos["models/me/public"] = {"private": False, "files": {}}
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    ended = sclite("export", "--push", name, "--set", f"student.model={student}")
    assert ended.code == code
    assert message in ended.error
    assert hint in ended.hint
    assert "hf_" not in ended.err
    assert not Run("runs/default").path("export").exists()


def test_failing_network_or_storage_is_an_error_and_a_second_push_works(sclite, student, hub, monkeypatch):
    options = ("--push", "me/adder", "--quant", "f16", "--set", f"student.model={student}")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        ended = sclite("export", *options)
    assert (ended.code, "cannot upload to me/adder" in ended.error) == (NETWORK, True)
    answer = hub.answer
    broken = lambda method, *given: (403, {"error": "full"}) if method == "PUT" else answer(method, *given)  # noqa: E731
    monkeypatch.setattr(hub, "answer", broken)
    ended = sclite("export", *options)
    assert (ended.code, hub.repos["models/me/adder"]["files"]) == (NETWORK, {})
    assert Run("runs/default").path("export/base-f16.gguf").is_file()
    monkeypatch.setattr(hub, "answer", answer)
    assert sclite("export", *options).code == DONE
    assert "base-f16.gguf" in hub.repos["models/me/adder"]["files"]


def test_refusal_never_shows_a_token_from_a_file(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hf_from_a_file")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(NetworkError, match=r"rejects the token: .*Bearer \*\*\*"):
            open_repository(Export(push="me/x"))
