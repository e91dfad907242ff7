"""What is minimised: a sum, the count it is a sum over, and losses that couple samples."""
