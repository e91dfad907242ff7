"""The doctor's rules: their codes, names, weight and words, and a smallest loop that each one finds."""
