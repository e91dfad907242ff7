"""The guide: a page that explains, a playground that really trains, a live view of runs."""
