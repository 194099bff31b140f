"""The demo model: its task, its architecture and how it is trained."""
