"""Our algorithms inside other people's trainers."""
