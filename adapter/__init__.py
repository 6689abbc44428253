"""What joins the processes: contracts, settings, streams, the registry, artifacts, LoRA, hot swap.

The name comes from the LoRA adapters that travel through it; nothing here runs by itself.
"""
