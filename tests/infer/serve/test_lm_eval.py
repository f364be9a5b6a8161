"""lm-eval, unmodified, on a task of its own in a temporary folder."""

import json

import pytest

from tests.support.engine_toy import prompt_scores
from tests.support.serve import serving

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of lm-eval are not ours
    pytest.mark.usefixtures("collected"),
]
ROWS = [
    {"question": "Hello", "choices": [" world", " model"], "answer": 0},
    {"question": "The capital of France is", "choices": [" Paris.", " questions"], "answer": 1},
]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITE = """
task: toy_write
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """A function that runs a task with a model of lm-eval and returns its samples."""
    folder = tmp_path_factory.mktemp("lm_eval")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choice.yaml").write_text(CHOICE % data)
    (folder / "write.yaml").write_text(WRITE % data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        lm_eval = pytest.importorskip("lm_eval")
        from lm_eval.tasks import TaskManager

        tasks = TaskManager(include_path=str(folder), include_defaults=False)

        def run(model: str, task: str, arguments: str, **more):
            found = lm_eval.simple_evaluate(
                model=model, model_args=arguments, tasks=[task], task_manager=tasks,
                bootstrap_iters=0, **more,
            )  # fmt: skip
            return found["samples"][task]

        yield run


@pytest.fixture(scope="module")
def served():
    with serving() as served, served.listening() as url:
        served.url = url
        yield served


def test_choices_have_the_likelihoods_of_the_model(evaluate, served):
    arguments = f"model=toy,base_url={served.url}/v1/completions,max_retries=1,max_length=512"
    samples = evaluate("local-completions", "toy_choice", arguments)  # finds the tokenizer itself
    tokenizer = served.engine.tokenizer
    for row, sample in zip(ROWS, samples, strict=True):
        before = tokenizer.encode(row["question"])
        for choice, ((found, greedy),) in zip(row["choices"], sample["resps"], strict=True):
            whole = tokenizer.encode(row["question"] + choice)
            ids = tokenizer.prefix_ids + whole
            scores = prompt_scores(served.engine, ids)
            places = range(len(tokenizer.prefix_ids) + len(before) - 1, len(ids) - 1)
            expected = sum(float(scores[place, ids[place + 1]]) for place in places)
            assert found == pytest.approx(expected, abs=1e-3)
            assert greedy == all(scores[p].argmax() == ids[p + 1] for p in places)


@pytest.mark.parametrize("tokenizer", ["remote", "none"])
def test_texts_are_written_with_and_without_a_tokenizer(evaluate, served, tokenizer):
    arguments = f"model=toy,base_url={served.url}/v1/completions,max_retries=1"
    if tokenizer == "none":
        arguments += ",tokenizer_backend=None,tokenized_requests=False"
    samples = evaluate("local-completions", "toy_write", arguments)
    asked = {"temperature": 0, "max_tokens": 4, "stop": "\n"}
    for row, sample in zip(ROWS, samples, strict=True):
        answer = served.post("/v1/completions", {"prompt": row["question"], **asked}).json()
        assert sample["resps"] == [[answer["choices"][0]["text"]]]


def test_chats_are_answered(evaluate, served):
    arguments = f"model=toy,base_url={served.url}/v1/chat/completions,max_retries=1"
    samples = evaluate("local-chat-completions", "toy_write", arguments, apply_chat_template=True)
    for row, sample in zip(ROWS, samples, strict=True):
        answer = served.chat(row["question"], temperature=0, max_tokens=4, stop="\n").json()
        assert sample["resps"] == [[answer["choices"][0]["message"]["content"]]]
