"""The demo, a guest: nothing but the command line imports from here."""
