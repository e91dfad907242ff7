"""The forms in which the doctor's findings are written: for people, for programs, and for code hosts."""
