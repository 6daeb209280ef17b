"""Indexes, fitted methods and model sets in folders and on the Hub, and the cards that go with them"""
import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT

from lps.core.files import save_tensors
from lps.methods.registry import embed_models, fit_method
from lps.models.modelset import load_modelset
from lps.nets.resnet import ResNet
from lps.index.index import ModelIndex
from lps.index.share import card, from_pretrained, push_to_hub, save_pretrained

RESULT = ROOT/"results/table1-modelset500-cifar100-epoch80.json"


@pytest.fixture(scope="module")
def models():
    models = load_modelset("bundled")
    return models[(models.labels < 3).numpy()]


@pytest.fixture(scope="module")
def fitted(models): return fit_method(models, "lps", n_filters=4, epochs=1, milestones=())


@pytest.fixture(scope="module")
def things(models, fitted): return dict(index=ModelIndex(fitted, models), method=fitted, modelset=models)


def check_same(thing, again, models):
    "Does what came back do the same?"
    if isinstance(thing, ModelIndex):
        assert again.query(models[0], k=3).equals(thing.query(models[0], k=3))
    elif thing is models: assert again.digests == models.digests and again.tasks == models.tasks
    else: assert torch.equal(embed_models(again, models), embed_models(thing, models))


@pytest.mark.parametrize("kind", ["index", "method", "modelset"])
def test_a_folder_gives_back_what_went_in(things, models, kind, tmp_path):
    save_pretrained(things[kind], tmp_path/"shared", licence="mit", records=[RESULT])
    check_same(things[kind], from_pretrained(tmp_path/"shared"), models)
    assert json.loads((tmp_path/"shared/lps.json").read_text())["kind"] == kind
    said = (tmp_path/"shared/README.md").read_text()
    assert said.startswith('---\nlicense: "mit"\n') and "LPS: Frobenius + FC, with alignment" in said


def test_whole_networks_go_into_files_of_their_own(tmp_path):
    for i in range(2):
        save_tensors(tmp_path/f"zoo/m{i}.safetensors", ResNet(depth=8, width=4).state_dict(), dict(task=i))
    models = load_modelset(tmp_path/"zoo")
    again = from_pretrained(save_pretrained(models, tmp_path/"shared"))
    assert again.digests == models.digests and again[1].net.depth == 8
    assert "2 models of 2 tasks" in (tmp_path/"shared/DATASHEET.md").read_text()


def test_the_card_has_the_figures_of_the_result_file_and_what_speaks_against_them(things, tmp_path):
    record = json.loads(RESULT.read_text())
    dirty = tmp_path/"table1-toys.json"
    dirty.write_text(json.dumps(record | dict(commit=record["commit"] + "+changes")))
    said = card(things["index"], "org/market", records=[dirty])
    for name, row in record["summary"].items(): assert f"| {name} | {' | '.join(row.values())} |" in said
    assert record["commit"] in said and "measured from an uncommitted tree" in said
    assert "from_pretrained('org/market')" in said and 'license: "unknown"' in said
    assert "Tiny" in said or "tiny" in said, "the terms of the images"


def test_the_hub_reads_the_card(things):
    hub = pytest.importorskip("huggingface_hub")
    said = hub.ModelCard(card(things["index"], "org/market", "apache-2.0", [RESULT]))
    assert said.data.license == "apache-2.0" and said.data.library_name == "lps" and "index" in said.data.tags


def test_a_folder_with_files_in_it_is_left_alone(things, tmp_path):
    (tmp_path/"mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="choose another folder"): save_pretrained(things["method"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("said, words", [
    ('{"kind": "other", "lps": "9"}', "holds 'other', this version of lps reads index, method, modelset"),
    ('{"lps": "9"}', "field 'kind' is missing"),
    ("[", "is not JSON"),
    ('{"kind": "method", "lps": "0"}', "no model file"),
])
def test_a_folder_that_lies_is_refused(tmp_path, said, words):
    (tmp_path/"lps.json").write_text(said)
    with pytest.raises((ValueError, FileNotFoundError), match=words): from_pretrained(tmp_path)


