"""The sparse inference engine. Knows no Ray and no network."""
