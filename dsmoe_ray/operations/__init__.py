"""Care of machines and clusters. Reads what it looks at; knows no model and no run."""
