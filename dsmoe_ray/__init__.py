"""Dense training and sparse inference of mixture-of-experts language models on Ray."""
