"""Models on the web: a server that honours ranges, one that does not, and some that lie"""
import http.server
import json
import re
import socket
import threading
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from lps.models import web as remote
from lps.index.gather import embed_items, find_models
from lps.models.inspect import inspect_model
from lps.models.read import Reading, read_model
from lps.methods.registry import why_not
from lps.methods.registry import embed_models, fit_method
from lps.models.model import Model
from lps.models.modelset import load_modelset
from lps.models.web import open_model, open_remote, remote_json
from lps.nets.resnet import ResNet


class Server(http.server.BaseHTTPRequestHandler):
    "Serves bytes by path; `how` says what is wrong with it"
    files, how, asked = {}, "", []

    def log_message(self, *args): pass

    def do_GET(self):
        data, wanted = self.files.get(self.path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.asked.append((self.path, self.headers.get("Range")))
        if self.how == "moves" and not self.path.startswith("/cdn"): return self.redirect(f"/cdn{self.path}")
        if self.how == "to a file": return self.redirect("file:///etc/passwd")
        if self.how == "to another kind": return self.redirect("ftp://127.0.0.1/m.safetensors")
        if self.path.startswith("/cdn"): data = self.files.get(self.path.removeprefix("/cdn"))
        if data is None: return self.send_error(404)
        if self.how == "private": return self.send_error(401)
        if wanted is None or self.how == "no ranges": return self.whole(data)
        return self.part(data, *map(int, wanted.groups()))

    def redirect(self, place):
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def whole(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def part(self, data, start, stop):
        body, size, first = data[start:stop + 1], len(data), start
        if self.how == "short": body = body[:-1]
        if self.how == "long": body += bytes(10)
        if self.how == "endless": body = bytes(50_000_000)
        if self.how == "elsewhere": first += 1
        if self.how == "size": size += 1
        if self.how == "huge": size = 10**18 - 1
        self.send_response(206)
        said = f'bytes {first}-{first + len(data[start:stop + 1]) - 1}/{"*" if self.how == "star" else size}'
        if self.how != "silent": self.send_header("Content-Range", said)
        self.send_header("ETag", f'"{len(self.asked)}"' if self.how == "changes" else '"same"')
        self.end_headers()
        try: self.wfile.write(body)
        except OSError: pass  # the reader had enough


@contextmanager
def serving(files, how=""):
    "The address of a server, and its class with what it was asked for"
    kind = type("Kind", (Server,), dict(files=files, how=how, asked=[]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return ResNet(depth=20, width=16).eval()


@pytest.fixture(scope="module")
def file(net): return safetensors.torch.save(net.state_dict(), dict(format="pt"))


def test_a_model_is_indexed_for_kilobytes(net, file, monkeypatch):
    "Its embedding is that of the whole model"
    with serving({"/org/net/resolve/main/model.safetensors": file}, "moves") as (address, kind):
        monkeypatch.setenv("HF_ENDPOINT", address)
        report = inspect_model("hf://org/net")
        model = report.model
    assert set(model.state) == {"conv1.weight", *(f"bn1.{v}" for v in NORM)}
    for name, tensor in model.state.items(): assert torch.equal(tensor, net.state_dict()[name])
    read = int(report.kind.partition(" ")[0].replace(",", ""))
    assert read < 60_000 < len(file) and report.norms == "21 batch normalisations" and report.head == "fc, 2 × 64"
    assert all(path.startswith("/cdn") or wanted is None or wanted.startswith("bytes=") for path, wanted in kind.asked)
    fitted = fit_method(models_of_two(), "lps", n_filters=4, epochs=1, milestones=())
    assert torch.equal(embed_models(fitted, model), embed_models(fitted, Model(net.state_dict(), {})))
    assert {"probes", "chain"} <= set(why_not(model)) and "stem-signature" not in why_not(model)
    with pytest.raises(ValueError, match="only conv1.weight, bn1.weight"): model.net


NORM = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"


def models_of_two():
    "Models of two tasks, such as come with the package"
    models = load_modelset("bundled")
    return models[(models.labels < 2).numpy()]


def test_all_of_a_model_where_it_is_asked_for(net, file):
    with serving({"/m.safetensors": file}) as (address, _):
        model = read_model(f"{address}/m.safetensors", Reading(whole=True))
    assert model.digest == Model(net.state_dict(), {}).digest and "lacks" not in model.meta
    x = torch.zeros(1, 3, 32, 32)
    assert torch.equal(model.net(x), net(x))


def test_shards_and_configurations(net, monkeypatch):
    "As the Hub has large models"
    state, base = net.state_dict(), "/org/net/resolve/main/"
    parts = {"a.safetensors": dict(list(state.items())[:60]), "b.safetensors": dict(list(state.items())[60:])}
    files = {f"{base}{name}": safetensors.torch.save(part) for name, part in parts.items()}
    index = {name: file for file, part in parts.items() for name in part}
    files[f"{base}model.safetensors.index.json"] = json.dumps(dict(weight_map=index)).encode()
    files[f"{base}preprocessor_config.json"] = json.dumps(dict(image_mean=[.5]*3, image_std=[.2]*3)).encode()
    files[f"{base}config.json"] = json.dumps(dict(id2label={"0": "cat", "1": "dog"})).encode()
    with serving(files) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        model = read_model("hf://org/net", Reading(whole=True))
    assert model.digest == Model(state, {}).digest
    assert model.meta["std"] == [.2]*3 and model.meta["classes"] == ["cat", "dog"]


def test_a_server_without_ranges_is_read_only_when_asked(net, file):
    with serving({"/m.safetensors": file}, "no ranges") as (address, kind):
        url = f"{address}/m.safetensors"
        with pytest.raises(ValueError, match="does not send ranges of bytes: pass download=True"): open_remote(url)
        found = open_remote(url, download=True)
        assert torch.equal(found.tensors(["fc.bias"])["fc.bias"], net.fc.bias) and len(kind.asked) == 3
        with pytest.raises(ValueError, match="sends more than the 1000 bytes"): open_remote(url, True, most=1000)


@pytest.mark.parametrize("how, words", [
    ("short", "bytes 0 to 32768 were requested, 32767 from 0 on were sent"),
    ("long", "sends more than the 32768 bytes"),
    ("endless", "sends more than the 32768 bytes"),
    ("elsewhere", "were requested"),
    ("silent", "the server sent no valid range"),
    ("star", "the server sent no valid range"),
    ("size", "follow its last tensor"),
    ("huge", "follow its last tensor"),
    ("changes", "it changed while it was read"),
])
def test_a_server_that_lies_is_refused(file, how, words):
    with serving({"/m.safetensors": file}, how) as (address, _):
        with pytest.raises(ValueError, match=words): open_remote(f"{address}/m.safetensors").tensors(["conv1.weight"])


@pytest.mark.parametrize("how, error, words", [
    ("private", OSError, "answered 401: a private model"),
    ("to a file", OSError, "answered 302"),
    ("to another kind", OSError, "no address on the web"),
])
def test_a_server_that_refuses_is_named(file, how, error, words):
    with serving({"/m.safetensors": file}, how) as (address, _):
        with pytest.raises(error, match=words): open_remote(f"{address}/m.safetensors")


def lying(said, length=None, body=b""):
    "A file with any header"
    text = json.dumps(said).encode()
    return (length or len(text)).to_bytes(8, "little") + text + body


def tensor(shape, start, end, dtype="F32"): return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


@pytest.mark.parametrize("data, words", [
    (b"", "no valid range|416|were requested"),
    (b"no weights", "not a safetensors file"),
    (lying({}, length=99_999_999), "truncated"),
    (lying({}, length=2**63), "not a safetensors file"),
    (lying({"a": tensor([2**31], 0, 2**33)}, body=bytes(64)), "truncated"),
    (lying({"a": tensor([3], 0, 64)}, body=bytes(64)), "not a safetensors file: a is"),
    (lying({f"{i}": tensor([0], 0, 0) for i in range(20_001)}), "too large: 20001 tensors"),
    (lying({"a": tensor([8], 0, 64, "X64")}, body=bytes(64)), "not a safetensors file"),
])
def test_a_header_that_lies_is_refused(data, words):
    with serving({"/m.safetensors": data}) as (address, _):
        with pytest.raises((ValueError, OSError), match=words): open_remote(f"{address}/m.safetensors").tensors(["a"])


def test_one_request_has_a_limit(file, monkeypatch):
    monkeypatch.setattr(remote, "MAX_RANGE", 100_000)
    with serving({"/m.safetensors": file}) as (address, _):
        found = open_remote(f"{address}/m.safetensors")
        with pytest.raises(ValueError, match="147456 bytes at once, 100000 are allowed"):
            found.tensors(["layer3.2.conv2.weight"])


def test_what_is_not_there_is_named(monkeypatch):
    index = b'{"weight_map": {"a": "../b"}}'
    files = {"/j": b"{", "/org/net/resolve/main/model.safetensors.index.json": index}
    with serving(files) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(FileNotFoundError, match="org/other has no model.safetensors"):
            read_model("org/other", Reading(hub=True))
        with pytest.raises(ValueError, match="no file beside it"): open_model("org/net")
        with pytest.raises(ValueError, match="is not JSON"): remote_json(f"{address}/j")
    with pytest.raises(OSError, match="cannot be reached"): open_remote(f"{address}/m.safetensors")
    with pytest.raises(OSError, match="org/net/.* cannot be reached"): read_model("hf://org/net")
    known = fit_method(models_of_two(), "stem-signature")
    (bad,), = [embed_items(known, [item]).bad.values() for item in find_models(["hf://org/net"])[0]]
    assert "org/net/resolve/main/model.safetensors cannot be reached" in bad and "Errno 5" not in bad


@pytest.mark.parametrize("source", ["org/net", "timm/resnet18", "runs/net.pt", "net"])
def test_a_path_that_does_not_exist_is_not_looked_up(source, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("a request to the network")
    for name in ("getaddrinfo", "create_connection"): monkeypatch.setattr(f"socket.{name}", refuse)
    for read in (read_model, inspect_model, find_models):
        with pytest.raises(FileNotFoundError, match=f"no model file or folder {source}"): read(source)


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_no_request_to_the_hub_if_the_user_forbids_it(monkeypatch, value):
    def refuse(*args, **kwargs): raise AssertionError("a request to the network")
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"): read_model("hf://org/net")


# Servers without a tag, and broken ones

class Raw(threading.Thread):
    "A server that sends the same bytes for every request, and closes the connection"
    def __init__(self, reply):
        super().__init__(daemon=True)
        self.reply, self.socket = reply, socket.create_server(("127.0.0.1", 0))

    def run(self):
        while True:
            try: connection, _ = self.socket.accept()
            except OSError: return
            with connection:
                connection.recv(65_536)
                connection.sendall(self.reply)

    @property
    def url(self): return f"http://127.0.0.1:{self.socket.getsockname()[1]}/m.safetensors"


PART = b"HTTP/1.1 206 Partial Content\r\n"
BROKEN = {
    "nothing": b"",
    "garbage": b"\x00\xff garbage\r\n\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"x"*100_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n"*1000 + b"\r\n",
    "cut body": PART + b"Content-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\nshort",
    "bad chunks": PART + b"Content-Range: bytes 0-99/100\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nshort",
    "bad length": PART + b"Content-Range: bytes 0-99/100\r\nContent-Length: many\r\n\r\nshort",
    "loop": b"HTTP/1.1 302 Found\r\nLocation: /m.safetensors\r\nContent-Length: 0\r\n\r\n",
    "bad redirect": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_server_gives_one_reason(kind):
    server = Raw(BROKEN[kind])
    server.start()
    for read in (open_remote, read_model):
        with pytest.raises((ValueError, OSError)) as error: read(server.url)
        assert "\n" not in str(error.value) and str(error.value).isprintable()
    server.socket.close()


@pytest.mark.parametrize("url", [
    "http://", "http://[::1", "http://127.0.0.1:port/m.safetensors", "http://127.0.0.1:99999/x", "http://a b/x",
    "https://exa\x00mple/x", "http:///x", "http://127.0.0.1:0/x", "http://xn--a" + "a"*300 + "/x", "http://a\nb/x",
])
def test_a_malformed_address_gives_one_reason(url):
    for read in (open_remote, read_model):
        with pytest.raises((ValueError, OSError), match="no address on the web|cannot be reached"): read(url)


def tagged(how):
    "A server whose file changes after each request"
    class Changing(Server):
        def part(self, data, start, stop):
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{min(stop + 1, len(data)) - 1}/{len(data)}")
            if how == "Last-Modified": self.send_header(how, f"Tue, 01 Dec 2026 00:00:{len(self.asked):02} GMT")
            self.end_headers()
            self.wfile.write(data[start:stop + 1])
    return Changing


@pytest.mark.parametrize("how", ["Last-Modified", "nothing"])
def test_without_an_etag_two_versions_are_not_mixed(net, file, monkeypatch, how):
    "By Last-Modified; without that, the file is read in one response"
    monkeypatch.setattr(f"{__name__}.Server", tagged(how))
    with serving({"/m.safetensors": file}) as (address, kind):
        if how == "nothing":
            found = open_remote(f"{address}/m.safetensors")
            assert torch.equal(found.tensors(["fc.bias"])["fc.bias"], net.fc.bias) and len(kind.asked) == 2
        else:
            found = open_remote(f"{address}/m.safetensors")
            with pytest.raises(ValueError, match="it changed"): found.tensors(["fc.bias"])


def test_a_redirect_into_a_private_network_is_refused(file, monkeypatch):
    monkeypatch.setattr(remote, "_is_private", lambda url: "/cdn" in url)
    with serving({"/m.safetensors": file}, "moves") as (address, kind):
        with pytest.raises(OSError, match="is in a private network"): open_remote(f"{address}/m.safetensors")
        assert len(kind.asked) == 1


@pytest.mark.parametrize("host, private", [
    ("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("10.0.0.1", True), ("169.254.169.254", True),
    ("192.168.1.1", True), ("[fe80::1]", True), ("2130706433", True), ("8.8.8.8", False),
])
def test_private_addresses(host, private): assert remote._is_private(f"http://{host}/x") is private
