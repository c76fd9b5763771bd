"""Measured comparisons with plain tools and with the machine's limits: ``python -m benchmarks`` runs all rows of the table in README.md."""
