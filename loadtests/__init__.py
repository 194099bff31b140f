"""Load tests; see docs/load-tests.md."""
