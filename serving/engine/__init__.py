"""The decoding engine: batches, drafts, verifies, commits, records, swaps."""
