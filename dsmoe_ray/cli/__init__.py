"""One file a command: flags to one call. Holds no logic of its own."""
