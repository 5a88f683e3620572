"""The published model: manifest, save, verified load. Knows no training run and no process."""
