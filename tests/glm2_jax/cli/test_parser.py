"""What a command line is answered that uses the words of other programs."""

import pytest

from convert import merge_lora, quantize
from glm2_jax.choices import unknown_device
from glm2_jax.errors import UsageError
from glm2_jax.runtime.devices import find_device
from infer.bench import __main__ as bench
from infer.evaluate import __main__ as evaluate
from infer.generate import __main__ as generate
from tests.support.commands import exit_code
from train import full, lora
from train.recipe import parse


@pytest.mark.parametrize(
    ("tool", "typed", "said"),
    [
        (lora, "--learning_rate 1e-4", "unknown argument --learning_rate: use --lr\n"),
        (lora, "--num_train_epochs=3", "unknown argument --num_train_epochs: use --epochs\n"),
        (lora, "--lora-rank 8 --data x", "--lora-rank: use --rank\n"),
        (lora, "--per_device_train_batch_size 1", "use --batch-size\n"),
        (lora, "--quantization_bit 4", "use --quantize-base\n"),
        (lora, "--output_dir x --lr 1 --train_file y", "use --output, --train_file: use --data\n"),
        (full, "--data x --bf16", "--bf16: use --dtype bfloat16\n"),
        (full, "--data x --lora_rank 8", "unknown argument --lora-rank 8"),  # it has none
        (generate, "--model_name_or_path x -p y", "--model_name_or_path: use --model\n"),
        (generate, "--quantization_bit 4", "use --quantize\n"),
        (generate, "--tempratur 1 -p y", "--tempratur 1 (did you mean --temperature?)\n"),
        (bench, "--max_new_tokens 5", "--max_new_tokens: use --new-tokens\n"),
    ],
)
def test_flags_of_other_programs(tool, typed, said, capsys):
    assert exit_code(tool.main, *typed.split()) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 2 and out == ""


def test_what_only_looks_like_one():
    parser = generate.parser()
    assert parser.parse_args(["--prompt", "learning_rate"]).prompt == "learning_rate"
    assert parser.parse_args(["--dtype", "fp16", "-p", "bf16"]).dtype == "fp16"
    assert parser.parse_args(["--max_new_tokens", "5"]).max_new_tokens == 5  # it has this one


def test_a_recipe_with_names_of_other_programs(tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("learning_rate: 1e-4\n")
    with pytest.raises(UsageError, match=r"not a setting of this command\.\nKnown.*\nUse lr\.$"):
        parse(lora.parser(), ["--config", str(recipe), "--data", "x"])
    recipe.write_text("load_in_4bit: true\n")
    with pytest.raises(UsageError, match=r"\nUse quantize-base: int4\.$"):
        parse(lora.parser(), ["--config", str(recipe), "--data", "x"])


def test_the_gpu_by_the_name_that_pytorch_gives_it(capsys):
    for tool, words in (
        (generate, ["-p", "x"]),
        (bench, []),
        (evaluate, []),
        (lora, ["--data", "x"]),
        (merge_lora, ["a", "b", "c"]),
        (quantize, ["a", "b"]),
    ):
        assert exit_code(tool.main, *words, "--device", "cuda:0") == 2
        assert "unknown device 'cuda:0' (did you mean gpu?)" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"'cuda' \(did you mean gpu\?\); known: auto, cpu, gpu"):
        find_device("cuda")
    assert "mean" not in unknown_device("abacus")
    assert "did you mean h200?" in unknown_device("h20", ("3090", "h200"))
