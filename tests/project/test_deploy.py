"""What `deploy/` and the pages in docs/deploy/ say fits the server; nginx and systemd check their
files where they are installed."""

import ast
import configparser
import http.client
import importlib
import json
import re
import shlex
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from glm2_jax.cli import main as cli
from glm2_jax.runtime import compile_cache
from infer.batching.options import TOKENS_PER_PREFILL, TOKENS_PER_PREFILL_ON_CPU
from infer.serve import fields, schema
from infer.serve.options import AddressOptions, RequestOptions, parser
from tests.project.test_commands import SERVING
from tests.support.pages import commands
from tests.support.paths import ROOT
from tests.support.serve import serving

DEPLOY = ROOT / "deploy"
ALL = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs/deploy").glob("*.md"))}
PAGES = [ALL["server.md"], ALL["server.zh.md"]]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES = tuple(COMPOSE["services"].values())
NGINX = (DEPLOY / "nginx.conf").read_text("utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
UNIT = configparser.ConfigParser(strict=False, interpolation=None)
UNIT.optionxform = str  # type: ignore[assignment]
UNIT.read(DEPLOY / "glm2-serve.service")
SERVICE = UNIT["Service"]


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


def command_lines() -> list[list[str]]:
    """The flags of every command line of the server in the files and pages."""
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    started = [json.loads(entry)[2:], shlex.split(SERVICE["ExecStart"])[2:]]
    composed = [service["command"] for service in SERVICES]
    text = "\n".join(page.replace("\\\n", "") for page in ALL.values())
    shown = re.findall(r"(?:glm2 serve|python -m infer\.serve)([^\n|&#`]*)", text)
    return [*started, *composed, *map(shlex.split, dict.fromkeys(shown))]


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_the_server_takes_the_flags_of_a_command_line(words):
    parser().parse_args(words)


def quoted(page: str) -> Counter[str]:
    return Counter(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)))


@pytest.mark.parametrize("name", ["containers", "security", "server", "tpu"])
def test_both_languages_say_the_same(name):
    english, chinese = ALL[f"{name}.md"], ALL[f"{name}.zh.md"].replace(".zh.md", ".md")
    code = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    assert code.findall(english) == code.findall(chinese)
    assert quoted(english) == quoted(chinese)
    links = re.compile(r"\]\(([^)#]+)")
    assert links.findall(english)[1:] == links.findall(chinese)[1:]  # but those to each other
    numbers = [Counter(re.findall(r"\d[\d.,]*\b", page)) for page in (english, chinese)]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("page", PAGES, ids=("en", "zh"))
def test_the_page_says_what_becomes_of_each_field(page):
    parts = re.split(r"^\*\*.+?\*\*", page.split("\n## ")[4], flags=re.MULTILINE)[1:]
    honoured, _, harmless, refused, _ = ({*re.findall(r"`([^`]+)`", part)} for part in parts)
    bodies = schema.ChatBody, schema.CompletionBody
    assert {name for body in bodies for name in body.model_fields} <= honoured | {"stream_options"}
    assert fields.HARMLESS == harmless - {"stream_options"}
    assert {*fields.REFUSED} == refused - {"min_p: 0", "/v1/completions"}


@pytest.mark.parametrize("page", PAGES, ids=("en", "zh"))
def test_the_page_names_the_defaults_of_flags(page):
    shown = re.findall(r"^\| `(--[\w-]+)` \| (\d+|\w+) \|", page, flags=re.MULTILINE)
    numbers = {name: float(value) for name, value in shown if value.isdecimal()}
    assert len(numbers) >= 3
    known = {name: action.default for action in parser()._actions for name in action.option_strings}
    assert numbers == {name: known[name] for name in numbers}
    assert all(name in page for name in ("`--preset` | openai", "`--log-level` | info"))
    (line,) = re.findall(r"^\| `--tokens-per-prefill` \| ([^|]+) \|", page, flags=re.MULTILINE)
    sizes = TOKENS_PER_PREFILL, TOKENS_PER_PREFILL_ON_CPU
    assert re.findall(r"\d+", line) == [str(size) for size in sizes]


