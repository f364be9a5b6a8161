"""`python -m infer.evaluate --task rate`: the sheet and its key, rating files, and the figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm2_jax.errors import InputError, UsageError
from infer.engine.load import demo_folder
from infer.evaluate.__main__ import main
from infer.evaluate.rate import judge as judging
from infer.evaluate.rate.figures import _interval, bradley_terry
from infer.evaluate.rate.ratings import write_ratings
from infer.evaluate.rate.sheet import BROKEN, CRITERIA, key_path, read_sheet
from tests.support.training_data import write_rows

MODELS = ("weak", "fair", "good")


@pytest.fixture
def files(tmp_path):
    """Answers of three models to twelve prompts, one file of the form of --predictions."""
    paths = []
    for at, name in enumerate(MODELS):
        key = "predict" if name == "fair" else "text"
        rows = [{"prompt": f"问题 {n}", key: f"{n} is my answer {at}"} for n in range(12)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return paths


def rate(*args) -> int:
    return main(["--task", "rate", *map(str, args)])


@pytest.fixture(params=["ab", "1-5"])
def sheet(request, files, tmp_path):
    """The path of a sheet of each scale."""
    path = tmp_path / "sheet.html"
    assert rate("--sheet", path, "--answers", *files, "--scale", request.param, "--seed", 3) == 0
    return path


def marks(page: Path, better=MODELS.index) -> dict:
    """What a careful rater writes, to whom a model is as good as `better` says."""
    found, sheet = {}, read_sheet(page)
    for item in sheet.items:
        worth = [better(MODELS[one]) if one != BROKEN else -9 for one in item.models]
        if sheet.scale == "ab":
            mark = "tie" if worth[0] == worth[1] else "A" if worth[0] > worth[1] else "B"
        else:
            mark = max(worth[0] + 2, 1)
        found[item.id] = dict.fromkeys(CRITERIA, mark)
    return found


def save(page: Path, name: str, ratings: dict, kind: str = "person") -> Path:
    path = page.with_name(f"by-{name}.json")
    path.write_bytes(write_ratings(read_sheet(page), name, kind, ratings))
    return path


def test_the_sheet_is_blind_and_depends_on_the_seed_alone(sheet, files, tmp_path, capsys):
    text, found = sheet.read_text(encoding="utf-8"), read_sheet(sheet)
    shown = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert set(shown["items"][0]) == {"id", "prompt", "answers"}
    assert not any(name in json.dumps(shown) for name in (*MODELS, "broken", "repeat"))
    kinds = [item.kind for item in found.items]
    assert [kinds.count(kind) for kind in ("item", "broken", "repeat")] == [36, 4, 4]
    assert kinds[0] == "item" and set(kinds[-4:]) == {"repeat"}
    answers = [
        [json.loads(line) for line in Path(f).read_text("utf-8").splitlines()] for f in files
    ]
    for item in found.items:
        n = int(item.prompt.split()[1])
        for model, answer in zip(item.models, item.answers, strict=True):
            if model != BROKEN:
                assert answer in answers[model][n].values()
            else:
                assert len(answer) > 2 * len(f"{n} is my") and item.kind == "broken"
        if item.kind == "repeat":
            (first,) = (one for one in found.items if one.id == item.of)
            assert first.answers == item.answers[::-1] and first.prompt == item.prompt
    firsts = [item.models[0] for item in found.items if item.kind == "item"]
    assert all(6 <= firsts.count(model) <= 18 for model in range(3))  # no side is a model's
    again = tmp_path / "again.html"
    flags = ("--answers", *files, "--scale", found.scale, "--seed")
    assert rate("--sheet", again, *flags, 3) == 0 and again.read_text("utf-8") == text
    with pytest.raises(InputError, match="exists already"):
        rate("--sheet", again, *flags, 4)
    assert rate("--sheet", again, *flags, 4, "--overwrite", "--limit", 5) == 0
    other = read_sheet(again)
    assert other.id != found.id and len(other.items) == 7
    assert "36 items and 8 attention checks" in capsys.readouterr().err


def test_figures_of_raters(sheet, capsys):
    ann, bob = save(sheet, "ann", marks(sheet)), save(sheet, "bob", marks(sheet))
    eve = save(sheet, "eve", marks(sheet, lambda model: 2 - MODELS.index(model)), "model")
    flags = ("--sheet", sheet, "--json", "--rates")
    assert rate(*flags, ann, bob, eve) == 0
    found = json.loads(capsys.readouterr().out)
    people, model = found["results"]
    assert people["by"] == "people" and model["by"] == "eve (model)"
    assert [row["inattentive"] for row in found["raters"][:2]] == [False, False]
    assert found["raters"][0]["rated"] == 36
    for row in people["win_rates"]:
        assert (row["win_rate"], row["low"], row["high"]) == (0, 0, 0), row
        assert row["lost"] == 2 * 12 * (4 if row["criterion"] == "overall" else 1)
    assert {row["win_rate"] for row in model["win_rates"]} == {1}
    assert [row["model"] for row in people["strengths"]] == ["good", "fair", "weak"]
    assert sum(row["elo"] for row in people["strengths"]) == pytest.approx(0, abs=1e-6)
    # Without bound otherwise: the half win that is added keeps it finite, in each sample.
    assert 100 < people["strengths"][0]["low"] <= people["strengths"][0]["high"] < 2000
    if found["scale"] == "1-5":
        overall = [r["mean_score"] for r in people["mean_scores"] if r["criterion"] == "overall"]
        assert overall == [2, 3, 4]
    assert set(found["alpha_people"].values()) == {1.0} and found["alpha_all"]["fluency"] < 0.3
    apart = found["disagreements"]
    assert apart and {"ann", "bob", "eve (model)"} == set(apart[0]["marks"])
    assert rate(*flags[:2], "--rates", ann, eve) == 0
    out = capsys.readouterr().out
    assert "win rates" in out and "0.0 %" in out and "by eve (model)" in out
    assert f"disagreements: {len(apart)}" in out


def test_inattentive_raters(sheet, capsys):
    ab = read_sheet(sheet).scale == "ab"
    always = {
        item.id: dict.fromkeys(CRITERIA, "A" if ab else 3) for item in read_sheet(sheet).items
    }
    good, bad = save(sheet, "good", marks(sheet)), save(sheet, "bad", always)
    flags = ("--sheet", sheet, "--json", "--rates", good, bad)
    rows = []
    for drop in ((), ("--drop-inattentive",)):
        assert rate(*flags, *drop) == 0
        rows.append(json.loads(capsys.readouterr().out))
    before, after = rows
    assert [row["inattentive"] for row in before["raters"]] == [False, True]
    assert before["raters"][1]["repeats"] == 4
    assert before["raters"][1]["repeats_failed"] == (4 if ab else 0)
    assert [row["left_out"] for row in after["raters"]] == [False, True]
    assert after["disagreements"] == [] and before["alpha_people"]["accuracy"] < 0.9
    assert after["alpha_people"]["accuracy"] is None  # of one rater
    with pytest.raises(InputError, match="no ratings are left"):
        rate(*flags[:4], bad, "--drop-inattentive")


def test_bradley_terry():
    wins = np.array([[0.0, 30, 40], [10, 0, 25], [5, 15, 0]])
    [one, again] = bradley_terry(np.stack([wins, wins]))
    np.testing.assert_allclose(one, again)
    # At the maximum of the likelihood a model wins as often as its strength says.
    more = wins + 0.5 * (1 - np.eye(3))
    expected = (more + more.T) / (1 + np.exp(one[None, :] - one[:, None]))
    np.testing.assert_allclose(
        expected.sum(axis=1) - np.diag(expected), more.sum(axis=1), rtol=1e-6
    )
    two = bradley_terry(np.array([[0.0, 3], [1, 0]]))
    assert two[0] - two[1] == pytest.approx(np.log(3.5 / 1.5), abs=1e-8)


def test_intervals_are_over_prompts():
    """Ten raters who always agree are not ten times as sure."""
    prompts, won = [str(n) for n in range(100)] * 10, np.array([0.0, 1] * 500)
    low, high = _interval(prompts, won, 0)
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.15)


def test_rating_files_with_mistakes(sheet, files, tmp_path):
    good, key = save(sheet, "ann", marks(sheet)), sheet.with_name("sheet.key.json")
    text = good.read_text(encoding="utf-8")
    bad = tmp_path / "bad.json"
    first = read_sheet(sheet).items[0].id
    row = json.loads(text)
    for content, said in (
        (text[:-30], "(?s)not complete JSON.*may have been cut"),
        ('{"rater": "a", "rater": "b"}', "bad.json: the key 'rater' appears twice\nSave"),
        ("[]", "not a file of ratings"),
        (text.replace(read_sheet(sheet).id, "0" * 16), "rates another sheet\nIt is of sheet '0000"),
        (text.replace('"ann"', '" "'), "does not say who rated\nrater is ' '"),
        (text.replace('"rater"', '"who"'), "does not say who rated\nThe field rater is missing"),
        (text.replace('"kind"', '"sort"'), "kind of rater rated\nThe field kind is missing"),
        (json.dumps(row | {"kind": ["cat"]}), "kind is .'cat'.. Expected person or model"),
        (json.dumps(row | {"ratings": []}), "has no ratings"),
        (
            json.dumps(row | {"ratings": {first: dict.fromkeys((*CRITERIA, "wit"), "A")}}),
            f"item {first}: unknown criterion 'wit'\nKnown: readability",
        ),
        (json.dumps(row | {"ratings": {"999": {}}}), "unknown item '999'\nThe sheet has 44"),
        (json.dumps(row | {"ratings": {first: {"fluency": "A"}}}), f"item {first}: "),
        (json.dumps(row | {"ratings": {first: dict.fromkeys(CRITERIA, "C")}}), "Expected one of"),
        (text.replace('"ann"', '"Ann "'), "(?s)the ratings of Ann are given twice.*by-ann.json"),
    ):
        bad.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=said) as error:
            rate("--sheet", sheet, "--rates", good, bad)
        assert str(error.value).startswith(str(bad))
    with pytest.raises(InputError, match=r"cannot read nope.json\nfile not found\nName files"):
        rate("--sheet", sheet, "--rates", good, "nope.json")
    for change, said in ((("good", "best"), "is damaged"), (None, "not found")):
        key.write_text(key.read_text("utf-8").replace(*change)) if change else key.unlink()
        with pytest.raises(InputError, match=said):
            rate("--sheet", sheet, "--rates", good)


def test_a_rater_who_has_rated_nothing(sheet, capsys):
    ann, bob = save(sheet, "ann", marks(sheet)), save(sheet, "bob", {})
    assert rate("--sheet", sheet, "--rates", ann, bob) == 0
    assert f"{bob}: bob has rated nothing" in capsys.readouterr().err


def test_a_key_of_another_sheet(sheet, files, tmp_path):
    good, other = save(sheet, "ann", marks(sheet)), tmp_path / "other.html"
    scale = read_sheet(sheet).scale
    assert rate("--sheet", other, "--answers", *files, "--scale", scale, "--seed", 4) == 0
    key_path(other).replace(key_path(sheet))
    for step in (("--rates", good), ("--judge", tmp_path / "toy")):
        with pytest.raises(InputError, match=r"sheet\.key\.json is the key of another sheet"):
            rate("--sheet", sheet, *step)
    sheet.write_text("<html>", encoding="utf-8")
    with pytest.raises(InputError, match="sheet.html is not a rating sheet"):
        rate("--sheet", sheet, "--rates", good)


def test_answers_and_flags_that_do_not_fit(files, tmp_path):
    sheet, one = tmp_path / "a.html", tmp_path / "one.jsonl"
    for flags, said in (
        (["--answers", *files, "--rates", "x"], "one of --answers, --judge and --rates"),
        (["--rates", "x", "--scale", "1-5"], "--scale: no effect with --rates"),
        (["--judge", "x", "--model", "y"], "--model: no effect with --judge"),
        (["--answers", files[0], f"weak={files[1]}"], "'weak' is empty or taken"),
        (["--answers", files[0], "--data", "x"], "--data needs --task perplexity"),
    ):
        with pytest.raises(UsageError, match=said):
            rate("--sheet", sheet, *flags)
    for rows, said in (
        ([], "has no rows"),
        ([{"prompt": "问题 1"}], "one.jsonl:1: no prompt with an answer"),
        ([{"prompt": "问题 1", "text": "a"}], "one.jsonl has no answer to '问题 0'"),
    ):
        write_rows(one, rows)
        with pytest.raises(InputError, match=said):
            rate("--sheet", sheet, "--answers", files[0], one)
    one.write_text('{"prompt": "\\ud800", "text": ""}')
    with pytest.raises(InputError, match="one.jsonl:1: it has half of a character"):
        rate("--sheet", sheet, "--answers", one)
    for names, kind, said in (
        ([files[0]], UsageError, "--answers names one file"),
        ([files[0], f"b={files[0]}"], InputError, "nothing to compare"),
    ):
        with pytest.raises(kind, match=said):
            rate("--sheet", sheet, "--answers", *names)
    assert not sheet.exists()


def test_a_model_judges_on_both_sides(sheet, engine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("infer.startup.open_engine", lambda *args, **kwargs: engine)
    found, asked = read_sheet(sheet), []

    def always_the_first(engine, prompts, letters, batch):
        asked.extend(prompts)
        return np.tile(np.arange(len(letters), 0, -1.0), (len(prompts), 1))

    with monkeypatch.context() as patch:
        patch.setattr(judging, "letter_logits", always_the_first)
        patch.setattr(judging, "checked", lambda engine, ids: ids)  # of any length
        marks = judging.judge(engine, found, 8)
    ab = found.scale == "ab"
    assert len(asked) == len(found.items) * len(CRITERIA) * (2 if ab else 1)
    assert {mark for row in marks.values() for mark in row.values()} == {"tie" if ab else 1}

    item = found.items[0]
    assert judging.question(item, "accuracy").index(item.answers[0]) > 0
    swapped = judging.question(item, "accuracy", -1)
    assert swapped.index(item.answers[-1]) < swapped.index(item.answers[0]) or not ab
    few = tmp_path / "few.html"
    rate("--sheet", few, "--answers", tmp_path / "weak.jsonl", tmp_path / "good.jsonl",
         "--scale", found.scale, "--limit", 1)  # fmt: skip
    assert rate("--sheet", few, "--judge", tmp_path / "toy") == 0
    written = tmp_path / "few.toy.json"
    assert json.loads(written.read_bytes())["kind"] == "model"
    assert rate("--sheet", few, "--rates", written) == 0
    assert "by toy (model)" in capsys.readouterr().out


def test_the_demo_as_a_judge(sheet, engine, monkeypatch, tmp_path, capsys):
    opened = []

    def open_engine(choice, *args, **kwargs):
        opened.append(Path(choice.path))
        return engine

    monkeypatch.setattr("infer.startup.open_engine", open_engine)
    monkeypatch.setattr(judging, "judge", lambda *args: {})
    monkeypatch.chdir(tmp_path)
    assert rate("--sheet", sheet, "--judge", "demo") == 0
    assert "the judge is the bundled demo model" in capsys.readouterr().err
    (tmp_path / "demo").mkdir()
    assert rate("--sheet", sheet, "--judge", "demo", "--overwrite") == 0
    assert opened == [demo_folder(), Path("demo")]
    assert json.loads((tmp_path / "sheet.demo.json").read_bytes())["rater"] == "demo"
    assert "bundled" not in capsys.readouterr().err
