"""Algorithms: filters, supervised fine-tuning and SWiRL, one readable file each."""
