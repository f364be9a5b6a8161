"""Loading and converting a few hundred megabytes takes no memory beyond what stays."""

import json
import subprocess
import sys

import pytest

from convert.loading.folder import open_folder
from convert.writing.own import plan_conversion
from tests.support.checkpoints import tiny_config, write_official
from tests.support.paths import ROOT

# 112 million parameters, 224 MB in float16; its largest tensors are 41 MB (embedding and head).
CONFIG = tiny_config(
    num_layers=6, vocab_size=20000, hidden_size=1024, ffn_hidden_size=3072, num_heads=16,
    head_dim=64,
)  # fmt: skip
LARGEST = CONFIG.vocab_size * CONFIG.hidden_size * 2

# RssAnon leaves out the mapped pages of files, which the system takes back whenever it needs them.
_MEASURE = """
import json, os, sys, threading, time
import jax, jax.numpy as jnp
from convert.loading.folder import open_folder
from convert.loading.checkpoint import load_checkpoint
from tests.support.checkpoints import convert_folder
from glm2_jax import Tokenizer
from tests.support.peak_memory import anonymous

def watch():
    while running:
        samples.append(anonymous(os.getpid()))
        time.sleep(0.0005)

folder, what, target = sys.argv[1:]
jnp.zeros(8).block_until_ready()  # the runtime's own memory is not the loader's
Tokenizer.from_file(folder + "/tokenizer.model")
before, samples, running = anonymous(os.getpid()), [], True
thread = threading.Thread(target=watch)
thread.start()
stays = 0
if what == "convert":
    convert_folder(open_folder(folder), target)
else:
    dtype, _, quantize = what.partition(" ")
    params = load_checkpoint(folder, dtype=dtype, quantize=quantize or None).params
    stays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
running = False
thread.join()
print(json.dumps({"stays": stays, "peak": max(samples) - before, "samples": len(samples)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    yield write_official(path, CONFIG, shards=3)
    for file in path.iterdir():  # pytest keeps temporary folders; these are large
        file.unlink()


@pytest.mark.parametrize("what", ["float32", "bfloat16 int4", "convert"])
def test_peak_memory(folder, tmp_path, what):
    command = [sys.executable, "-c", _MEASURE, str(folder), what, str(tmp_path / "own")]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    result = json.loads(done.stdout)
    for file in (tmp_path / "own").glob("*"):
        file.unlink()
    stays = 0
    if what != "convert":
        dtype, _, quantize = what.partition(" ")
        stays = plan_conversion(open_folder(folder), dtype, quantize or None).nbytes
    assert result["stays"] == stays
    assert result["samples"] > 20
    assert result["stays"] * 0.9 < result["peak"] <= result["stays"] + 1.2 * LARGEST
