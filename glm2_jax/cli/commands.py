"""The commands of the project by name: `glm2 chat` runs `python -m infer.chat`.

Unlike `python -m`, it never imports from the working folder, where the user may have a `train.py`.
"""

import re
import runpy
import sys
from typing import NoReturn

COMMANDS = {
    "chat": ("infer.chat", "chat on the terminal"),
    "generate": ("infer.generate", "answer one prompt, or a file of prompts"),
    "fill": ("infer.fill", "fill the blanks of a text with a GLM base model"),
    "serve": ("infer.serve", "HTTP server with the API of OpenAI, and a chat page"),
    "evaluate": ("infer.evaluate", "perplexity, generated answers, multiple choice"),
    "explain": ("infer.explain", "every stage of the model with shapes, operations and bytes"),
    "bench": ("infer.bench", "measure prefill and decode speed"),
    "lab": ("infer.lab", "try acceleration ideas, what they cost and buy"),
    "tune": ("infer.tune", "measure which forms of products and attention are fast here"),
    "doctor": ("infer.doctor", "check this machine and recommend a dtype and quantization"),
    "selftest": ("infer.selftest", "check a model against the published checksums and answers"),
    "launch": ("infer.launch", "start one run of several processes"),
    "lora": ("train.lora", "fine-tune a LoRA adapter"),
    "prefix": ("train.prefix", "train a P-Tuning v2 prefix"),
    "preference": ("train.preference", "train by chosen and rejected answers: DPO, ORPO"),
    "full": ("train.full", "fine-tune all parameters"),
    "sweep": ("train.sweep", "search for good settings of fine-tuning"),
    "augment": ("train.augment", "more wordings of the questions to train on"),
    "train-bench": ("train.bench", "measure training speed"),
    "train-demo": ("train.demo", "train the demo model again"),
    "inspect": ("convert.inspect", "show what a checkpoint folder holds"),
    "from-pytorch": ("convert.from_pytorch", "convert a published checkpoint to our format"),
    "quantize": ("convert.quantize", "quantize to int4 by the activations of a text"),
    "to-pytorch": ("convert.to_pytorch", "write a folder for transformers"),
    "to-gguf": ("convert.to_gguf", "write a GGUF file for llama.cpp"),
    "to-peft": ("convert.to_peft", "convert an adapter between the layouts of PEFT"),
    "merge-lora": ("convert.merge_lora", "merge an adapter into a checkpoint"),
    "random": ("convert.random", "write a checkpoint of random weights"),
}

_started_as_glm2 = False


def as_typed(text: str) -> str:
    """Return `text` with our commands as the user typed them: "python -m ..." or "glm2 ..."."""
    if not _started_as_glm2:
        return text
    names = {module: f"glm2 {name}" for name, (module, _) in COMMANDS.items()}
    return re.sub(r"python -m (\w+\.\w+)", lambda found: names.get(found[1], found[0]), text)


def main() -> None:
    """Run the console script `glm2`: the module of a command, as `python -m` would."""
    global _started_as_glm2
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    command = name.replace("_", "-")
    if command in COMMANDS:
        _started_as_glm2 = True
        del sys.argv[1]
        runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
    elif name in ("--help", "-h", "help"):
        lines = _lines({f"glm2 {known}": what for known, (_, what) in COMMANDS.items()})
        sys.stdout.write(
            f"usage: glm2 COMMAND [flags]\n\n{lines}\n"
            "glm2 COMMAND --help lists the flags of a command.\n"
        )
    elif name == "--version":
        _print_version()
    else:
        _unknown("glm2", name, list(COMMANDS))


def list_tools(package: str) -> None:
    """Print the commands of a package, for `python -m infer`."""
    tools = {module: what for module, what in COMMANDS.values() if module.startswith(f"{package}.")}
    if sys.argv[1:] == ["--version"]:
        return _print_version()
    if len(sys.argv) > 1 and sys.argv[1] not in ("--help", "-h"):
        known = [module.partition(".")[2] for module in tools]
        _unknown(f"python -m {package}", sys.argv[1], known)
    sys.stdout.write(_lines({f"python -m {module}": what for module, what in tools.items()}))


def _print_version() -> None:
    from glm2_jax.cli.main import version

    sys.stdout.write(f"{version()}\n")


def _lines(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    return "".join(f"  {command:{width}}  {what}\n" for command, what in commands.items())


def _unknown(prog: str, name: str, known: list[str]) -> NoReturn:
    import difflib

    near = [command for command in known if name and command.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    print(f"{prog}: unknown command {name!r}{hint}\n{prog} --help lists them", file=sys.stderr)
    sys.exit(2)
