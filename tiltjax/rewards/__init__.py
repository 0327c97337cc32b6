"""Text -> float: the rewards that ship with the library, and the gate every reward passes through."""
