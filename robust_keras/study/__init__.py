"""The paper's tables as data, what their rows cost, and what was measured beside them."""
