"""What training learns from: files of conversations, as token sequences, in batches."""
