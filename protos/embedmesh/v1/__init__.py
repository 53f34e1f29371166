"""Stubs of the contract `embedmesh.v1`, generated from the .proto files next to them (`make proto`)."""
