"""The commands of the project by name: `glm2 chat` runs `python -m infer.chat`.

Unlike `python -m`, `glm2` never imports from the working folder, so that a `train.py` or `convert/`
of the user's does not stand in for ours.
"""

import re
import runpy
import sys
from typing import NoReturn

COMMANDS = {
    "chat": ("infer.chat", "chat on the terminal"),
    "generate": ("infer.generate", "answer one prompt, or a file of prompts"),
    "evaluate": ("infer.evaluate", "perplexity, generated answers, multiple choice"),
    "explain": ("infer.explain", "every stage of the model with shapes, operations and bytes"),
    "bench": ("infer.bench", "measure prefill and decode speed"),
    "doctor": ("infer.doctor", "check this machine and recommend a dtype and quantization"),
    "selftest": ("infer.selftest", "check a model against the published checksums and answers"),
    "launch": ("infer.launch", "start one run of several processes"),
    "lora": ("train.lora", "fine-tune a LoRA adapter"),
    "full": ("train.full", "fine-tune all parameters"),
    "train-bench": ("train.bench", "measure training speed"),
    "train-demo": ("train.demo", "train the demo model again"),
    "inspect": ("convert.inspect", "show what a checkpoint folder holds"),
    "from-pytorch": ("convert.from_pytorch", "convert a published checkpoint to our format"),
    "to-pytorch": ("convert.to_pytorch", "write a folder for transformers"),
    "to-gguf": ("convert.to_gguf", "write a GGUF file for llama.cpp"),
    "to-peft": ("convert.to_peft", "convert an adapter between the layouts of PEFT"),
    "merge-lora": ("convert.merge_lora", "merge an adapter into a checkpoint"),
    "random": ("convert.random", "write a checkpoint of random weights"),
}
_HELP = """usage: glm2 COMMAND [flags]

{commands}

glm2 COMMAND --help lists the flags of a command.
"""

_started_as_glm2 = False


def as_typed(text: str) -> str:
    """Return `text` with our commands as the user typed them: "python -m ..." or "glm2 ..."."""
    if not _started_as_glm2:
        return text
    names = {module: name for name, (module, _) in COMMANDS.items()}
    return re.sub(
        r"python -m (\w+\.\w+)",
        lambda found: f"glm2 {names[found[1]]}" if found[1] in names else found[0],
        text,
    )


def main() -> None:
    """Run the console script `glm2`: the module of a command, as `python -m` would."""
    global _started_as_glm2
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        sys.exit(_print(_HELP.format(commands=_lines("glm2 ", ""))))
    if name == "--version":
        from glm2_jax.cli.main import version

        sys.exit(_print(f"{version()}\n"))
    command = name.replace("_", "-")
    if command not in COMMANDS:
        _unknown("glm2", name, list(COMMANDS))
    _started_as_glm2 = True
    del sys.argv[1]
    runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)


def list_tools(package: str) -> None:
    """Print the commands of a package, for `python -m infer`."""
    tools = [module for module, _ in COMMANDS.values() if module.startswith(f"{package}.")]
    if len(sys.argv) > 1 and sys.argv[1] not in ("--help", "-h"):
        short = [module.partition(".")[2] for module in tools]
        _unknown(f"python -m {package}", sys.argv[1], short)
    sys.exit(_print(_lines("", package) + "\n"))


def _lines(prefix: str, package: str) -> str:
    """Return one line a command; of one package as `python -m` takes them."""
    shown = {
        f"python -m {module}" if package else prefix + name: what
        for name, (module, what) in COMMANDS.items()
        if module.startswith(package)
    }
    width = max(map(len, shown))
    return "\n".join(f"  {command:{width}}  {what}" for command, what in shown.items())


def _unknown(prog: str, name: str, known: list[str]) -> NoReturn:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    print(f"{prog}: unknown command {name!r}{hint}\n{prog} --help lists them", file=sys.stderr)
    sys.exit(2)


def _print(text: str) -> int:
    sys.stdout.write(text)
    return 0
