"""How every command talks: flags, messages, files, signals and exit codes. Free of jax."""
