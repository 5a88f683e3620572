"""Mathematics of the model on one device. Knows no process, rank, Ray or network."""
