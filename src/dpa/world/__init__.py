"""The embedded demo world: questions, a known true reward, rated rows, and a small start model."""
