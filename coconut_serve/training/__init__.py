"""The demo model: task, architecture and training."""
