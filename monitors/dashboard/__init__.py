"""The operator's pages.  Reads SQL only, so it works while everything else is down."""
