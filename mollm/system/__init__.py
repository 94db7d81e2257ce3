"""The machine, the folders that results go to, and the self-test."""
