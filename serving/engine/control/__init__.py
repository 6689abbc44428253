"""How many tokens to draft for each request, and by which proposer: the cost, the odds and the choice."""
