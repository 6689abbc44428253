"""One file a migration, oldest first; a landed one is never edited."""
