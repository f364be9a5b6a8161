"""Models by name: what is downloaded from a hub, what never is, and the errors."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import infer
from convert import from_pytorch, load_checkpoint
from convert.hub.find import find_model, needed_files
from glm2_jax import CheckpointError, InputError, UsageError
from glm2_jax.choices import SOURCES
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from infer import startup
from tests.support.checkpoints import TINY, write_official
from tests.support.commands import exit_code
from tests.support.hub_server import COMMIT, serving

NAME = "someone/tiny"
NEEDED = {
    "config.json",
    "tokenizer.model",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
}
SHARDS = sorted(name for name in NEEDED if name.endswith("-00002.bin"))


@pytest.fixture
def server(tmp_path):
    repository = write_official(tmp_path / "repository")
    for name in ("modeling_chatglm.py", "README.md", "notes.bin"):
        (repository / name).write_text("raise SystemExit('this must never be here')")
    with serving(repository) as running:
        yield running


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in, and clients in this process that know no other."""
    use(server.url, tmp_path / "cache", monkeypatch)
    return server


def use(url, cache, monkeypatch):
    environment, sleep = settings(url, cache), time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.suppress(ModuleNotFoundError):
        from huggingface_hub import constants

        # Read from the environment when the client is imported, which was earlier.
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "agents"), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def settings(url, cache):
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_CACHE": str(cache / "hf" / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(cache / "modelscope"),
        "MODELSCOPE_HOME": str(cache / "modelscope-home"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(params=SOURCES)
def source(request):
    package = {"hf": "huggingface_hub", "modelscope": "modelscope_hub"}[request.param]
    pytest.importorskip(package, reason=f"{package} is not installed (extra hub)")
    return request.param


@pytest.fixture
def hf():
    return pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def fails(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        find_model(*arguments, **keywords)
    return str(caught.value)


def test_only_what_is_needed_is_fetched(hub, source, capfd, monkeypatch):
    seen = []
    monkeypatch.setattr("convert.hub.find.Progress.__call__", lambda bar, done: seen.append(done))
    message = fails(CheckpointError, NAME)
    assert "no downloaded model" in message and "--source hf" in message and hub.requests == []
    folder = find_model(NAME, source=source)
    assert {path.name for path in folder.iterdir()} == NEEDED
    assert all((folder / name).read_bytes() == hub.files()[name] for name in NEEDED)
    assert {name for name, _ in hub.asked("GET") + hub.asked("HEAD")} == NEEDED
    output = capfd.readouterr()
    assert output.out == ""
    first, second = output.err.splitlines()  # and nothing from the client
    revision = COMMIT if source == "hf" else "master"
    assert first.startswith(NAME) and first.endswith(revision)
    assert second.startswith("downloading 1") and "kB into" in second
    sizes = {name: len(data) for name, data in hub.files().items()}
    assert sum(sizes[name] for name in SHARDS) <= seen[-1] <= sum(sizes[x] for x in NEEDED)
    assert seen == sorted(seen) and load_checkpoint(folder).config == TINY
    # Found by its name, without the network; again with a source, only the listing is asked for.
    hub.requests.clear()
    assert find_model(NAME) == folder
    if source == "hf":
        assert find_model(NAME, revision=COMMIT) == folder
    assert hub.requests == []
    assert find_model(NAME, source=source) == folder
    assert hub.asked("GET") == []


def test_the_token_stays_at_home(hub, hf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect, hub.cuts = True, dict.fromkeys(SHARDS, 1)
    folder = find_model(NAME, source="hf")
    assert all((folder / name).read_bytes() == hub.files()[name] for name in SHARDS)
    assert hub.strangers and set(hub.strangers) == {None}


def test_an_incomplete_copy(hub, source):
    folder = find_model(NAME, source=source)
    (folder / SHARDS[0]).resolve().unlink()
    hub.requests.clear()
    message = fails(CheckpointError, NAME)
    assert "not complete" in message and f"--source {source}" in message
    assert hub.requests == []
    assert find_model(NAME, source=source) == folder
    assert [name for name, _ in hub.asked()] == SHARDS[:1]
    (folder / "model.safetensors").write_bytes(b"of an earlier revision")
    message = fails(CheckpointError, NAME, source=source)
    assert "model.safetensors does not belong to the revision" in message


@pytest.mark.parametrize(("reset", "ranges"), [(False, True), (True, True), (False, False)])
def test_a_cut_connection_goes_on(hub, source, capfd, reset, ranges):
    hub.cuts, hub.reset, hub.ranges = dict.fromkeys(SHARDS, 1), reset, ranges
    folder = find_model(NAME, source=source)
    for name in SHARDS:
        assert (folder / name).read_bytes() == hub.files()[name]
        starts = [first for asked, first in hub.asked() if asked == name]
        assert len(starts) == 2 and starts[0] == 0
        assert starts[1] > 0 or reset  # a reset also loses what is unread in the buffers
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_connection_that_never_lasts(hub, hf):
    hub.cuts, hub.nothing = dict.fromkeys(SHARDS, 10**6), True
    assert "the connection broke" in fails(CheckpointError, NAME, source="hf")
    hub.cuts, hub.broken = {}, dict.fromkeys(SHARDS, b"")
    assert "the server sent nothing" in fails(CheckpointError, NAME, source="hf")


_INSPECT = """
from convert import inspect
from glm2_jax.cli import interrupt
interrupt.run(inspect.main)
"""


@pytest.mark.parametrize(
    ("source", "ending"),
    [("hf", signal.SIGTERM), ("hf", signal.SIGKILL), ("modelscope", signal.SIGKILL)],
    indirect=["source"],
)
def test_an_interrupted_download_continues_in_the_next_process(server, source, tmp_path, ending):
    """Through HF_ENDPOINT or MODELSCOPE_ENDPOINT, as a user names a mirror."""
    command = [sys.executable, "-c", _INSPECT, NAME, "--source", source, "--json"]
    environment = os.environ | settings(server.url, tmp_path / "cache")
    server.hold.clear()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(6000):
            if any(x.stat().st_size > 10_000 for x in tmp_path.rglob("*.incomplete")):
                break
            time.sleep(0.01)
        process.send_signal(ending)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == ({signal.SIGTERM: 143, signal.SIGKILL: -9}[ending], "")
    assert "Traceback" not in err
    server.hold.set()
    server.requests.clear()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] == TINY.num_params
    starts = [first for name, first in server.asked() if name in SHARDS]
    assert any(start > 10_000 for start in starts)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_damaged_file_is_not_kept(hub, source, monkeypatch):
    if source == "modelscope":  # tries again by itself
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    name = SHARDS[1]
    data = hub.files()[name]
    hub.broken = {name: data[:-1] + bytes([data[-1] ^ 1])}
    assert f"{name} arrived damaged" in fails(CheckpointError, NAME, source=source)
    hub.broken = {}
    folder = find_model(NAME, source=source)
    assert (folder / name).read_bytes() == hub.files()[name]


def test_a_full_disk(hub, source, tmp_path, monkeypatch):
    nearly_full = types.SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("glm2_jax.cli.files.shutil.disk_usage", lambda path: nearly_full)
        assert "1000 are free" in fails(InputError, NAME, source=source)
    assert not set(SHARDS) & {name for name, _ in hub.asked()}
    if source == "hf":  # where a part of a large file waits for the next process
        blobs = tmp_path / "cache" / "hf" / "hub" / "models--someone--tiny" / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(hub.files()[SHARDS[0]]).hexdigest()
        (blobs / f"{digest}.incomplete").symlink_to("/dev/full")
        message = fails(InputError, NAME, source="hf")
        assert "No space left" in message and "continues" in message


def test_two_processes_do_not_write_the_same_file(hub, hf):
    hub.hold.clear()
    threading.Timer(1, hub.hold.set).start()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: find_model(name, source="hf"), [NAME] * 2))
    assert load_checkpoint(found[0]).config == TINY and found[0] == found[1]
    assert sorted(name for name, _ in hub.asked() if name in SHARDS) == SHARDS


