"""The model on meshes of eight virtual devices: the same answers, and no needless talk."""

import pytest

from tests.support.mesh_process import run


@pytest.fixture(scope="module")
def found():
    return run("tests.support.mesh_model")


def test_meshes_give_the_logits_and_tokens_of_one_device(found):
    assert {case["mesh"].count("=") for case in found["cases"]} == {1, 2, 3}
    for case in found["cases"]:
        assert case["scale"] > 0.5, case
        assert case["logits"] <= 1e-4, case
        assert case["same_tokens"] and case["tokens"] > 5, case


def test_rows_and_key_heads_of_the_cache_are_cut_and_stay(found):
    parts = {case["mesh"]: case["cache_part"] for case in found["cases"]}
    assert parts["tensor=8"] == [2, 8, 16, 2, 16]  # two heads are on all of eight
    assert parts["data=2,tensor=4"] == [2, 4, 16, 2, 16]
    assert parts["tensor=2,data=2,fsdp=2"] == [2, 2, 16, 1, 16]
    assert parts["data=8"] == [2, 1, 16, 2, 16]
    assert all(case["cache_stays"] for case in found["cases"])


def test_a_layer_has_two_all_reduces_and_nothing_else(found):
    for case in found["cases"]:
        if "tensor" not in case["mesh"] or "fsdp" in case["mesh"]:
            continue
        # Outside the loop: rows of the embedding, logits; and the layers where they are a list.
        layers = 2 * 2 if case["as_list"] else 0
        assert case["layers"] == ({} if case["as_list"] else {"all-reduce": 2}), case
        assert case["outside"] == {"all-reduce": 1 + layers, "all-gather": 1}, case
        rows = 8 if case["mesh"] == "tensor=8" else 4
        # Logits, or hidden states: no weight, no cache.
        assert case["largest"] == rows * max(104, 64 * case["width"]), case


def test_data_alone_needs_no_collective_in_a_step(found):
    (case,) = (case for case in found["cases"] if case["mesh"] == "data=8")
    assert case["layers"] == {} and case["outside"] == {}, case


def test_gradients_of_all_params_and_of_an_adapter_are_those_of_one_device(found):
    for case in found["gradients"]:
        assert case["arrays"] == 14 + 10, case
        assert case["scale"] > 1e-3 and case["off"] < 1e-5, case
