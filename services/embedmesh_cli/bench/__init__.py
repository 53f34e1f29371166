"""How fast a mesh is, and how it behaves under load: `embedmesh bench`.

load.py       calls from processes of their own, open loop or closed
search.py     the highest rate that keeps a promise
material.py   texts, pictures, sounds, and requests made of them
measure.py    what a load showed: HDR histograms, /metrics and /proc of each role
bound.py      the model alone in one process
session.py    what the scenarios share; they are in speed.py, conduct.py, growth.py, peers.py
report.py     JSON, text, HTML
"""

from embedmesh_cli.bench.command import EXAMPLES, bench

__all__ = ["EXAMPLES", "bench"]
