"""The bodies of the commands, and what gin may bind."""