def test_the_pages_list_every_route_and_every_metric():
    with serving("ok") as served:
        paths = served.request("GET", "/openapi.json").json()["paths"]
        metrics = served.request("GET", "/metrics").text
    routes = {f"{method.upper()} {path}" for path in paths for method in paths[path]}
    names = set(
        re.findall(r"^# TYPE (vllm:\S+) (?:gauge|counter|histogram)$", metrics, re.MULTILINE)
    )
    names = {name for name in names if not name.endswith("_created")}
    for page in PAGES:
        rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
        told = set(re.findall(r"`((?:GET|POST) [^`]+)`", "".join(rows)))
        own = {"GET /openapi.json", "GET /", "GET /static/..."}
        assert routes == told - own
        assert names == {name for name in quoted(page) if name.startswith("vllm:")}


def test_there_is_time_and_space_for_what_the_server_allows():
    answer, body = RequestOptions().request_timeout, RequestOptions().max_body_bytes
    waits = [SERVICE["TimeoutStopSec"], *re.findall(r"proxy_read_timeout (\w+);", NGINX)]
    waits += [service["stop_grace_period"] for service in SERVICES]
    assert len(waits) == 4 and all(float(wait.removesuffix("s")) > answer for wait in waits)
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", NGINX)
    assert body <= int(megabytes) * 2**20 < 2 * body


def test_all_use_the_port_of_the_server():
    port = AddressOptions().port
    place = f"127.0.0.1:{port}"
    assert f"server {place};" in NGINX
    assert f"EXPOSE {port}\n" in DOCKERFILE and f"http://{place}/health" in DOCKERFILE
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": [place]}]
    assert [service["ports"] for service in SERVICES] == [[f"{place}:{port}"]] * 2


def test_systemd_knows_the_exit_codes():
    assert SERVICE["SuccessExitStatus"] == str(cli.EXIT_TERMINATED)
    final = {int(code) for code in SERVICE["RestartPreventExitStatus"].split()}
    assert {cli.EXIT_USAGE, cli.EXIT_INPUT} < final and cli.EXIT_DEVICE not in final


def test_compiled_programs_go_where_writing_is_allowed():
    variable = compile_cache.VARIABLE
    assert f"{variable}=%C/{SERVICE['CacheDirectory']}" in SERVICE["Environment"].split()
    assert f"{variable}=/cache" in DOCKERFILE.split() and "\nVOLUME /cache\n" in DOCKERFILE
    for service in SERVICES:
        assert service["read_only"] and service["volumes"][1]["target"] == "/cache"


def test_the_image_is_made_of_what_is_there():
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    about, extras = project["project"], project["project"]["optional-dependencies"]
    kept = {name.partition(".")[0] for name in found} | {"pyproject.toml", about["readme"]}
    assert {line[1:] for line in lines if line[:1] == "!"} == kept | {*about["license-files"]}
    named = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE)
    named += [service["build"].get("args", {"EXTRAS": "serve"})["EXTRAS"] for service in SERVICES]
    assert {extra for names in named for extra in names.split(",")} == {"serve", "cuda"} & {*extras}
    assert re.search(r"^USER [1-9]\d*:[1-9]", DOCKERFILE.split("FROM ")[-1], re.MULTILINE)


