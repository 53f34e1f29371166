"""`python -m embedmesh_cli.demo`."""

import sys

from embedmesh_cli.__main__ import main

sys.argv[1:1] = ["demo"]
main()
