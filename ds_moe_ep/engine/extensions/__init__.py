"""Extensions of an engine: callbacks in one order, and one wrapper per method."""
