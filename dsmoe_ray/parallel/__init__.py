"""The model's mathematics over ranks: mesh, sharding, exchange, optimizer. Knows no Ray and no run."""
