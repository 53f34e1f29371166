"""How the starter towers are made; see README.md. Not installed: run it with `make starter`."""
