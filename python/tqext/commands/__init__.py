"""The command line; `cli` is where a command begins. Each of the others is one command, or what the commands share."""
