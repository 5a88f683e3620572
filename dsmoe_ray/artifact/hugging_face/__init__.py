"""Models in the stock formats of Hugging Face: written from an artifact, read into one. Runs no code of theirs."""
