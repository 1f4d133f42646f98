"""How well a guarded model answers: judges of its answers."""