@pytest.mark.parametrize("name", ["modeling_chatglm.py", "../config.json"])
def test_an_index_that_names_code_is_refused(hub, source, name):
    index = hub.folder / "pytorch_model.bin.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["transformer.output_layer.weight"] = name
    index.write_text(json.dumps(value))
    assert "without a path" in fails(CheckpointError, NAME, source=source)
    assert {what for what, _ in hub.asked()} <= {"pytorch_model.bin.index.json", "config.json"}


def test_what_the_hub_does_not_have_or_refuses(hub, source, capfd):
    message = fails(CheckpointError, NAME, source=source, revision="v9")
    assert f"{NAME}, revision v9, was not found at" in message
    assert "not found" in fails(CheckpointError, "someone/other", source=source)
    refusals = [((403, "Other"), "refused"), ((200, "Welcome"), hub.url)]  # a login page
    if source == "hf":
        refusals += [((401, "RepoNotFound"), "not found"), ((403, "GatedRepo"), "is gated")]
        refusals += [((500, "Oops"), "500")]
    for refusal, expected in refusals:
        hub.refusal = refusal
        message = fails(CheckpointError, NAME, source=source)
        assert expected in message and hub.url in message
    assert capfd.readouterr().err == ""


def test_no_network(source, tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(url, tmp_path / "cache", monkeypatch)
    message = fails(CheckpointError, NAME, source=source)
    assert "cannot be reached" in message and url in message and "_ENDPOINT" in message
    assert capfd.readouterr().err == ""


def test_commands_and_the_engine_take_names(hub, hf, tmp_path, capfd, monkeypatch):
    assert exit_code(from_pytorch.main, NAME, tmp_path / "own", "--source", "hf") == 0
    assert load_checkpoint(tmp_path / "own").config == TINY
    off = EngineOptions(compile_cache="off")
    engine = startup.open_engine(ModelChoice(path=NAME, source="hf"), off)
    assert COMMIT in capfd.readouterr().err
    hub.requests.clear()
    again = infer.load(NAME)
    assert again.checkpoint.fingerprint == engine.checkpoint.fingerprint
    for choice in (ModelChoice(source="hf"), ModelChoice(revision="main")):
        with pytest.raises(UsageError, match="need --model"):
            startup.open_engine(choice, off)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert str(find_model(NAME, source="hf")) == again.checkpoint.summary.source
    message = fails(CheckpointError, "someone/other", source="hf")
    assert "HF_HUB_OFFLINE is set" in message and "Unset it" in message
    assert hub.requests == []


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "a/b/c", "../a", "a/..", "", "a/b\n", "a/" + "b" * 5000):
        assert "OWNER/NAME" in fails(UsageError, name, source="hf")
    for name in ("a/my--model", "a/v1..2", "a/b.git", "a/" + "b" * 120):  # of no model
        assert f"Folder {name} not found" in fails(CheckpointError, name)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert str(find_model(NAME)) == NAME
    assert str(find_model("no/such/folder")) == "no/such/folder"  # whoever opens it says so
    assert "is a path" in fails(UsageError, NAME, revision="main")
    assert "Known: hf, modelscope" in fails(UsageError, NAME, source="elsewhere")
    monkeypatch.setattr("convert.hub.find.open_clients", None)
    for source in (None, *SOURCES):
        for other, reason in (
            ("thudm/glm-4v-9b", "reads images"),
            ("zai-org/GLM-4.1V-9B-Thinking", "reads images"),
            ("zai-org/GLM-4.5-Air", "mixture of experts"),
            ("ZhipuAI/glm-4-voice-9b", "speech"),
            ("THUDM/glm-10b", "GPT-2"),
        ):
            assert reason in fails(CheckpointError, other, source=source)
        for revision in ("", "a/../b", "/a", "a b", "-x"):
            assert "is not a revision" in fails(UsageError, "a/b", source=source, revision=revision)


