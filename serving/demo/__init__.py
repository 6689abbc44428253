"""The demonstration: traffic changes, a draft is trained, gated, swapped in and rolled back, and measured."""
