"""Commands that talk to a running server; each module adds its own flags."""
