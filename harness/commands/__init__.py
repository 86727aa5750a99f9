"""One file for each command of `shelfmark`."""
