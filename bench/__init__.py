"""What is measured, and the figures that were: `python -m bench.train`; results/ has what it wrote, LOG.md what was learned."""
