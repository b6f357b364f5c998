"""An OpenAI-compatible gateway that reads a direction in every request, the engine behind it, and its page."""
