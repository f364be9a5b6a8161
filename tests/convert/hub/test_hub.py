"""Models by name: what is fetched from a hub, what never is, and what is said when it fails."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

import infer
from convert import from_pytorch, inspect, load_checkpoint
from convert.hub.find import find_model
from glm2_jax import CheckpointError, InputError, UsageError
from glm2_jax.choices import SOURCES
from glm2_jax.cli import main as cli
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from infer import startup
from infer.generate import __main__ as generate
from tests.support.checkpoints import TINY, write_official
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
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "README.md", "notes.bin"):
        (repository / name).write_text("raise SystemExit('this must never be here')")
    with serving(repository) as running:
        yield running


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in, and clients in this process that know no other."""
    use(server.url, tmp_path / "cache", monkeypatch)
    return server


def use(url, cache, monkeypatch):
    environment = settings(url, cache)
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
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # so that parts are kept
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


def run(main, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.run_main(main, list(argv))
    return caught.value.code


def fails(error, *arguments, **keywords):
    with pytest.raises(error) as caught:
        find_model(*arguments, **keywords)
    return str(caught.value)


def test_only_what_is_needed_is_fetched(hub, source, capfd):
    folder = find_model(NAME, source=source)
    assert {path.name for path in folder.iterdir()} == NEEDED
    assert all((folder / name).read_bytes() == hub.files()[name] for name in NEEDED)
    assert {name for name, _ in hub.asked("GET") + hub.asked("HEAD")} == NEEDED
    output = capfd.readouterr()
    assert output.out == ""
    first, second = output.err.splitlines()  # and nothing from the client
    revision = COMMIT if source == "hf" else "master"
    assert first.startswith(NAME) and first.endswith(revision)
    assert "kB to fetch into" in second
    assert load_checkpoint(folder).config == TINY


def test_redirected_files_go_on_and_the_token_stays_at_home(hub, hf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect, hub.cuts = True, {SHARDS[0]: 1}
    folder = find_model(NAME, source="hf")
    assert (folder / SHARDS[0]).read_bytes() == hub.files()[SHARDS[0]]
    assert any(first > 0 for name, first in hub.asked() if name == SHARDS[0])
    assert hub.strangers and not any(hub.strangers)


def test_a_whole_part_is_not_fetched_again(hub, hf):
    """The process may end after the last byte and before the file gets its name."""
    folder = find_model(NAME, source="hf")
    blob = (folder / SHARDS[0]).resolve()
    (folder / SHARDS[0]).unlink()
    blob.rename(f"{blob}.incomplete")
    hub.requests.clear()
    assert find_model(NAME, source="hf") == folder
    assert hub.asked() == [] and (folder / SHARDS[0]).exists()


def test_a_second_time_nothing_is_fetched(hub, source, capfd):
    folder = find_model(NAME, source=source)
    hub.requests.clear()
    capfd.readouterr()
    assert find_model(NAME, source=source) == folder
    assert hub.asked() == []
    assert "to fetch" not in capfd.readouterr().err


def test_without_a_source_the_network_is_never_used(hub, source, monkeypatch):
    monkeypatch.chdir(hub.folder)
    message = fails(CheckpointError, NAME)
    assert "There is no folder" in message and "--source hf" in message
    folder = find_model(NAME, source=source)
    hub.requests.clear()
    assert find_model(NAME) == folder
    if source == "hf":
        assert find_model(NAME, revision=COMMIT) == folder
    assert hub.requests == []


def test_an_incomplete_copy_is_told(hub, source):
    folder = find_model(NAME, source=source)
    (folder / SHARDS[0]).resolve().unlink()
    hub.requests.clear()
    message = fails(CheckpointError, NAME)
    assert "not complete" in message and f"--source {source}" in message
    assert hub.requests == []
    assert find_model(NAME, source=source) == folder
    assert [name for name, _ in hub.asked()] == SHARDS[:1]


def test_files_of_another_revision_are_not_read_instead(hub, source):
    folder = find_model(NAME, source=source)
    (folder / "model.safetensors").write_bytes(b"of an earlier revision")
    message = fails(CheckpointError, NAME, source=source)
    assert "model.safetensors does not belong to the revision" in message
    (folder / "model.safetensors").unlink()
    assert find_model(NAME, source=source) == folder


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_connection_goes_on(hub, source, capfd, reset):
    hub.cuts, hub.reset = dict.fromkeys(SHARDS, 1), reset
    folder = find_model(NAME, source=source)
    for name in SHARDS:
        assert (folder / name).read_bytes() == hub.files()[name]
        starts = [first for asked, first in hub.asked() if asked == name]
        assert len(starts) == 2 and starts[0] == 0
        assert starts[1] > 0 or reset  # a reset also loses what lies unread in the buffers
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_server_without_ranges_starts_anew(hub, source):
    hub.cuts, hub.ranges = dict.fromkeys(SHARDS, 1), False
    folder = find_model(NAME, source=source)
    assert all((folder / name).read_bytes() == hub.files()[name] for name in SHARDS)


def test_a_connection_that_never_lasts(hub, hf, monkeypatch):
    hub.cuts = dict.fromkeys(SHARDS, 10**6)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10**6)  # nothing is kept
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert "the connection broke" in fails(CheckpointError, NAME, source="hf")


_INSPECT = """
import os, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000
from convert import inspect
from glm2_jax.cli import interrupt
interrupt.run(inspect.main)
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_download_goes_on_in_the_next_process(server, tmp_path, hf, ending):
    """Through HF_ENDPOINT, as a user names a mirror."""
    command = [sys.executable, "-c", _INSPECT, NAME, "--source", "hf", "--json"]
    environment = os.environ | settings(server.url, tmp_path / "cache")
    server.hold.clear()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        blobs = tmp_path / "cache" / "hf" / "hub" / "models--someone--tiny" / "blobs"
        part = blobs / f"{sha256(server, SHARDS[0])}.incomplete"
        wait_for(lambda: part.exists() and part.stat().st_size > 1000)
        process.send_signal(ending)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert (process.returncode, out) == (codes[ending], "")
    assert "Traceback" not in err
    server.hold.set()
    server.requests.clear()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parameters"] == TINY.num_params
    starts = [first for name, first in server.asked() if name == SHARDS[0]]
    assert len(starts) == 1 and starts[0] > 1000
    assert not list(blobs.glob("*.incomplete"))


def sha256(server, name):
    return hashlib.sha256(server.files()[name]).hexdigest()


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened")


def test_a_damaged_file_is_not_kept(hub, source, monkeypatch):
    if source == "modelscope":  # tries again by itself
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    name = SHARDS[1]
    data = hub.files()[name]
    hub.broken = {name: data[:-1] + bytes([data[-1] ^ 1])}
    assert "came damaged" in fails(CheckpointError, NAME, source=source)
    hub.broken = {}
    folder = find_model(NAME, source=source)
    assert (folder / name).read_bytes() == hub.files()[name]


def test_space_is_looked_for_first(hub, source, monkeypatch):
    nearly_full = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("glm2_jax.cli.files.shutil.disk_usage", lambda path: nearly_full)
    message = fails(InputError, NAME, source=source)
    assert "not enough space" in message and "1000 are free" in message
    assert {name for name, _ in hub.asked()} <= {"pytorch_model.bin.index.json"}


def test_a_disk_that_fills_up(hub, hf, monkeypatch):
    def full(part, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part.name))

    with monkeypatch.context() as patch:
        patch.setattr("convert.hub.huggingface._Part.write", full)
        message = fails(InputError, NAME, source="hf")
    assert "No space left" in message and "is kept" in message
    find_model(NAME, source="hf")


def test_two_processes_do_not_write_the_same_file(hub, hf, tmp_path):
    blobs = tmp_path / "cache" / "hf" / "hub" / "models--someone--tiny" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / f"{sha256(hub, SHARDS[0])}.incomplete").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "Another process" in fails(InputError, NAME, source="hf")
    find_model(NAME, source="hf")


@pytest.mark.parametrize("name", ["modeling_chatglm.py", "../config.json"])
def test_an_index_that_names_code_is_refused(hub, source, name):
    index = hub.folder / "pytorch_model.bin.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["transformer.output_layer.weight"] = name
    index.write_text(json.dumps(value))
    assert "without a path" in fails(CheckpointError, NAME, source=source)
    assert {what for what, _ in hub.asked()} == {"pytorch_model.bin.index.json"}


def test_revisions(hub, hf, source):
    if source == "hf":
        assert find_model(NAME, source=source, revision=COMMIT).name == COMMIT
    message = fails(CheckpointError, NAME, source=source, revision="v9")
    assert "revision v9" in message


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "There is no model"),
        ((404, "RepoNotFound"), "There is no model"),
        ((403, "GatedRepo"), "is gated"),
        ((403, "Other"), "refused"),
        ((500, "Oops"), "500"),
    ],
)
def test_refusals_of_hugging_face(hub, hf, capfd, refusal, message):
    hub.refusal = refusal
    assert message in fails(CheckpointError, NAME, source="hf")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_of_modelscope(hub, capfd, status):
    pytest.importorskip("modelscope_hub", reason="modelscope_hub is not installed (extra hub)")
    hub.refusal = (status, "no")
    message = fails(CheckpointError, NAME, source="modelscope")
    assert "There is no model" in message or "refused" in message
    assert capfd.readouterr().err == ""


def test_a_login_page_instead_of_an_answer(hub, source, capfd):
    hub.refusal = (200, "Welcome")
    assert hub.url in fails(CheckpointError, NAME, source=source)
    assert capfd.readouterr().err == ""


def test_no_such_model(hub, source):
    assert "There is no model" in fails(CheckpointError, "someone/other", source=source)


def test_no_network(source, tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use(url, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    message = fails(CheckpointError, NAME, source=source)
    assert "cannot be reached" in message and url in message and "_ENDPOINT" in message
    assert capfd.readouterr().err == ""


def test_offline_mode_is_honoured(hub, hf, monkeypatch, capfd):
    folder = find_model(NAME, source="hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert find_model(NAME, source="hf") == folder
    assert "HF_HUB_OFFLINE" in capfd.readouterr().err
    assert "HF_HUB_OFFLINE" in fails(CheckpointError, "someone/other", source="hf")
    assert hub.requests == []


def test_the_conversion_takes_names(hub, source, tmp_path, capsys):
    target = tmp_path / "own"
    assert run(from_pytorch.main, NAME, str(target), "--source", source) == 0
    assert load_checkpoint(target).config == TINY
    capsys.readouterr()
    assert run(inspect.main, NAME, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == TINY.num_layers


def open_named(argv):
    args = generate.parser().parse_args(argv)
    return startup.open_engine(from_flags(ModelChoice, args), from_flags(EngineOptions, args))


def test_the_engine_takes_names(hub, hf, capfd):
    argv = ["--model", NAME, "--compile-cache", "off", "--source", "hf"]
    engine = open_named(argv)
    assert COMMIT in capfd.readouterr().err
    hub.requests.clear()
    again = infer.load(NAME)
    assert again.checkpoint.fingerprint == engine.checkpoint.fingerprint
    assert hub.requests == []
    for flag in (["--source", "hf"], ["--revision", "main"]):
        with pytest.raises(UsageError, match="need --model"):
            open_named(flag)
