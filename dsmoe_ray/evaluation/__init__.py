"""Quality of a published model: loss, perplexity, active parameters, reports. Knows no training run."""
