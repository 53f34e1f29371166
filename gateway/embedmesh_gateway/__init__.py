"""The gateway: routes each input to the encoder of its modality, and computes nothing twice."""