def test_a_missing_package_is_named(things, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_to_hub(things["method"], "org/net"), lambda: from_pretrained("org/net")):
        missing = r"not installed: pip install 'learnable-parameter-similarity\[hub\]'"
        with pytest.raises(ImportError, match=missing): call()


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as it takes to push to a repository and to open it; files by repository, requests by path"
    files, asked, commit = {}, {}, "0"*40

    def log_message(self, *args): pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        first, *rest = map(json.loads, body.splitlines())
        self.asked.setdefault(self.path, []).append((self.headers.get("Authorization"), first))
        if self.path == "/api/repos/create": return self.send(dict(url=self.address(f"org/{first['name']}")))
        if "/preupload/" in self.path:
            files = [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in first["files"]]
            return self.send(dict(files=files))
        if "/commit/" not in self.path: return self.send({})
        added = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in rest}
        self.files[self.repo()] = added
        self.send(dict(commitUrl=self.address(f"{self.repo()}/commit/{self.commit}"), commitOid=self.commit))

    def do_GET(self):
        self.asked.setdefault(self.path, []).append((self.headers.get("Authorization"), None))
        files = self.files.get(self.repo(), {})
        if "/revision/" in self.path: return self.send(dict(id=self.repo(), sha=self.commit))
        if "/tree/" in self.path:
            return self.send([dict(type="file", path=path, size=len(files[path]), oid=path) for path in files])
        data = files.get(self.path.split("/", 5)[-1])
        if data is None: return self.send_error(404)
        self.send(data, ETag=hashlib.sha256(data).hexdigest(), **{"X-Repo-Commit": self.commit})

    do_HEAD = do_GET

    def repo(self): return "/".join(self.path.removeprefix("/api/models").split("/")[1:3])

    def address(self, place): return f"http://{self.headers['Host']}/{place}"

    def send(self, body, **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(200)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)


@pytest.fixture
def server():
    "A Hub on this machine, and its class with what it was sent"
    kind = type("Kind", (Hub,), dict(files={}, asked={}))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


PUSH_AND_OPEN = """
import sys
from huggingface_hub import constants
from lps.index.share import from_pretrained, push_to_hub, save_pretrained
for kind in ('index', 'method', 'modelset'):
    print(push_to_hub(from_pretrained(kind), f'org/{kind}', 'mit', [sys.argv[1]], private=True, token='hf_mine'))
    save_pretrained(from_pretrained(f'org/{kind}', revision='v1', token='hf_mine'), f'opened/{kind}')
constants.HF_HUB_OFFLINE = True
for kind in ('index', 'method', 'modelset'): save_pretrained(from_pretrained(f'org/{kind}', 'v1'), f'cached/{kind}')
"""


def test_what_is_pushed_can_be_opened(things, models, tmp_path, server):
    "At another address than the usual one; then from the cache, offline"
    pytest.importorskip("huggingface_hub")
    address, hub = server
    for kind in things: save_pretrained(things[kind], tmp_path/kind, f"org/{kind}", "mit", [RESULT])
    there = dict(os.environ, HF_ENDPOINT=address, HF_HOME=str(tmp_path/"home"), PYTHONPATH=str(ROOT))
    call = [sys.executable, "-c", PUSH_AND_OPEN, str(RESULT)]
    done = subprocess.run(call, cwd=tmp_path, env=there, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{address}/org/{kind}/commit/{Hub.commit}" for kind in things]
    assert [said["visibility"] for _, said in hub.asked["/api/repos/create"]] == ["private"]*3
    for path, requests in hub.asked.items():
        if "/org/" in path: assert {token for token, _ in requests} == {"Bearer hf_mine"}, path
    for kind, thing in things.items():
        folder, sent = tmp_path/kind, hub.files[f"org/{kind}"]
        assert set(sent) == {path.name for path in folder.iterdir()}
        for file in ("README.md", "config.json", "lps.json"): assert sent[file] == (folder/file).read_bytes()
        assert sent["config.json"] == sent["lps.json"] and f"/api/models/org/{kind}/revision/v1" in hub.asked
        for again in ("opened", "cached"): check_same(thing, from_pretrained(tmp_path/again/kind), models)


def test_what_cannot_be_shared_makes_no_repository(things, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.ModelHubMixin, "push_to_hub", lambda *args, **kwargs: pytest.fail("sent"))
    with pytest.raises(TypeError, match="cannot be shared"): push_to_hub({}, "org/market")
    with pytest.raises(FileNotFoundError): push_to_hub(things["method"], "org/market", records=["none.json"])
