"""One file per architecture family: the forward pass as it is written in a paper."""
