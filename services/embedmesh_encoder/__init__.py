"""One deep service with three faces: turns texts, images or sounds into vectors.

Read in this order: `model` (what a model folder says), `preparation` (one input to arrays),
`backend` (arrays to arrays), `batcher`, `encoder`, `service`, `__main__`.
"""
