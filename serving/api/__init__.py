"""The HTTP front: requests in, tokens out.  Never imports torch."""
