"""`--preset consumer`: a 6B model on a consumer card, as planned and as measured."""

import pytest

from glm2_jax.errors import UsageError
from infer.bench import __main__ as bench
from infer.bench import consumer
from infer.bench import run as suite
from tests.infer.bench.test_bench import hand_made


@pytest.fixture
def nothing_measured(monkeypatch):
    monkeypatch.setattr(suite, "measure_ceilings", lambda device: pytest.fail("measured"))


def test_the_consumer_preset(capsys, nothing_measured):
    assert bench.main(["--preset", "consumer"]) == 0
    text = capsys.readouterr().out
    assert text.count("planned, RTX 3090 24 GB: ") == text.count("measured: nothing") == 3
    assert "not measured: no accelerator found" in text
    assert " ".join(text.split()).count(f"--prefill-chunk {consumer.CHUNK} --max-length 4096") == 3
    with pytest.raises(UsageError, match="nothing to draw"):
        bench.main(["--preset", "consumer", "--plot", "roofline.png"])


def test_the_consumer_preset_with_figures():
    text = consumer.render(hand_made(), 100)
    assert "measured, some device: 6.0 MB, 5 tok/s" in text and text.count("nothing") == 2
    assert consumer.wanted("cpu", "cpu") and consumer.wanted("auto", "gpu")
