"""The `embedmesh` command: runs the mesh on this machine, embeds, makes the starter model."""
