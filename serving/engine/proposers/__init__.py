"""Ways to draft: what they have in common, a draft model, and matching against text that was seen."""
