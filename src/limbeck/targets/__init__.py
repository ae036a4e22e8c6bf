"""What a teacher says about each position: sparse targets, their codec and their cache on disk."""
