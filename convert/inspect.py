"""`python -m convert.inspect PATH`: describe a checkpoint folder without reading its weights."""

from typing import Any

from convert import options
from convert.hub.find import find_model
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.escape import join_lines, json_line


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.inspect",
        description=(
            "Describes a checkpoint folder: family, parameters, types, sizes. The names and "
            "shapes of all tensors are checked; their data is not read, except by --verify."
        ),
        example="python -m convert.inspect ./chatglm2-6b",
    )
    parser.add_argument(
        "path", metavar="PATH", type=path_argument, help="the folder, OWNER/NAME, or demo"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    output.add_argument(
        "--verify", action="store_true", help="compare every file with the manifest's checksums"
    )
    options.add_last(parser, None)
    return parser


def describe(path: str, **form: str | None) -> dict[str, Any]:
    """Return what is known about a folder without its data, ready for JSON; `form` as in
    `open_folder`."""
    from convert.loading.folder import fingerprint, open_folder

    folder = open_folder(path, **form)
    for line in folder.notes:
        note(line)
    config = folder.config
    return {
        "path": path,
        "layout": folder.layout,
        "family": config.family,
        "parameters": config.num_params,
        "stored_dtype": folder.stored_dtype,
        "float_dtype": folder.float_dtype,
        "quantization": None if folder.scheme is None else folder.scheme.name,
        "quantization_bits": 0 if folder.scheme is None else folder.scheme.bits,
        "packing": folder.packing and folder.packing.text,
        "rope_kind": config.rope_kind,
        "rope_ratio": config.rope_ratio,
        "rotary": config.block.rotary,
        "rope": config.rope_text,
        "vocabulary": config.vocab_size,
        "tokenizer_pieces": folder.tokenizer.num_pieces,
        "special_tokens": folder.tokenizer.special,
        "added_tokens": {x.content: x.id for x in folder.tokenizer.added.values()},
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn_hidden_size": config.ffn_hidden_size,
        "context": config.seq_length,
        "template": folder.template,
        "weights": folder.weights.name,
        "weight_files": len(folder.weights.files),
        "weights_left_out": list(folder.weights.left_out),
        "bytes_on_disk": folder.weights.bytes_on_disk,
        "source": folder.manifest.source if folder.manifest else None,
        "fingerprint": fingerprint(folder),
    }


def as_table(found: dict[str, Any]) -> str:
    """Return the same as a table for people."""
    from glm2_jax.schemes import SCHEMES, stored_as

    scheme = SCHEMES.get(found["quantization"])
    lines = {
        "folder": found["path"],
        "layout": found["layout"],
        "family": found["family"],
        "parameters": f"{found['parameters']:,}",
        "stored dtype": stored_as(found["float_dtype"], scheme),
        "packed as": found["packing"],
        "rope": found["rope"],
        "vocabulary": f"{found['vocabulary']} ids, {found['tokenizer_pieces']} pieces",
        "added tokens": len(found["added_tokens"]),
        "layers": found["layers"],
        "heads": f"{found['heads']} query, {found['kv_heads']} key/value, of {found['head_dim']}",
        "sizes": f"hidden {found['hidden_size']}, feed-forward {found['ffn_hidden_size']}",
        "context": f"{found['context']} tokens",
        "template": found["template"],
        "on disk": f"{human_size(found['bytes_on_disk'])} in {found['weight_files']} file(s)",
        "weights": found["weights"],
        "fingerprint": found["fingerprint"],
        "left out": ", ".join(found["weights_left_out"]),
        "made from": found["source"],
    }
    return join_lines(f"{name:<14}{value}" for name, value in lines.items() if value)


def main(argv: list[str]) -> None:
    """Parse the flags and print."""
    args = build_parser().parse_args(argv)
    choice = from_flags(ModelChoice, args)
    path = str(find_model(args.path, source=choice.source, revision=choice.revision))
    found = describe(path, **choice.form)
    if args.verify:
        options.verify(path)
        found["verified"] = True
    print(json_line(found) if args.json else as_table(found))


if __name__ == "__main__":
    interrupt.run(main)
