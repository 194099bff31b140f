"""From an API request to engine requests and back to text; no HTTP, no torch."""