def test_the_example_of_ray_imports_what_there_is():
    tree = ast.parse((DEPLOY / "ray_serve.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith(("infer", "glm2_jax"))]
    assert ours
    for node in ours:
        module = importlib.import_module(str(node.module))
        assert all(hasattr(module, alias.name) for alias in node.names), node.module


@needs("curl")
def test_the_commands_of_the_readme(tmp_path):
    """A server in a process of its own answers, and ends as its supervisor asks."""
    start, ask = SERVING
    assert {start, ask} <= set(commands("README.md"))
    words = [sys.executable, *start.split()[1:], "--port", "0", "--slots", "2"]
    command = [*words, "--max-length", "128", "--compile-cache", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"API http://(127\.0\.0\.1:\d+)/v1", line):
                ask = ask.replace(f"127.0.0.1:{AddressOptions().port}", found[1])
                done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
                process.terminate()
        assert process.wait() == cli.EXIT_TERMINATED, "".join(lines)
    answer = json.loads(done.stdout)["choices"][0]
    assert answer["message"]["content"].strip() and answer["finish_reason"] in ("stop", "length")


@needs("systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    text = (DEPLOY / "glm2-serve.service").read_text("utf-8")
    assert "\nMemoryDenyWriteExecute" not in text  # nothing could be compiled
    unit = tmp_path / "glm2-serve.service"
    unit.write_text(text.replace("/opt/glm2/bin/glm2", shutil.which("true") or ""))
    shutil.copytree(DEPLOY / "glm2-serve.service.d", tmp_path / "glm2-serve.service.d")
    verify = ["systemd-analyze", "--man=no", "verify", str(unit)]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class _Upstream(BaseHTTPRequestHandler):
    """Stands in for the server: the second event of its stream waits for the first's reader."""

    protocol_version = "HTTP/1.1"
    read = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in ("first", "second"):
            event = f"data: {text}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            assert self.read.wait(30)
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        body = json.dumps(dict(self.headers.items())).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "a socket of this machine"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[Path]:
    """A folder with the sockets of nginx, `http` and `https`, in front of an `_Upstream`."""
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not installed")
    with tempfile.TemporaryDirectory() as name:  # a short name: the path of a socket is limited
        folder = Path(name)
        certificate = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=chat.example.com"
        files = ["-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"]
        subprocess.run(["openssl", *certificate.split(), *files], check=True, capture_output=True)
        site = re.sub(r" *listen \[.*\n", "", NGINX)
        for old, new in (
            ("/etc/letsencrypt/live/chat.example.com/", f"{folder}/"),
            ("listen 80", f"listen unix:{folder}/http"),
            ("listen 443", f"listen unix:{folder}/https"),
            ("server 127.0.0.1:8000", f"server unix:{folder}/upstream"),
        ):
            assert old in site
            site = site.replace(old, new)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; events {{}}"
            f"http {{ access_log off; {temporary}\n{site} }}"
        )
        with upstream(folder / "upstream"), nginx(folder):
            yield folder


@contextmanager
def upstream(place: Path) -> Iterator[None]:
    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(str(place), _Upstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@contextmanager
def nginx(folder: Path) -> Iterator[None]:
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for _ in range(300):
            if (folder / "https").exists() or process.poll() is not None:
                break
            threading.Event().wait(0.1)
        assert process.poll() is None
        yield
        process.terminate()


@contextmanager
def connection(place: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection through the socket of nginx at `place`."""
    client = http.client.HTTPConnection("chat.example.com", timeout=30)
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(30)
    plain.connect(str(place))
    client.sock = plain
    if place.name == "https":
        context = ssl.create_default_context(cafile=str(place.parent / "fullchain.pem"))
        client.sock = context.wrap_socket(plain, server_hostname="chat.example.com")
    try:
        yield client
    finally:
        client.close()


def test_nginx_passes_each_event_on_when_it_comes(proxy):
    with connection(proxy / "https") as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        response = client.getresponse()
        assert response.readline() == b"data: first\n"  # while the second is not written yet
        _Upstream.read.set()
        assert response.read() == b"\ndata: second\n\n"


def test_nginx_names_the_client_and_the_host(proxy):
    with connection(proxy / "https") as client:
        client.request("GET", "/v1/models", headers={"X-Forwarded-For": "192.0.2.1"})
        seen = json.loads(client.getresponse().read())
    assert seen["Host"] == "chat.example.com" and "192.0.2.1" not in seen["X-Forwarded-For"]


def test_nginx_redirects_to_https(proxy):
    with connection(proxy / "http") as client:
        client.request("GET", "/v1/models")
        response = client.getresponse()
    assert response.status == 301
    assert response.headers["Location"] == "https://chat.example.com/v1/models"


def test_nginx_refuses_what_the_server_would(proxy):
    with connection(proxy / "https") as client:
        client.request("POST", "/v1/chat/completions", headers={"Content-Length": str(10**8)})
        response = client.getresponse()
        error = json.loads(response.read())["error"]
    assert response.status == 413 and error["type"] == "invalid_request_error"
    with connection(proxy / "https") as client:
        client.request("GET", "/metrics")
        assert client.getresponse().status == 404
