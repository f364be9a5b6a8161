"""`python -m infer.explain --mesh`: what a model costs each of several devices, on paper."""

import json

import pytest

from glm2_jax.errors import UsageError
from infer.explain.__main__ import main

SIX = ["--config", "chatglm2-6b"]


def told(capsys, *flags):
    assert main([*SIX, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["meshes"]


def test_bytes_and_collectives_of_a_device(capsys):
    whole, cut = (
        told(capsys, "--mesh", mesh, "--device", "v5e")[0] for mesh in ("tensor=1", "tensor=8")
    )
    assert whole["weights"] == 2 * 6_243_584_000
    assert whole["weights"] / 8 < cut["weights"] < whole["weights"] / 7  # keys, values: not cut
    assert [x["steps"]["decode"]["talk"]["calls"] for x in (whole, cut)] == [0, 2 * 28 + 1 + 1]
    # The ring sends 2 (n - 1) / n of every sum: 57 of a row in bfloat16; the logits once.
    sums, logits = 57 * 4096 * 2 * 2 * 7 / 8, 65024 * 4 * 7 / 8
    assert cut["steps"]["decode"]["talk"]["link_bytes"] == pytest.approx(sums + logits)


def test_every_joined_device_by_default_and_quantized_weights(capsys):
    costs = told(capsys, "--mesh", "data=2,tensor=4", "--quantize", "int8", "--batch", "4")
    assert [cost["links"]["name"] for cost in costs] == ["v5e", "v5p", "h200"]
    assert all(cost["precision"]["quantize"] == "int8" for cost in costs)
    same = told(capsys, "--mesh", "tensor=4,data=2", "--device", "v5p-8", "v5p")
    assert len(same) == 1


def test_narrow_terminals(capsys):
    assert main([*SIX, "--mesh", "tensor=2", "--device", "2xh200", "--width", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and any("weights 6.2 GB" in line for line in lines)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--mesh", "tensor=3"], "Use tensor=1, 2, 4, 8, 16, 32."),
        (["--mesh", "fox=2"], "'fox' is not an axis"),
        (["--mesh", "tensor=8", "--device", "v5e-4"], "v5e-4 has 4 devices, but the mesh needs 8"),
        (["--mesh", "tensor=8", "--device", "3090"], "links of this device are not known"),
        (["--mesh", "tensor=8", "--html", "page.html"], "--html: no effect"),
        (
            ["--mesh", "tensor=8", "--length", "40000"],
            "--length must be at most 32,768, got",
        ),
        (["--device", "v5e-8"], "Add a mesh of as many"),
    ],
)
def test_what_makes_no_sense(flags, words):
    with pytest.raises(UsageError) as raised:
        main([*SIX, *flags])
    assert words in str(raised.value)
