"""The pipeline: stages that pass rows on, and the ring of them that recursions turn in."""
