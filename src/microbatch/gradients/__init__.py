"""Where gradients add up and what finishes them: dtype, one denominator, one norm, one clip."""
