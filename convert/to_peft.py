"""`python -m convert.to_peft SRC DST --layout glm --base DIR`: write an adapter for peft."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from convert import options
from glm2_jax.choices import LAYOUTS
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.to_peft",
        description=(
            "Converts a LoRA adapter of this project or of the peft library for peft and a model "
            "of either layout. Reading needs no such step: every command takes both layouts as "
            "--adapter."
        ),
        example="python -m convert.to_peft ./my-adapter ./my-adapter-glm --layout glm "
        "--base ./chatglm2-6b",
    )
    options.add_places(parser, "the adapter's folder")
    form = parser.add_argument_group("form")
    form.add_argument(
        "--layout", choices=LAYOUTS, required=True,
        help="names of the adapted matrices: glm = q_proj and so on of GlmForCausalLM, as "
        "convert.to_pytorch --layout glm writes it; chatglm = query_key_value and so on of the "
        "official repositories",
    )  # fmt: skip
    form.add_argument(
        "--base", type=path_argument, required=True, metavar="DIR",
        help="the base model, in any layout, or OWNER/NAME; DST records it",
    )  # fmt: skip
    options.add_adapter_flags(parser, named=True)
    options.add_last(parser, "the adapter")
    return parser


def main(argv: list[str]) -> None:
    """Parse the flags and write."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    from convert.adapters.adapter import open_adapter, save_adapter, stored_tensors
    from convert.adapters.layouts import find_layout
    from convert.loading.folder import fingerprint
    from convert.writing.destination import new_destination

    folder, _ = options.open_source(choice, args.base)
    form = {"force": args.force_adapter, "family": choice.family}
    adapter = open_adapter(args.source, folder, **form)
    layout = find_layout(folder.config, args.layout)
    if adapter.layout == layout:  # nothing is to be divided or joined
        adapter = open_adapter(args.source, folder, apart=True, **form)
    adapter = dataclasses.replace(adapter, base=fingerprint(folder))
    tensors, _ = stored_tensors(adapter, layout)
    size = sum(array.nbytes for array in tensors.values())
    for line in (*folder.notes, *adapter.notes):
        note(line)
    ranks: dict[str, int] = {}  # the largest of all layers: what has to be set to serve it
    for name, array in tensors.items():
        if ".lora_A." in name:
            module = name.split(".")[-3]
            ranks[module] = max(len(array), ranks.get(module, 0))
    listed = ", ".join(f"{name} (rank {rank})" for name, rank in ranks.items())
    source = Path(args.source)

    def save(progress: Callable[[int, int], None]) -> None:
        with new_destination(args.destination, needed=size, source=source) as temporary:
            save_adapter(temporary, adapter, layout=layout)

    form = f"layout {args.layout}: {listed}"
    options.write(save, args.destination, size, form, dry_run=args.dry_run, source=source)


if __name__ == "__main__":
    interrupt.run(main)