def test_the_client_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for package in ("huggingface_hub", "modelscope_hub"):
        monkeypatch.setitem(sys.modules, package, None)
    for module in ("huggingface", "modelscope"):
        monkeypatch.delitem(sys.modules, f"convert.hub.{module}", raising=False)
    for source in SOURCES:
        assert "Install it: pip install" in fails(UsageError, NAME, source=source)
    assert "no downloaded model" in fails(CheckpointError, NAME)


def test_the_client_is_broken(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('broken')")
    for module in ("huggingface_hub", "convert.hub.huggingface"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    message = fails(UsageError, NAME, source="hf")
    assert "huggingface_hub, which cannot be imported" in message and "broken" in message


BASE = ["config.json", "tokenizer.model"]
BIN, SAFE = "pytorch_model.bin.index.json", "model.safetensors.index.json"


def test_which_files_are_needed():
    for names, shards, found in (
        (["pytorch_model.bin", "a.py"], [], ["pytorch_model.bin"]),
        ([BIN, "a.bin", "b.bin"], ["a.bin", "b.bin"], [BIN, "a.bin", "b.bin"]),
        ([SAFE, "a.safetensors", "pytorch_model.bin"], ["a.safetensors"], [SAFE, "a.safetensors"]),
        ([SAFE, "model.safetensors"], ["a.safetensors"], ["model.safetensors"]),
        ([SAFE[:-11], "manifest.json"], [], ["manifest.json", SAFE[:-11]]),
    ):  # fmt: skip
        index = {"weight_map": {str(i): name for i, name in enumerate(shards)}}
        assert needed_files([*names, *BASE], lambda name, index=index: index) == BASE + found
    for vocabulary in (["ice_text.model"], ["cog-pretrain.model"], ["tokenizer.json"]):
        names = ["pytorch_model.bin", *vocabulary, "config.json"]
        wanted = ["config.json", *vocabulary, "pytorch_model.bin"]
        assert needed_files(names, lambda name: {}) == wanted
    for names, weights, message in (
        (["config.json"], {}, "tokenizer.model not found"),
        (BASE, {}, "No weights found"),
        ([*BASE, BIN], [], "0 of 0 files"),
        # What is fetched is what is read: as in a folder, no other set takes its place.
        ([*BASE, SAFE, "pytorch_model.bin"], {"a": "a.safetensors"}, "1 of 1"),
        ([*BASE, BIN, "a.py"], {"a": "a.py"}, "a.py"),
        ([*BASE, BIN, "x/a.bin"], {"a": "x/a.bin"}, "x/a.bin"),
    ):
        with pytest.raises(CheckpointError, match=message):
            needed_files(names, lambda name, weights=weights: {"weight_map": weights})
