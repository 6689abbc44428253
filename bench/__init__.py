"""What is measured.  Each module prints JSON; results that are quoted are kept in bench/results."""
