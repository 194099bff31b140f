"""The HTTP side: schemas, routes, errors, server-sent events."""
