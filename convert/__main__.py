"""`python -m convert`: the list of its tools."""

from glm2_jax.cli.commands import list_tools

if __name__ == "__main__":
    list_tools("convert")
